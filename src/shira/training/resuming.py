"""A tuner's state in a checkpoint: the trained values, and for each tensor a mark that identifies its positions and base.

Buffers that training has changed, such as BatchNorm's statistics, are in it, too. Positions and base values are not, since
attaching again with the same settings gives the same ones. The marks let loading check that. Otherwise values at wrong
positions would train on unnoticed.
"""

import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..errors import BaseMismatch, TuningError
from ..sparse.positions import checksum
from ..sparse.tensor import SHA256, fingerprint
from ..texts import described, shown
from ..weights.buffers import Buffers
from ..weights.model_tensors import OWN
from ..weights.quantized import shape_of
from .masters import Masters

__all__ = ["BUFFER", "VALUES", "load_state", "state_of"]

VALUES, MARK = ".values", ".mark"  # for each tensor: float32 [k], and int64 [dimensions + 2]; variants add ".values_…"
BUFFER = OWN + "buffer:"  # prefix of the names of buffers that training has changed


def state_of(masters: Mapping[str, Masters], buffers: Buffers, *, moved: bool) -> dict[str, Tensor]:
    """Copies of all masters on the CPU, with their marks, and of changed buffers.

    Raises TuningError if the mask has `moved` since `attach`.
    """
    if moved:
        raise TuningError(
            "a mask that has moved (refresh) cannot be resumed, since a checkpoint does not keep positions; save no "
            "checkpoints (save_strategy='no'), and the adapter at the end"
        )
    state = {BUFFER + name: value.to("cpu", copy=True).contiguous() for name, value in buffers.named_changed().items()}
    for name, each in masters.items():
        for ending, parameter in each.parameters.items():
            state[name + VALUES + ending] = parameter.detach().to("cpu", copy=True) * _scale(each, ending)
        state[name + MARK] = _mark(each)
    return state


def load_state(
    masters: Mapping[str, Masters], buffers: Buffers, state: Mapping[str, Tensor], *, whole: Collection[str]
) -> None:
    """Copy the values of a `state_of` to these masters and buffers, bit for bit. Other buffers get the base's values.

    whole: names of targets that train whole, whose base is another one in each process.

    Raises TuningError or BaseMismatch, before anything is written, unless tensors, positions and base are the same.
    """
    if not isinstance(state, Mapping):
        raise TuningError(f"a checkpoint is what tuner.state_dict() gave, tensors by name; found {described(state)}")
    state = dict(state)
    changed = {key.removeprefix(BUFFER): state.pop(key) for key in list(state) if str(key).startswith(BUFFER)}
    named = {name: {name + VALUES + end: p for end, p in each.parameters.items()} for name, each in masters.items()}
    expected = {key for name, parameters in named.items() for key in (*parameters, name + MARK)}
    if not any(name in state for name in expected):
        raise TuningError("the checkpoint holds nothing that this tuner trains; it is of another model, or no shira checkpoint")
    if expected != state.keys():
        missing, extra = sorted(expected - state.keys()), sorted(map(str, state.keys() - expected))
        few = [shown(names[:3]) if names else "none" for names in (missing, extra)]
        raise TuningError(
            f"the checkpoint is of other targets: missing {few[0]}, not trained here {few[1]}; "
            "attach with the settings that it was made with"
        )
    for name, each in masters.items():
        _check(name, each, named[name], state, is_whole=name in whole)
    wanted = buffers.with_values(changed)
    buffers.restore()
    buffers.put(wanted)
    for name, each in masters.items():
        for ending, parameter in each.parameters.items():
            values = state[name + VALUES + ending].float() / _scale(each, ending)
            parameter.detach().copy_(values)  # detach(), not no_grad(): an interrupt could leave that mode on
        if not each.ignored:
            each.write()  # compiled code does not look whether the masters have changed


def _scale(each: Masters, ending: str) -> float:
    """What a parameter is multiplied by to give what a checkpoint holds: the entries themselves, or a variant's parameters."""
    return each.scale if ending == "" else 1.0


def _mark(each: Masters) -> Tensor:
    """int64 [dimensions + 2]: the weight's shape, and checksums of the positions and of the base's values there."""
    base = zlib.crc32(fingerprint(each.base, SHA256).encode())  # as in older checkpoints
    return torch.tensor([*shape_of(each.weight), checksum(each.indices.cpu()), base], device="cpu")


def _check(name: str, each: Masters, named: Mapping[str, Tensor], state: Mapping[str, Tensor], *, is_whole: bool) -> None:
    for key in (*named, name + MARK):
        tensor: object = state[key]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise TuningError(f"'{key}' must be a plain tensor with data in a checkpoint, found {described(tensor)}")
    *shape, positions, base = _mark(each).tolist()
    mark = state[name + MARK]
    if mark.dtype != torch.int64 or mark.ndim != 1 or mark.numel() < 2:
        raise TuningError(
            f"'{name + MARK}' must be whole numbers, int64 [dimensions + 2], found {mark.dtype} {list(mark.shape)}"
        )
    found = mark.tolist()
    if found[:-2] != shape:
        raise BaseMismatch(f"the checkpoint is of another model: '{name}' is {found[:-2]} there and {shape} here")
    for key, parameter in named.items():
        if state[key].shape != parameter.shape:
            raise TuningError(
                f"the checkpoint is of another mask: {state[key].numel()} entries of '{name}' train there and "
                f"{parameter.numel()} here; attach with its density or rank"
            )
        if not state[key].is_floating_point():
            raise TuningError(f"'{key}' must be floating point in a checkpoint, found {state[key].dtype}")
        if not bool((state[key].to(parameter.dtype) / _scale(each, key.removeprefix(name + VALUES))).isfinite().all()):
            raise TuningError(
                f"'{key}' holds values that are not finite as {parameter.dtype}; the run went wrong before this checkpoint was "
                "saved, or it is damaged: take an earlier one"
            )
    if found[-2] != positions:
        raise TuningError(
            f"the checkpoint is of another mask: {each.indices.numel()} other positions of '{name}' train there; attach "
            "with the mask, seed and calibration that it was made with"
        )
    if found[-1] != base and not is_whole:  # a new head has other random values each time that it is made
        raise BaseMismatch(
            f"the checkpoint is of another base: '{name}' holds other values at the positions that train; load the model that "
            "it was made with, in the same dtype"
        )
