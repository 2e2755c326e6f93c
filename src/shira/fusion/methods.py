"""How the changes of several adapters become one where they meet: each method a pure function on the entries of one tensor.

A change is α · (value − base): of one adapter, at one entry. A method first may thin out each adapter by itself, then combines
what is left:

    thin(part, **options) -> (kept [j], factor)     which of the part's k changes stay, by place; and what to multiply them by
    combine(changes, overlap) -> total [n]          changes: of each adapter [k], in a fixed order; overlap: where they meet

Both work on sorted positions; nothing is ever as large as the tensor. An entry whose changes are all thinned out is the base's.
A change that meets no other comes out as it is.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError, did_you_mean
from ..kernels import Overlap, overwrite_
from ..sparse.positions import coin, seed_of
from ..sparse.tensor import SHA256, fingerprint
from ..sparse.topk import top_k
from ..texts import shown

__all__ = ["METHODS", "Method", "Share", "drop", "elect", "largest", "mean", "resolve", "total", "trim"]


class Share(NamedTuple):
    """One adapter's share of one tensor."""

    name: str  # the tensor's
    indices: Tensor  # [k], positions in the tensor
    values: Tensor  # [k], the adapter's
    change: Tensor  # [k], α · (value − base), float32
    places: Tensor  # [k], rising, where it meets the other adapters


def total(changes: Sequence[Tensor], overlap: Overlap) -> Tensor:
    """The sum of the changes (SHiRA §3.2, arXiv 2406.13175; task arithmetic, arXiv 2212.04089, which negates by α < 0)."""
    added = changes[0].new_zeros(overlap.indices.numel())
    for change, place in zip(changes, overlap.places, strict=True):
        _add_(added, place, change)
    return added


def _add_(sums: Tensor, place: Tensor, change: Tensor) -> None:
    """sums[place] += change, of places that differ. Not by index_add_: on a GPU that adds atomically, and loses subnormals."""
    overwrite_(sums, place, sums.index_select(0, place) + change)


def mean(changes: Sequence[Tensor], overlap: Overlap) -> Tensor:
    """The unique changes summed, the shared ones averaged (the stitching of Localize-and-Stitch, arXiv 2408.13656)."""
    return total(changes, overlap).div_(overlap.counts)


def largest(changes: Sequence[Tensor], overlap: Overlap) -> Tensor:
    """The change of the largest magnitude; among equal ones the first."""
    best = changes[0].new_zeros(overlap.indices.numel())
    for change, place in zip(changes, overlap.places, strict=True):
        held = best.index_select(0, place)
        overwrite_(best, place, torch.where(change.abs() > held.abs(), change, held))
    return best


def elect(changes: Sequence[Tensor], overlap: Overlap) -> Tensor:
    """The mean of the changes that have their sum's sign; 0 where that is 0 (TIES, steps 2 and 3, arXiv 2306.01708)."""
    sign = total(changes, overlap).sign_()
    agreed, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, place in zip(changes, overlap.places, strict=True):
        agrees = change.sign() == sign.index_select(0, place)
        _add_(agreed, place, change * agrees)
        _add_(count, place, agrees.to(sign.dtype))
    return agreed.div_(count.clamp_(min=1))


def trim(part: Share, density: float = 0.2) -> tuple[Tensor, float]:
    """Keep the largest changes, this share of the adapter's entries in the tensor (TIES, step 1, arXiv 2306.01708).

    density: above 0, at most 1. The paper ranks a model's whole change at once; tensor by tensor needs no second reading.
    """
    kept = math.ceil(density * part.change.numel())
    return top_k(part.change.abs().nan_to_num_(nan=math.inf, posinf=math.inf), kept), 1.0


def drop(part: Share, drop: float = 0.5, seed: int = 0) -> tuple[Tensor, float]:
    """Drop each change with a probability, and scale the others up so that the expectation stays (DARE, arXiv 2311.03099).

    drop: the probability, at least 0, below 1. What is dropped depends on the seed, the tensor's name, the adapter's values and
    the positions alone: not on file names, nor on the machine.
    """
    seed = seed_of(seed, f"{part.name}\n{fingerprint(part.values, SHA256)}")  # whose draws may not change
    return coin(part.indices, 1 - drop, seed).nonzero().view(-1), 1 / (1 - drop)


RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "density": ("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "drop": ("a number from 0 to below 1", lambda value: 0 <= value < 1),
    "seed": ("a whole number", lambda value: isinstance(value, int)),
}


class Method(NamedTuple):
    """A method of fusion with its options; two that are equal give the same result."""

    name: str
    options: tuple[tuple[str, float], ...] = ()

    @property
    def thins(self) -> bool:
        """Whether an adapter's changes are thinned out before they meet others."""
        return METHODS[self.name].thin is not None

    def thin(self, part: Share) -> tuple[Share, float]:
        """What stays of a part, and by what its changes were multiplied."""
        function = METHODS[self.name].thin
        if function is None:
            return part, 1.0
        kept, factor = function(part, **dict(self.options))
        return Share(part.name, part.indices[kept], part.values[kept], factor * part.change[kept], part.places[kept]), factor

    def combine(self, changes: Sequence[Tensor], overlap: Overlap) -> Tensor:
        """The total change [n] at the entries of the overlap."""
        return METHODS[self.name].combine(changes, overlap)

    def described(self) -> dict[str, Any]:
        """As metadata hold it: {"method": "ties", "density": 0.2}."""
        return {"method": self.name, **dict(self.options)}


class _Steps(NamedTuple):
    combine: Callable[[Sequence[Tensor], Overlap], Tensor]
    thin: Callable[..., tuple[Tensor, float]] | None = None


METHODS: Mapping[str, _Steps] = {
    "sum": _Steps(total),
    "mean": _Steps(mean),
    "max": _Steps(largest),
    "ties": _Steps(elect, trim),
    "dare": _Steps(total, drop),
}


def resolve(name: str, options: Mapping[str, Any]) -> Method:
    """A method by its name, options completed and checked. Raises AdapterError for what is unknown or out of range."""
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
