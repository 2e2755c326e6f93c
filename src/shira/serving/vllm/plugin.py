"""What vLLM loads by itself: an entry point of vllm.general_plugins here, one of vllm.endpoint_plugins in `endpoints.py`."""

import os
from typing import Any

from .environment import ADAPTERS

__all__ = ["register"]


def register() -> None:
    """Called in every process of vLLM before a model is made. It does nothing unless adapters are served.

    On CPUs vLLM packs the weights of linear layers into a form that cannot be changed. Its own switch for layers whose weights
    are read elsewhere leaves them as they are. The output layer has no such switch: vLLM keeps its weight, which may be that of
    the embedding, and computes with a packed copy.
    """
    if not os.environ.get(ADAPTERS):
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        LinearBase._cpu_skip_gemm_dispatch = True
        UnquantizedEmbeddingMethod.process_weights_after_loading = _left_as_it_is


def _left_as_it_is(method: Any, layer: Any) -> None:
    """In place of `UnquantizedEmbeddingMethod.process_weights_after_loading`, which does nothing but pack on CPUs."""
    from torch.nn.functional import linear

    layer.cpu_linear = linear
