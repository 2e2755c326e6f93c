"""Go on with an adapter's training: its entries train, from its values, and the base stays the base."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import Adapter, opened
from ..errors import BaseMismatch, MaskError, TuningError
from ..files.metadata import check_metadata
from ..files.paths import path_of
from ..masks.selector import Selected
from ..sparse.positions import index_dtype
from ..sparse.tensor import SparseTensor, all_finite, dtype_name
from ..weights.belonging import check_base, values_at
from ..weights.distributed import is_sharded
from ..weights.model_tensors import is_buffer, named_tensors
from ..weights.targets import Target
from ..weights.undo import Undo
from .lr_scale import allowed
from .resuming import BUFFER, VALUES
from .tuner import Tuner

__all__ = ["BESIDE", "Start", "StartFrom", "cannot_move", "read_start", "refuse_beside"]

BESIDE = ("model", "loss_fn", "progress", "seed", "lr_scale", "start")  # options of `attach` that `start` does not decide
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
        named = self.mask.get("whole")
        names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        return [name for name in names if name in self.parameters and self.parameters[name].nnz == self.parameters[name].numel]

    @property
    def lr_scale(self) -> float | None:
        """That of the training before, None if its file says none."""
        with contextlib.suppress(TuningError):
            scale = allowed(self.mask.get("lr_scale") or 1, "values", False)
            return float(scale) if "seed" in self.mask and scale != "auto" else None
        return None

    def settings(self) -> dict[str, Any]:
        """What the new adapter says of its mask."""
        moved = ("refresh", "stay_near", "calibration", "lr_scale", "decompose")
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
        tensors, names = named_tensors(tuner.model), tuner._buffers.names()
        for name, sparse in self.parameters.items():
            values = self._values(name, sparse, tensors[name])
            state[name + VALUES] = values.float()
            if not torch.equal(state[name + VALUES].to(values.dtype), values):
                raise TuningError(
                    f"{self.label!r} holds values of '{name}' in float64 that float32 cannot hold; training would round them"
                )
        for name, sparse in self.buffers.items():
            value = tensors[name].detach().to("cpu", copy=True).contiguous()
            value.view(-1)[sparse.indices.long()] = self._values(name, sparse, tensors[name])
            state[BUFFER + names[id(tensors[name])]] = value
        tuner.load_state_dict(state)

    def _values(self, name: str, sparse: SparseTensor, weight: Tensor) -> Tensor:
        """The adapter's values of a tensor [k], on the CPU, in the tensor's dtype. Raises TuningError if a sum overflows."""
        if sparse.kind == "overwrite":
            return sparse.values.to(weight.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        base = values_at(weight, sparse.indices).cpu()
        values = (base.to(wide) + sparse.values.to(wide)).to(weight.dtype)
        if not all_finite(values):
            raise TuningError(f"{self.label!r}: base and delta of '{name}' overflow {dtype_name(weight.dtype)}")
        return values


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
    check_base(f"{label!r}", adapter, tensors, values_at)
    first: dict[int, str] = {}  # id of a tensor -> the name under which it trains: tied weights have several
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    held: dict[str, SparseTensor] = {}
    for name, sparse in adapter.tensors.items():
        known = held.setdefault(first[id(tensors[name])], sparse)
        if not (torch.equal(known.indices, sparse.indices) and torch.equal(known.values, sparse.values)):
            raise BaseMismatch(
                f"{label!r} holds other values for '{name}' than for '{first[id(tensors[name])]}', which are tied here"
            )
    parameters = {name: each for name, each in held.items() if not is_buffer(tensors[name]) and each.nnz}
    buffers = {name: each for name, each in held.items() if is_buffer(tensors[name])}
    if not parameters:
        raise TuningError(f"{label!r} holds no entry of a parameter that could train")
    return Start(label, parameters, buffers, dict(adapter.metadata.get("mask") or {}))


def cannot_move(weight: Tensor, k: int, name: str) -> Tensor:
    """The mask of a training that goes on: `Tuner.refresh` cannot choose other entries."""
    raise MaskError("a training that began with start=… keeps the entries of its adapter; attach with a mask to choose others")


def refuse_beside(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise TuningError for options of `attach` that `start` decides. given, defaults: option -> value."""
    wrong = [name for name in defaults if name not in BESIDE and not _same(given[name] or None, defaults[name] or None)]
    if wrong:
        raise TuningError(
            f"start takes the entries of that adapter; {', '.join(wrong)} cannot be given with it: leave {wrong[0]} out"
        )


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, str | int | float) and one == other)
