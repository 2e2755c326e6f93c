"""Go on with an adapter's training: its entries train, from its values, and the base stays the base."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import kernels
from ..adapter import Adapter, opened
from ..errors import MaskError, TuningError
from ..files.metadata import check_metadata
from ..files.paths import path_of
from ..masks.selector import Selected
from ..sparse.positions import index_dtype
from ..sparse.tensor import SparseTensor
from ..weights.belonging import check_base
from ..weights.distributed import is_sharded
from ..weights.model_tensors import is_buffer, named_tensors
from ..weights.targets import Target
from ..weights.undo import Undo
from .resuming import BUFFER, VALUES
from .tuner import Tuner

__all__ = ["Start", "StartFrom", "cannot_move", "read_start", "refuse_beside"]

DECIDED: tuple[str, ...] = (
    "mask",
    "density",
    "rank",
    "total",
    "scope",
    "floor",
    "overrides",
    "targets",
    "exclude",
    "layers",
    "avoid",
)
DECIDED += ("calibration", "method", "decompose", "low_rank", "whole")  # options of `attach` that `start` decides
StartFrom = Adapter | str | os.PathLike[str]


class Start(NamedTuple):
    """An adapter whose training goes on. Its tensors by name: parameters of the model, and buffers. mask: how it was chosen."""

    label: str
    parameters: dict[str, SparseTensor]
    buffers: dict[str, SparseTensor]
    mask: dict[str, Any]

    @property
    def whole(self) -> list[str]:
        """The names of parameters that train whole, as a new head does."""
        return [name for name in self.mask.get("whole") or () if name in self.parameters]

    @property
    def lr_scale(self) -> float | None:
        """That of the training before, None if it was not of this library."""
        return float(self.mask.get("lr_scale") or 1) if "seed" in self.mask else None

    def settings(self) -> dict[str, Any]:
        """What the new adapter says of its mask."""
        moved = ("refresh", "stay_near", "calibration", "lr_scale")
        known = {key: value for key, value in self.mask.items() if key not in moved}
        return {"name": "from_adapter", **known, "start": self.label}

    def select(self, targets: Iterable[Target], _undo: Undo) -> Selected:
        """The entries of the adapter, in place of what a mask would choose."""
        indices, whole = {}, 0
        for target in targets:
            sparse = self.parameters[target.name]
            indices[target.name] = sparse.indices.to(target.weight.device, index_dtype(sparse.numel))
            whole += sparse.numel
        return Selected(indices, None, sum(each.numel() for each in indices.values()) / max(1, whole))

    def give(self, tuner: Tuner) -> None:
        """Let the tuner's entries and buffers have the adapter's values."""
        state = tuner.state_dict()
        tensors = named_tensors(tuner.model)
        for name, sparse in self.parameters.items():
            before = state[name + VALUES]
            state[name + VALUES] = sparse.values.float() if sparse.kind == "overwrite" else before + sparse.values.float()
        names = {id(tensor): name for name, tensor in tuner.model.named_buffers(remove_duplicate=False)}
        for name, sparse in self.buffers.items():
            value = tensors[name].detach().to("cpu", copy=True).contiguous()
            value.view(-1)[sparse.indices.long()] = sparse.values.to(value.dtype)
            state[BUFFER + names[id(tensors[name])]] = value
        tuner.load_state_dict(state)


def read_start(start: StartFrom, model: nn.Module) -> Start:
    """Read an adapter, and check that its training can go on in this model.

    Raises TuningError if it cannot; BaseMismatch if the adapter belongs to another model; FormatError or OSError for a file.
    """
    if not isinstance(start, Adapter | str | os.PathLike):
        raise TuningError(f'start must be an adapter or a file of one, start="poet.safetensors", found {start!r:.60}')
    tensors = named_tensors(model)
    if isinstance(start, Adapter):
        return _checked(start.name or "an adapter", start, tensors)
    path = path_of(start, "shira.attach(model, start='poet.safetensors')", TuningError)
    with opened(path, model=lambda: tensors) as adapter:
        held = {name: adapter.tensors[name] for name in adapter.tensors}
        return _checked(adapter.name or Path(path).stem, Adapter(held, adapter.metadata), tensors)


def _checked(label: str, adapter: Adapter, tensors: dict[str, Tensor]) -> Start:
    check_metadata(adapter.metadata)
    sharded = next((name for name in adapter.tensors if name in tensors and is_sharded(tensors[name])), None)
    if sharded is not None:
        raise TuningError(f"'{sharded}' is sharded, and start needs whole weights; train with DDP")
    if adapter.metadata.get("low_rank"):
        raise TuningError(
            f"{label!r} was trained beside a low-rank part, which its file does not hold; its training cannot go on without it"
        )
    check_base(f"{label!r}", adapter, tensors, lambda weight, indices: kernels.gather(weight.detach(), indices))
    parameters = {name: each for name, each in adapter.tensors.items() if not is_buffer(tensors[name]) and each.nnz}
    buffers = {name: each for name, each in adapter.tensors.items() if is_buffer(tensors[name])}
    if not parameters:
        raise TuningError(f"{label!r} holds no entry of a parameter that could train")
    return Start(label, parameters, buffers, dict(adapter.metadata.get("mask") or {}))


def cannot_move(weight: Tensor, k: int, name: str) -> Tensor:
    """The mask of a training that goes on: `Tuner.refresh` cannot choose other entries."""
    raise MaskError("a training that began with start=… keeps the entries of its adapter; attach with a mask to choose others")


def refuse_beside(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise TuningError for options of `attach` that `start` decides. given, defaults: option -> value."""
    wrong = [option for option in DECIDED if (given[option] or None) is not (defaults[option] or None)]
    if wrong:
        raise TuningError(
            f"start takes the entries of that adapter; {', '.join(wrong)} cannot be given with it: leave {wrong[0]} out"
        )
