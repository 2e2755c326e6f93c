"""The data of the kernels: a switch as one flat list of writes over all tensors; the union and the sum of sparse tensors."""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ShiraError
from ..sparse.memory_order import memory_order
from ..sparse.tensor import bytes_of, has_memory

__all__ = [
    "Combination",
    "Combined",
    "Contribution",
    "Sum",
    "UnitedPositions",
    "WeightChanged",
    "WeightMemory",
    "Write",
    "WritePlan",
    "same_bits",
]


class WeightChanged(ShiraError):
    """A weight was cast, moved or replaced since its plan was made, or no longer holds what was written."""


class WeightMemory(NamedTuple):
    """The memory of a weight, and the layout of its entries there."""

    storage: Callable[[], Any]  # a weak reference: addresses and numbers are reused, an object is not
    layout: tuple[int, torch.dtype, torch.Size, tuple[int, ...]]  # address, dtype, shape, strides

    @classmethod
    def of(cls, weight: Tensor) -> "WeightMemory":
        storage = weakref.ref(weight.untyped_storage())
        return cls(storage, (weight.data_ptr(), weight.dtype, weight.shape, weight.stride()))

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight still has this memory, in this layout."""
        here = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        return self.storage() is weight.untyped_storage() and here == self.layout


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bits. So NaN can equal NaN, and 0.0 differs from -0.0."""
    return torch.equal(bytes_of(one), bytes_of(other))


class UnitedPositions(NamedTuple):
    """The union of the positions of several sparse tensors of one shape."""

    indices: Tensor  # [n], sorted and unique, in the dtype of the tensors' positions
    places: list[Tensor]  # for each tensor [k], int32: its own positions are indices[places]
    counts: Tensor  # [n], int32: how many tensors have each position


class Contribution(NamedTuple):
    """What one adapter changes in a tensor: strength · (values − base) for an overwrite, strength · values for a delta."""

    indices: Tensor  # [k], int32 or int64; or, if `takes_gaps` says so, gaps as in a file: uint8 or uint16 [at least k]
    values: Tensor  # [k], floating point; in the base's dtype for an overwrite
    strength: float
    is_delta: bool
    is_exact: bool  # entries that no other adapter changes get the value bit for bit


class Combination(NamedTuple):
    """Several adapters' changes to one tensor, to be combined by a method in float32, in their order, and rounded once."""

    weight: Tensor | None  # the base, `numel` entries of `dtype`; None: the base is zeros
    changes: Sequence[Contribution]
    dtype: torch.dtype  # of the result
    method: str
    numel: int
    hidden: tuple[Tensor, Tensor] | None = None  # positions [h], sorted, where the weight is not the base, and the base there

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of it."""
        yield from (tensor for change in self.changes for tensor in change[:2])
        yield from (tensor for tensor in (self.weight, *(self.hidden or ())) if tensor is not None)


class Combined(NamedTuple):
    """The result of several changes to a tensor."""

    indices: Tensor  # [n], the positions of all changes, sorted and unique
    values: Tensor  # [n], the new values, in the base's dtype
    base: Tensor  # [n], the base's values at these positions; empty if they were not wanted
    under: list[Tensor]  # for each overwrite [k]: the base's values at its positions; for a delta: not to be used; like `base`
    is_finite: bool  # whether no new value is NaN or infinite


class Write(NamedTuple):
    """A write to one tensor."""

    weight: Tensor  # any shape, contiguous
    indices: Tensor  # [k], int32 or int64, on the weight's device
    values: Tensor  # [k], the weight's dtype and device

    def check(self, *, can_reach: bool) -> None:
        """Raise IndexError for what a kernel does not check, and what would corrupt memory: layouts, dtypes and lengths.

        can_reach: whether the kernel can write to these tensors' devices.
        """
        weight, indices, values = self
        plain = weight.is_contiguous() and indices.is_contiguous() and values.is_contiguous()
        fits = values.dtype == weight.dtype and indices.dtype in (torch.int32, torch.int64) and indices.shape == values.shape
        if not (plain and fits and can_reach and all(map(has_memory, self)) and weight.itemsize in (1, 2, 4, 8)):
            raise IndexError(
                f"cannot write {values.dtype} {list(values.shape)} on {values.device} into {weight.dtype} {list(weight.shape)} "
                f"on {weight.device}"
            )


class Sum(NamedTuple):
    """The sum that a write's values will become: base + Σ α · (value − base) over a few adapters, in this order."""

    values: tuple[Tensor, ...]  # for each adapter its values, in the weight's dtype, on its device
    places: tuple[Tensor, ...]  # for each adapter [k], int32: the place of each position's value in its values; -1: none
    strengths: tuple[float, ...]  # for each adapter its α

    @classmethod
    def of(cls, union: UnitedPositions, terms: Sequence[tuple[Tensor, float]]) -> "Sum":
        """The sum of adapters at the union of their positions. terms: the values and the strength of each adapter."""
        places = []
        for (values, _), own in zip(terms, union.places, strict=True):
            place = torch.full_like(union.indices, -1, dtype=torch.int32)
            place[own.long()] = torch.arange(values.numel(), dtype=torch.int32, device=place.device)
            places.append(place)
        return cls(tuple(values for values, _ in terms), tuple(places), tuple(strength for _, strength in terms))


