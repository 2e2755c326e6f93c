"""Masks of masks: what several choose together, what another adapter holds.

A set of masks has the budget of one. The masks in it are asked for more or fewer entries until what remains of them fills
the budget, which takes five to twenty times as long as they do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MaskError
from .selecting import Mask, call, resolve

__all__ = ["difference", "from_adapter", "intersection", "union"]


def union(weight: Tensor, k: int, of: Sequence[str | Mask] = ("wm", "snip"), **inputs: Any) -> Tensor:
    """Positions of entries that any of several masks chooses, each asked for equally many (ours).

    of: names or functions of masks. If each chooses the top of a score, less than their number of the budget is left.
    Returns int64 [at most k], sorted, flat in C order. Raises MaskError if they do not fit together, or one of them does.
    """
    chosen = _each(of, weight, inputs)

    def joined(count: int) -> Tensor:
        return _all([choose(count) for choose in chosen])

    return _fill(joined, k // len(chosen), k, k)


def intersection(weight: Tensor, k: int, of: Sequence[str | Mask] = ("wm", "snip"), **inputs: Any) -> Tensor:
    """Positions of entries that all of several masks choose, each asked for equally many (ours).

    of: names or functions of masks. If each chooses the top of a score, less than their number of the budget is left.
    Returns int64 [at most k], sorted, flat in C order. Raises MaskError if one of them does.
    """
    chosen = _each(of, weight, inputs)

    def common(count: int) -> Tensor:
        first, *others = (choose(count) for choose in chosen)
        for other in others:
            first = first[torch.isin(first, other, assume_unique=True)]
        return first

    return _fill(common, k, weight.numel(), k)


def difference(weight: Tensor, k: int, of: Sequence[str | Mask] = ("snip", "wm"), **inputs: Any) -> Tensor:
    """Positions of one mask's best entries that no other mask chooses with k (SHiRA's WM-non-overlap, arXiv 2406.13175).

    With one mask twice it is "the next k", as the paper's second non-overlapping WM adapter.

    of: names or functions of masks, the one that chooses first.
    Returns int64 [at most k], sorted, flat in C order. Raises MaskError if one of them does.
    """
    first, *others = _each(of, weight, inputs)
    taken = _all([choose(k) for choose in others])

    def left(count: int) -> Tensor:
        positions = first(count)
        return positions[~torch.isin(positions, taken, assume_unique=True)]

    return _fill(left, k, min(weight.numel(), k + taken.numel()), k)


def from_adapter(weight: Tensor, k: int, name: str, adapter: Adapter | None = None) -> Tensor:
    """Positions of the entries that another adapter holds in the tensor of the same name (ours).

    adapter: `functools.partial(masks.from_adapter, adapter=shira.load("poet.safetensors"))`.
    Returns int64 [what it holds], sorted, flat in C order.
    Raises MaskError if it holds none of this tensor, another shape, or more than k.
    """
    if not isinstance(adapter, Adapter):
        raise MaskError(
            "from_adapter needs an adapter: functools.partial(masks.from_adapter, adapter=shira.load(…)), found "
            f"{type(adapter).__name__}"
        )
    if name not in adapter.tensors:
        raise MaskError(f"the adapter {adapter.name!r} holds nothing of it; leave it out of the targets")
    tensor = adapter.tensors[name]
    if tensor.shape != tuple(weight.shape):
        raise MaskError(f"the adapter {adapter.name!r} has it of shape {list(tensor.shape)}, here it is {list(weight.shape)}")
    if tensor.nnz > k:
        raise MaskError(
            f"the adapter {adapter.name!r} holds {tensor.nnz} of its entries, but the budget is {k}; use a density of at least "
            f"{tensor.nnz / weight.numel():.6f}"
        )
    return tensor.indices.long().to(weight.device)


def _all(parts: list[Tensor]) -> Tensor:
    """Sorted positions that are in any part."""
    positions: Tensor = torch.cat(parts).unique()
    return positions


def _each(of: Sequence[str | Mask], weight: Tensor, inputs: dict[str, Any]) -> list[Callable[[int], Tensor]]:
    """For each mask, two or more, a function from a count to its positions, int64 and sorted."""
    if isinstance(of, str) or len(of) < 2:
        raise MaskError(f"a set of masks needs two or more of them, found {of!r}")

    def chooser(mask: Mask) -> Callable[[int], Tensor]:
        def choose(count: int) -> Tensor:
            answer: Tensor = call(mask, inputs | {"weight": weight, "k": count})
            return answer.reshape(-1).nonzero().view(-1) if answer.dtype == torch.bool else answer.long().sort().values

        return choose

    return [chooser(resolve(mask)[1]) for mask in of]


def _fill(at: Callable[[int], Tensor], count: int, limit: int, k: int) -> Tensor:
    """The largest set of at most k that `at` gives for a count up to the limit; its size must not fall as the count grows.

    From `count`, which gives at most k, by doubling; then by bisection, every other step where a straight line would meet k.
    """
    low, best = count, at(count)
    high, above = low, best
    while above.numel() <= k:
        low, best = high, above
        if best.numel() == k or high == limit:
            return best
        high = min(max(1, 2 * high), limit)
        above = at(high)
    most, straight = above.numel(), True
    while high - low > 1 and best.numel() < k:
        share = (k - best.numel() + 0.5) / (most - best.numel()) if straight else 0.5
        middle = min(max(low + 1, low + int(share * (high - low))), high - 1)
        found = at(middle)
        if found.numel() <= k:
            low, best = middle, found
        else:
            high, most = middle, found.numel()
        straight = not straight
    return best
