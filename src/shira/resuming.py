"""What a checkpoint keeps of a run, and how it is known to be of the same one: values, with a mark of what they belong to.

Positions and base values need not be kept, since attaching again with the same settings gives the same ones; that they are
the same must be checked, since values at other positions would train on without a sign.
"""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .adapter import fingerprint
from .encoding import checksum
from .errors import BaseMismatch, TuningError
from .masters import Masters
from .quantized import shape_of

__all__ = ["load_state", "state_of"]

VALUES, MARK = ".values", ".mark"  # of each tensor: float32 [k], and int64 [sides + 2]; variants have further ".values_…"


def state_of(masters: Mapping[str, Masters], *, moved: bool) -> dict[str, Tensor]:
    """Copies of all masters on the CPU, with their marks. Raises TuningError if the mask has moved since `attach`."""
    if moved:
        raise TuningError(
            "a mask that has moved (refresh) cannot be resumed, since a checkpoint does not keep positions; save no "
            "checkpoints (save_strategy='no'), and the adapter at the end"
        )
    state = {}
    for name, entries in masters.items():
        for ending, parameter in entries.parameters().items():
            state[name + VALUES + ending] = parameter.detach().to("cpu", copy=True)
        state[name + MARK] = _mark(entries)
    return state


def load_state(masters: Mapping[str, Masters], state: Mapping[str, Tensor]) -> None:
    """Write the values of a `state_of` into these masters, bit for bit.

    Raises TuningError or BaseMismatch, before anything is written, if it is not of the same tensors, positions and base.
    """
    held = {name: {name + VALUES + end: p for end, p in entries.parameters().items()} for name, entries in masters.items()}
    expected = {key for name, parameters in held.items() for key in (*parameters, name + MARK)}
    if not any(name in state for name in expected):
        raise TuningError("the checkpoint holds nothing that this tuner trains; it is of another model, or no shira checkpoint")
    if expected != state.keys():
        missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected)
        raise TuningError(
            f"the checkpoint is of other targets: missing {missing[:3] or 'none'}, not trained here {extra[:3] or 'none'}; "
            "attach with the settings that it was made with"
        )
    for name, entries in masters.items():
        _check(name, entries, held[name], state)
    with torch.no_grad():
        for parameters in held.values():
            for key, parameter in parameters.items():
                parameter.copy_(state[key])


def _mark(entries: Masters) -> Tensor:
    """The weight's sides, and checksums of the positions and of the base values that lay there."""
    base = zlib.crc32(fingerprint(entries.base).encode())
    return torch.tensor([*shape_of(entries.weight), checksum(entries.indices.cpu()), base])


def _check(name: str, entries: Masters, held: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    *shape, positions, base = _mark(entries).tolist()
    found = state[name + MARK].tolist()
    if found[:-2] != shape:
        raise BaseMismatch(f"the checkpoint is of another model: '{name}' is {found[:-2]} there and {shape} here")
    for key, parameter in held.items():
        if state[key].shape != parameter.shape:
            raise TuningError(
                f"the checkpoint is of another mask: {state[key].numel()} entries of '{name}' train there and "
                f"{parameter.numel()} here; attach with its density or rank"
            )
    if found[-2] != positions:
        raise TuningError(
            f"the checkpoint is of another mask: {entries.indices.numel()} other positions of '{name}' train there; attach "
            "with the mask, seed and calibration that it was made with"
        )
    if found[-1] != base:
        raise BaseMismatch(
            f"the checkpoint is of another base: '{name}' holds other values at the positions that train; load the model that "
            "it was made with, in the same dtype"
        )