@dataclass(eq=False)
class WritePlan:
    """Writes, and memory for the old values of the entries that they change.

    stash: for each write [k], the old values; valid for the first `begun` writes.
    weights: for each write the model's own tensor: its weight, or that of which its weight is a contiguous view.
    memories: the memory of each of these when the plan was made. The plan is valid for these weights only.
    begun: int64 [1], the number of leading writes whose old values are in the stash and whose weight may have been written.
        A kernel sets it before it writes. So after an interruption at any point it says what must be restored.
    sums: for each write the sum that its values will become, or None; `kernels.write_sums_` computes and removes the sums.
    """

    writes: tuple[Write, ...]
    stash: tuple[Tensor, ...]
    begun: np.ndarray[tuple[int], np.dtype[np.int64]]
    weights: tuple[Tensor, ...]
    memories: tuple[WeightMemory, ...]
    sums: tuple[Sum | None, ...] = ()
    compiled: Any = None  # the plan as cpu/native.py needs it
    launches: dict[torch.device, Any] = field(default_factory=dict)  # the plan as gpu/ops.py needs it
    arrival: list[Any] = field(default_factory=list)  # copies in progress, of gpu/host_memory.py
    values_from: "WritePlan | None" = None  # set by `over`: the plan with these values
    stash_from: "WritePlan | None" = None  # set by `over`: the plan with this stash

    @classmethod
    def of(
        cls, writes: Sequence[Write], sums: Sequence[Sum | None] = (), weights: Sequence[Tensor] | None = None
    ) -> "WritePlan":
        """A plan of these writes. Its stash is one piece of memory for each dtype and device.

        weights: for each write the model's own tensor; None: those that are written.
        """
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for write in writes:
            key = (write.values.dtype, write.values.device)
            sizes[key] = sizes.get(key, 0) + write.values.numel()
        room = {(dtype, device): torch.empty(size, dtype=dtype, device=device) for (dtype, device), size in sizes.items()}
        stash = []
        for write in writes:
            key = (write.values.dtype, write.values.device)
            stash.append(room[key][: write.values.numel()])
            room[key] = room[key][write.values.numel() :]
        held = tuple(write.weight for write in writes) if weights is None else tuple(weights)
        memories = tuple(WeightMemory.of(weight) for weight in held)
        return cls(tuple(writes), tuple(stash), np.zeros(1, dtype=np.int64), held, memories, tuple(sums))

    @functools.cached_property
    def on_cpu(self) -> bool:
        """Whether all tensors are on the CPU. Cached, because `check` refuses a weight that has moved."""
        return all(tensor.device.type == "cpu" for write in self.writes for tensor in write)

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        """id of a weight that is written -> the number of its write. Each weight is written once, and lives with the plan."""
        return {id(write.weight): number for number, write in enumerate(self.writes)}

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the weights when the plan was made."""
        return [memory.layout[2] for memory in self.memories]

    def check(self) -> None:
        """Raise WeightChanged if a weight was cast, moved or replaced since the plan was made. Takes 0.3 µs a weight."""
        for weight, (storage, layout) in zip(self.weights, self.memories, strict=True):  # `is_of`, without a call
            here = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
            if storage() is not weight.untyped_storage() or here != layout:
                raise WeightChanged("a weight was cast, moved or replaced since its entries were chosen")

    def positions(self, number: int) -> Tensor:
        """The positions of a write in its model's own tensor [k], in C order of that tensor's shape."""
        _, _, shape, strides = self.memories[number].layout
        order, places = memory_order(shape, strides), self.writes[number].indices
        return places if order is None else order.positions(places)

    def over(self, other: "WritePlan") -> "WritePlan | None":
        """This plan with the stash of an active plan, so that `kernels.write_` can replace that plan's values.

        Returns None if the two do not have the same positions (the same tensors in memory), or if this plan has sums.
        """
        same = len(self.writes) == len(other.writes) and all(
            mine.weight is theirs.weight and mine.indices is theirs.indices
            for mine, theirs in zip(self.writes, other.writes, strict=False)
        )
        if not same or any(self.sums):
            return None
        stash_from = other.stash_from or other
        return WritePlan(
            self.writes, other.stash, other.begun, self.weights, self.memories, values_from=self, stash_from=stash_from
        )
