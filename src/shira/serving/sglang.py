"""SGLang: a custom weight loader that puts a selection into a running model, on the mapping that the vLLM engine uses.

It was tested on layers like SGLang's, in one process. It was not run in SGLang. Its hook is read from its public source
(`ModelRunner.update_weights_from_tensor`, in 2026): a server that was started with

    SHIRA_ADAPTERS=adapters SHIRA_MODEL=path/of/the/checkpoint \
        python -m sglang.launch_server … --custom-weight-loader shira.serving.sglang.use

calls `use(model, named_tensors)` in each of its processes when weights are updated with that load_format, and empties its
prefix cache. So all requests in it have one selection: there are no turns.

    engine.update_weights_from_tensor(message(catalogue.resolve("poet").key), load_format="shira.serving.sglang.use")
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checkpoints.sources import Checkpoint
from ..errors import ShiraError
from ..texts import shown
from .vllm.ranks import Alone, Group, Ranks, Together
from .vllm.worker import mapped_surface

__all__ = ["message", "use"]

NAME = "shira.key"  # of the tensor that brings a key
FOLDER, CHECKPOINT = "SHIRA_ADAPTERS", "SHIRA_MODEL"  # environment variables
PLACE = "_shira_ranks"  # of a model: what holds its selections
READY = 8


def message(key: str) -> list[tuple[str, Tensor]]:
    """The named tensors that ask for a selection: its key as bytes."""
    return [(NAME, torch.tensor(list(key.encode()), dtype=torch.uint8))]


def use(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put a selection into the weights of a model that SGLang has loaded, bit for bit; "" is the base. See `message`.

    The first call finds out where the checkpoint's tensors are. With tensor parallelism all processes switch, or none does.
    Raises ShiraError for tensors that are no message, or if the environment variables are missing; and what `Ranks.use` raises.
    """
    tensors = list(named_tensors)
    if [name for name, _ in tensors] != [NAME]:
        found = shown([name for name, _ in tensors])
        raise ShiraError(f"expected one tensor {NAME!r}, as `message(key)` makes it, found {found}")
    ranks: Ranks | None = model.__dict__.get(PLACE)
    if ranks is None:
        missing = [name for name in (FOLDER, CHECKPOINT) if not os.environ.get(name)]
        if missing:
            raise ShiraError(f"set {' and '.join(missing)}: the folder of the adapters, and the checkpoint of the model")
        surface, mapped = mapped_surface(model, Checkpoint(os.environ[CHECKPOINT]))
        ranks = model.__dict__[PLACE] = Ranks(surface, mapped, os.environ[FOLDER], _group(), ready=READY)
    ranks.use(bytes(tensors[0][1].tolist()).decode())


def _group() -> Group:
    """The processes that hold the model together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return Alone()
    from sglang.srt.distributed import get_tp_group

    return Together(get_tp_group().cpu_group)
