"""A state_dict that is loaded into a model in training: trained values of another mask are refused before anything is written.

A state_dict holds weights and trained values, and no positions. Weights are written with the trained values before they are
saved, so both must agree at the positions that train here.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import TuningError
from ..sparse.tensor import is_dense
from ..weights.distributed import is_sharded
from ..weights.model_tensors import is_own
from .following import NEAR
from .masters import Masters

__all__ = ["UncheckedState", "before_load"]


class UncheckedState(UserWarning):
    """Trained values were loaded without the weights, so nothing says whether they belong to the positions that train."""


def before_load(masters: Sequence[Masters], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Check a state_dict, and add the present trained values if it has none, as that of a base: they stay as they are.

    A hook of the model, and of each module that holds trained values. module, state, prefix: what torch gives such a hook.
    Raises TuningError, before anything is loaded into the module, if the state was made with another mask or other settings.
    """
    of = {id(parameter): each for each in masters for parameter in each.parameters.values() if not each.detached}
    every = {prefix + name: parameter for name, parameter in module.named_parameters(remove_duplicate=False)}
    ours = {name: parameter for name, parameter in every.items() if id(parameter) in of}
    for name in state:
        if name.startswith(prefix) and is_own(name.rpartition(".")[2]) and name not in every:
            _refuse(name, "is in the state, and does not train here")
    names: dict[int, dict[str, str]] = {}  # id of masters -> ending of a parameter's name -> the name
    for name, parameter in ours.items():
        each = of[id(parameter)]
        ending = next(ending for ending, own in each.parameters.items() if own is parameter)
        names.setdefault(id(each), {}).setdefault(ending, name)
    unchecked = [name for each in masters if id(each) in names and (name := _check(each, names[id(each)], state))]
    if unchecked and (len(names) == len(masters) or not prefix):  # once, and not again for each module inside
        warnings.warn(
            f"{len(unchecked)} tensors, such as '{unchecked[0]}', are loaded without their weights, so nothing says whether "
            "their values belong to the positions that train here; save tuner.state_dict() and load it with "
            "tuner.load_state_dict(), which checks",
            UncheckedState,
            stacklevel=2,
        )
    for name, parameter in ours.items():
        state.setdefault(name, parameter)


def _check(each: Masters, names: Mapping[str, str], state: Mapping[str, Any]) -> str:
    """Check one weight's part of a state. Returns a name in it if the positions cannot be checked; otherwise "".

    names: ending of a parameter's name -> its name in the state.
    """
    found = {ending: state[name] for ending, name in names.items() if isinstance(state.get(name), Tensor)}
    if all(tensor is each.parameters[ending] for ending, tensor in found.items()):  # none, or added by the model's own hook
        return ""
    for ending, name in names.items():
        if ending not in found:
            _refuse(name, "trains here, and is not in the state")
        here, there = list(each.parameters[ending].shape), list(found[ending].shape)
        if here != there:
            _refuse(name, f"has {there} values in the state and {here} here")
    name = names[min(names)]
    weight = state.get(f"{name.rpartition('.')[0]}.{each.uses[0][1]}".lstrip("."))
    if each.piece is not None or not each.in_place:
        return ""
    if not isinstance(weight, Tensor):
        return name
    entries = each.entries_of(found)
    if entries is None or weight.shape != each.weight.shape or weight.is_meta or is_sharded(weight) or not is_dense(weight):
        return ""
    inside = kernels.gather(weight.detach(), each.indices.to(weight.device)).float()
    if not torch.allclose(entries.to(inside), inside, equal_nan=True, **NEAR):
        _refuse(name, "has values in the state that are not in the weight there, at the positions that train here")
    return ""


def _refuse(name: str, what: str) -> NoReturn:
    raise TuningError(
        f"'{name}' {what}: this state_dict is of a training with other settings; attach with the mask, density, seed, lr_scale "
        "and variant that it was made with, before you load it"
    )
