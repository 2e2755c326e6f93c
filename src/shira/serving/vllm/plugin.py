"""What vLLM loads by itself: an entry point of vllm.general_plugins here, one of vllm.endpoint_plugins in `endpoints.py`."""

import os
from typing import Any

from ..cpu_linear import linear
from .environment import ADAPTERS

__all__ = ["register"]


def register() -> None:
    """Called in every process of vLLM before a model is made. It does nothing unless adapters are served.

    On CPUs vLLM packs the weights of linear layers, also the output layer's, into a form that cannot be changed. Here they stay
    as they are.
    """
    if not os.environ.get(ADAPTERS):
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        UnquantizedLinearMethod.process_weights_after_loading = _left_as_it_is
        UnquantizedEmbeddingMethod.process_weights_after_loading = _left_as_it_is


def _left_as_it_is(method: Any, layer: Any) -> None:
    """In place of their `process_weights_after_loading`, which does nothing but pack on CPUs."""
    layer.cpu_linear = linear
