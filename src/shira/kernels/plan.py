"""What kernels work on: what a switch writes, over all tensors of a model, as one flat list; where sparse tensors meet."""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ShiraError

__all__ = ["Combined", "Contribution", "Overlap", "Sum", "WeightChanged", "WeightMemory", "Write", "WritePlan", "same_bits"]


class WeightChanged(ShiraError):
    """A weight is another than when its plan was made (cast, moved, replaced), or no longer holds what was written."""


class WeightMemory(NamedTuple):
    """Which memory a weight is, and how its entries lie there."""

    storage: Callable[[], Any]  # a weak reference: an address may be given out again, and a number, but not this
    layout: tuple[int, torch.dtype, torch.Size, tuple[int, ...]]  # address, dtype, shape, strides

    @classmethod
    def of(cls, weight: Tensor) -> "WeightMemory":
        storage = weakref.ref(weight.untyped_storage())
        return cls(storage, (weight.data_ptr(), weight.dtype, weight.shape, weight.stride()))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and shape agree to the bit: NaN is NaN, and 0.0 is not -0.0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class Overlap(NamedTuple):
    """The positions that any of several sparse tensors of one shape holds."""

    indices: Tensor  # [n], sorted and unique, in the dtype of theirs
    places: list[Tensor]  # of each tensor [k], int32: its own positions are indices[places]
    counts: Tensor  # [n], int32, how many hold each


class Contribution(NamedTuple):
    """What one adapter changes in a tensor: by strength · (values − base), or of a delta strength · values."""

    indices: Tensor  # [k], int32 or int64; or gaps, uint8 or uint16, as a file holds them, where `takes_gaps` says so
    values: Tensor  # [k], floating point; of an overwrite in the base's dtype
    strength: float
    is_delta: bool
    is_exact: bool  # where no other has a change, its value comes out bit for bit


class Combined(NamedTuple):
    """What comes of several changes."""

    indices: Tensor  # [n], all of theirs, sorted and unique
    values: Tensor  # [n], new, in the base's dtype
    base: Tensor  # [n], the base's there
    under: list[Tensor]  # of each overwrite [k], the base's at its own positions; of a delta nothing


class Write(NamedTuple):
    """One tensor's part of a plan."""

    weight: Tensor  # any shape, contiguous
    indices: Tensor  # [k], int32 or int64, on the weight's device
    values: Tensor  # [k], the weight's dtype and device


class Sum(NamedTuple):
    """What a part's values are to become: base + Σ α · (value − base), of a few adapters in this order."""

    values: tuple[Tensor, ...]  # of each adapter, the weight's dtype and device
    places: tuple[Tensor, ...]  # of each [k], int32: where in its values that of each position is; -1 where it has none
    strengths: tuple[float, ...]  # of each its α

    @classmethod
    def of(cls, overlap: Overlap, parts: Sequence[tuple[Tensor, float]]) -> "Sum":
        """Of adapters' values and strengths, where their positions meet."""
        places = []
        for (values, _), own in zip(parts, overlap.places, strict=True):
            place = torch.full_like(overlap.indices, -1, dtype=torch.int32)
            place[own.long()] = torch.arange(values.numel(), dtype=torch.int32, device=place.device)
            places.append(place)
        return cls(tuple(values for values, _ in parts), tuple(places), tuple(strength for _, strength in parts))


@dataclass(eq=False)
class WritePlan:
    """Writes, and room for what lies under them.

    stash: for each part [k], what was there, once `begun` says so.
    forms: what each weight was when the plan was made: it is for these, and no others.
    begun: int64 [1], the number of leading parts whose stash holds what was there and whose weight may have been written.
        A kernel moves it before it writes, so that after an interruption at any point it is known what to put back.
    sums: for each part the sum that its values are still to become, or None; `kernels.write_sums_` computes and removes them.
    """

    parts: tuple[Write, ...]
    stash: tuple[Tensor, ...]
    begun: np.ndarray[tuple[int], np.dtype[np.int64]]
    forms: tuple[WeightMemory, ...]
    sums: tuple[Sum | None, ...] = ()
    compiled: Any = None  # cpu/native.py's own form of it
    launches: dict[torch.device, Any] = field(default_factory=dict)  # gpu/ops.py's
    arrival: list[Any] = field(default_factory=list)  # gpu/waiting.py's: copies that are under way
    writer: "WritePlan | None" = None  # of `over`: the plan with these values, and that with this stash
    keeper: "WritePlan | None" = None

    @classmethod
    def of(cls, parts: Sequence[Write], sums: Sequence[Sum | None] = ()) -> "WritePlan":
        """A plan of these writes, its stash in one piece for each dtype and device."""
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for part in parts:
            key = (part.values.dtype, part.values.device)
            sizes[key] = sizes.get(key, 0) + part.values.numel()
        room = {(dtype, device): torch.empty(size, dtype=dtype, device=device) for (dtype, device), size in sizes.items()}
        stash = []
        for part in parts:
            key = (part.values.dtype, part.values.device)
            stash.append(room[key][: part.values.numel()])
            room[key] = room[key][part.values.numel() :]
        forms = tuple(WeightMemory.of(part.weight) for part in parts)
        return cls(tuple(parts), tuple(stash), np.zeros(1, dtype=np.int64), forms, tuple(sums))

    @functools.cached_property
    def on_cpu(self) -> bool:
        """Whether all of it is: where a weight is cannot change without its form."""
        return all(tensor.device.type == "cpu" for part in self.parts for tensor in part)

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the weights when the plan was made."""
        return [form.layout[2] for form in self.forms]

    def check(self) -> None:
        """Raise WeightChanged unless every weight is what it was when the plan was made: a third of a microsecond each."""
        for (weight, _, _), (storage, layout) in zip(self.parts, self.forms, strict=True):
            here = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
            if storage() is not weight.untyped_storage() or here != layout:
                raise WeightChanged("a weight was cast, moved or replaced since its entries were chosen")

    @property
    def nnz(self) -> int:
        """Entries that it writes."""
        return sum(part.indices.numel() for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of its positions, values and stash."""
        return sum(part.indices.nbytes + 2 * part.values.nbytes for part in self.parts)

    def over(self, other: "WritePlan") -> "WritePlan | None":
        """This plan with the stash of another that is active, if both write the very same positions (the same tensors in
        memory), so that it can be written over it; else None."""
        same = len(self.parts) == len(other.parts) and all(
            mine.weight is theirs.weight and mine.indices is theirs.indices
            for mine, theirs in zip(self.parts, other.parts, strict=False)
        )
        if not same or any(self.sums):
            return None
        keeper = other.keeper or other
        return WritePlan(self.parts, other.stash, other.begun, self.forms, writer=self, keeper=keeper)
