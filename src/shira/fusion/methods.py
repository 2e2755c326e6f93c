"""Methods of fusion: how the changes of several adapters at one entry become one. Each is a pure function on one tensor.

A change is α · (value − base), of one adapter at one entry. A method may first thin out each adapter separately. Then it
combines what is left:

    thin(part, **options) -> (kept [j], factor)     kept: numbers of the part's k changes that stay; factor: multiplies them
    combine(changes, union) -> total [n]          changes: [k] for each adapter, in a fixed order; union: their positions

Both work on sorted positions, and nothing is as large as the tensor. An entry whose changes are all thinned out keeps the value
of the base. A change at an entry that no other adapter changes is returned as it is.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError, did_you_mean
from ..kernels import UnitedPositions, overwrite_
from ..sparse.positions import coin, seed_of
from ..sparse.tensor import SHA256, fingerprint
from ..sparse.topk import top_k
from ..texts import shown

__all__ = ["METHODS", "AdapterChange", "Method", "drop", "elect", "largest", "mean", "resolve", "total", "trim"]


class AdapterChange(NamedTuple):
    """One adapter's share of one tensor."""

    name: str  # the tensor's
    indices: Tensor  # [k], positions in the tensor
    values: Tensor  # [k], the adapter's
    change: Tensor  # [k], α · (value − base), float32 (float64 for float64)
    places: Tensor  # [k], rising, where its positions are in the union of all adapters' positions


def total(changes: Sequence[Tensor], union: UnitedPositions) -> Tensor:
    """The sum of the changes (SHiRA §3.2, arXiv 2406.13175; task arithmetic, arXiv 2212.04089, which negates by α < 0)."""
    added = changes[0].new_zeros(union.indices.numel())
    for change, place in zip(changes, union.places, strict=True):
        _add_(added, place, change)
    return added


def _add_(sums: Tensor, place: Tensor, change: Tensor) -> None:
    """sums[place] += change, for places that differ. (On a GPU `index_add_` would add atomically and lose subnormals.)"""
    overwrite_(sums, place, sums.index_select(0, place) + change)


def mean(changes: Sequence[Tensor], union: UnitedPositions) -> Tensor:
    """The mean of the changes at each entry (the stitching of Localize-and-Stitch, arXiv 2408.13656)."""
    return total(changes, union).div_(union.counts)


def largest(changes: Sequence[Tensor], union: UnitedPositions) -> Tensor:
    """The change with the largest magnitude at each entry; among equal ones the first."""
    best = changes[0].new_zeros(union.indices.numel())
    for change, place in zip(changes, union.places, strict=True):
        held = best.index_select(0, place)
        overwrite_(best, place, torch.where(change.abs() > held.abs(), change, held))
    return best


def elect(changes: Sequence[Tensor], union: UnitedPositions) -> Tensor:
    """The mean of the changes with the sign of their sum; 0 where the sum is 0 (TIES, steps 2 and 3, arXiv 2306.01708)."""
    sign = total(changes, union).sign_()
    agreed, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, place in zip(changes, union.places, strict=True):
        agrees = change.sign() == sign.index_select(0, place)
        _add_(agreed, place, change * agrees)
        _add_(count, place, agrees.to(sign.dtype))
    return agreed.div_(count.clamp_(min=1))


def trim(part: AdapterChange, density: float = 0.2) -> tuple[Tensor, float]:
    """Keep the largest changes (TIES, step 1, arXiv 2306.01708).

    density: the share of the adapter's entries in the tensor to keep, above 0, at most 1. The paper ranks all changes of a
    model in one list. Here each tensor is ranked separately, so files need not be read twice.
    """
    kept = math.ceil(density * part.change.numel())
    return top_k(part.change.abs().nan_to_num_(nan=math.inf, posinf=math.inf), kept), 1.0


def drop(part: AdapterChange, drop: float = 0.5, seed: int = 0) -> tuple[Tensor, float]:
    """Drop each change with a probability, and scale up the others to keep the expected sum (DARE, arXiv 2311.03099).

    drop: the probability, at least 0, below 1. What is dropped depends only on the seed, the tensor's name, the positions and
    the adapter's values. It does not depend on file names or on the machine.
    """
    seed = seed_of(seed, f"{part.name}\n{fingerprint(part.values, SHA256)}")  # whose draws may not change
    return coin(part.indices, 1 - drop, seed).nonzero().view(-1), 1 / (1 - drop)


RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "density": ("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "drop": ("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "seed": ("a whole number", lambda value: isinstance(value, int)),
}


class Method(NamedTuple):
    """A method of fusion with its options. Equal methods give equal results."""

    name: str
    options: tuple[tuple[str, float], ...] = ()

    @property
    def thins(self) -> bool:
        """Whether each adapter's changes are thinned out before they are combined."""
        return METHODS[self.name].thin is not None

    def thin(self, part: AdapterChange) -> tuple[AdapterChange, float]:
        """What stays of a part, and the factor by which its changes were multiplied."""
        function = METHODS[self.name].thin
        if function is None:
            return part, 1.0
        kept, factor = function(part, **dict(self.options))
        return AdapterChange(
            part.name, part.indices[kept], part.values[kept], factor * part.change[kept], part.places[kept]
        ), factor

    def combine(self, changes: Sequence[Tensor], union: UnitedPositions) -> Tensor:
        """The total change [n] at the positions of the union."""
        return METHODS[self.name].combine(changes, union)

    def described(self) -> dict[str, Any]:
        """The method as metadata hold it: {"method": "ties", "density": 0.2}."""
        return {"method": self.name, **dict(self.options)}


class _Steps(NamedTuple):
    combine: Callable[[Sequence[Tensor], UnitedPositions], Tensor]
    thin: Callable[..., tuple[Tensor, float]] | None = None


METHODS: Mapping[str, _Steps] = {
    "sum": _Steps(total),
    "mean": _Steps(mean),
    "max": _Steps(largest),
    "ties": _Steps(elect, trim),
    "dare": _Steps(total, drop),
}


def resolve(name: str, options: Mapping[str, Any]) -> Method:
    """The method of this name, its options completed and checked. Raises AdapterError if one is unknown or out of range."""
    if not isinstance(name, str) or name not in METHODS:
        hint = "; to negate an adapter, give it a negative strength" if name in ("negation", "negate") else ""
        raise AdapterError(f"unknown fusion method {shown(name)}; {did_you_mean(str(name), METHODS)}{hint}")
    thin = METHODS[name].thin
    chosen = {key: p.default for key, p in inspect.signature(thin).parameters.items() if key != "part"} if thin else {}
    for key, value in options.items():
        if key not in chosen:
            raise AdapterError(f"fusion method {name!r} has no option {key!r}; {did_you_mean(key, chosen)}")
        expected, holds = RANGES[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
            raise AdapterError(f"{key} must be {expected}, found {shown(value)}")
        chosen[key] = value if key == "seed" else float(value)
    return Method(name, tuple(chosen.items()))
