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

__all__ = ["load_state", "state_of"]

VALUES, MARK = ".values", ".mark"  # of each tensor: float32 [k], and int64 [sides + 2]


def state_of(masters: Mapping[str, Masters], *, moved: bool) -> dict[str, Tensor]:
    """Copies of all masters on the CPU, with their marks. Raises TuningError if the mask has moved since `attach`."""
    if moved:
        raise TuningError(
            "a mask that has moved (refresh) cannot be resumed, since a checkpoint does not keep positions; save no "
            "checkpoints (save_strategy='no'), and the adapter at the end"
        )
    state = {}
    for name, entries in masters.items():
        state[name + VALUES] = entries.values.detach().to("cpu", copy=True)
        state[name + MARK] = _mark(entries)
    return state


def load_state(masters: Mapping[str, Masters], state: Mapping[str, Tensor]) -> None:
    """Write the values of a `state_of` into these masters, bit for bit.

    Raises TuningError or BaseMismatch, before anything is written, if it is not of the same tensors, positions and base.
    """
    expected = {name + part for name in masters for part in (VALUES, MARK)}
    if not any(name in state for name in expected):
        raise TuningError("the checkpoint holds nothing that this tuner trains; it is of another model, or no shira checkpoint")
    if expected != state.keys():
        missing, extra = sorted(expected - state.keys()), sorted(state.keys() - expected)
        raise TuningError(
            f"the checkpoint is of other targets: missing {missing[:3] or 'none'}, not trained here {extra[:3] or 'none'}; "
            "attach with the settings that it was made with"
        )
    for name, entries in masters.items():
        _check(name, entries, state[name + VALUES], state[name + MARK])
    with torch.no_grad():
        for name, entries in masters.items():
            entries.values.copy_(state[name + VALUES])


def _mark(entries: Masters) -> Tensor:
    """The weight's sides, and checksums of the positions and of the base values that lay there."""
    base = zlib.crc32(fingerprint(entries.base).encode())
    return torch.tensor([*entries.weight.shape, checksum(entries.indices.cpu()), base])


def _check(name: str, entries: Masters, values: Tensor, mark: Tensor) -> None:
    *shape, positions, base = _mark(entries).tolist()
    found = mark.tolist()
    if found[:-2] != shape:
        raise BaseMismatch(f"the checkpoint is of another model: '{name}' is {found[:-2]} there and {shape} here")
    if values.shape != entries.values.shape:
        raise TuningError(
            f"the checkpoint is of another mask: {values.numel()} entries of '{name}' train there and {entries.values.numel()} "
            "here; attach with its density or rank"
        )
    if found[-2] != positions:
        raise TuningError(
            f"the checkpoint is of another mask: {values.numel()} other positions of '{name}' train there; attach with the "
            "mask, seed and calibration that it was made with"
        )
    if found[-1] != base:
        raise BaseMismatch(
            f"the checkpoint is of another base: '{name}' holds other values at the positions that train; load the model that "
            "it was made with, in the same dtype"
        )
