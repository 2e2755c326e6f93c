"""What others find of a switcher in a model: that it owns it; and, if it is gone, what it has left active, over the base.

Also what those hear who copy a switcher.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import SwitchError
from ..kernels import WritePlan
from ..weights.model_tensors import ModelTensors
from ..weights.owners import leave
from .model_state import ModelState
from .ready import InWeights
from .recovery import recover_base

__all__ = ["leave_behind", "no_copy", "owner_text"]


def leave_behind(model: nn.Module, known: ModelState, state: InWeights) -> None:
    """Keep the base under what is in the weights for their next owner, as long as their modules live.

    Not in models that are sharded or quantized: there the adapter stays for good.
    """
    if not state.plans or known.pieces or known.quantized:
        return
    written = {id(weight) for plan in state.plans for weight in plan.weights}
    leave(
        [module for module in model.modules() if any(id(tensor) in written for tensor in _own([module]))],
        functools.partial(_put_back, state.plans, state.label()),
    )


def _put_back(plans: Sequence[WritePlan], active: str, modules: Sequence[nn.Module]) -> None:
    """Write the base under the plans. If others have changed the entries meanwhile, the weights are theirs, and stay.

    modules: those with these weights that still live.
    """
    model = nn.ModuleList(modules)
    weights = {id(weight): weight for plan in plans for weight in plan.weights}
    model._buffers.update({f"gone{key}": weights[key] for key in weights.keys() - {id(p) for p in _own(modules)}})
    tensors = ModelTensors(model)
    names: dict[int, list[str]] = {}
    for name, weight in tensors.by_name.items():
        names.setdefault(id(weight), []).append(name)
    with contextlib.suppress(SwitchError):
        recover_base(plans, names, tensors, active)


def _own(modules: Iterable[nn.Module]) -> Iterator[Tensor | None]:
    for module in modules:
        yield from (*module._parameters.values(), *module._buffers.values())


def owner_text(switcher: weakref.ref[Any]) -> str:
    """The message for others who want the switcher's model; "" if the switcher does not own it."""
    if (alive := switcher()) is None or not alive._state.plans:
        return ""
    who, call = alive.called
    return f"{who} has {alive._state.label()} active in it; call its {call} first"


def no_copy(who: str, anew: str) -> SwitchError:
    """The error for copying or pickling a switcher, or a module that holds one. anew: the call that makes one for the copy."""
    return SwitchError(
        f"{who} belongs to one model, and cannot be copied or pickled. Copy the model without it, and make another one for the "
        f"copy: {anew}. A module that holds it must give it up first, as with `del module.switcher`"
    )
