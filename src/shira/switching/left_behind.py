"""What a switcher that is gone has left in a model: it stays active, and whoever owns the model next gets the base."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import SwitchError
from ..kernels import WritePlan
from ..weights.model_tensors import ModelTensors
from ..weights.owners import leave
from .model_state import ModelState
from .ready import InWeights
from .recovery import recover_base

__all__ = ["leave_behind"]


def leave_behind(model: nn.Module, known: ModelState, state: InWeights) -> None:
    """Keep the base under what is in the weights for their next owner, as long as their modules live.

    Not in models that are sharded or quantized: there the adapter stays for good.
    """
    if not state.plans or known.pieces or known.quantized:
        return
    written = {id(write.weight) for plan in state.plans for write in plan.writes}
    leave(
        [module for module in model.modules() if any(id(tensor) in written for tensor in _own([module]))],
        functools.partial(_put_back, state.plans, state.label()),
    )


def _put_back(plans: Sequence[WritePlan], active: str, modules: Sequence[nn.Module]) -> None:
    """Write the base under the plans. If others have changed the entries meanwhile, the weights are theirs, and stay.

    modules: those with these weights that still live.
    """
    model = nn.ModuleList(modules)
    weights = {id(write.weight): write.weight for plan in plans for write in plan.writes}
    model._buffers.update({f"gone{key}": weights[key] for key in weights.keys() - {id(p) for p in _own(modules)}})
    tensors = ModelTensors(model)
    names: dict[int, list[str]] = {}
    for name, weight in tensors.by_name.items():
        names.setdefault(id(weight), []).append(name)
    with contextlib.suppress(SwitchError):
        recover_base(plans, names, tensors, active)
    torch.clear_autocast_cache()


def _own(modules: Iterable[nn.Module]) -> Iterator[Tensor | None]:
    for module in modules:
        yield from (*module._parameters.values(), *module._buffers.values())
