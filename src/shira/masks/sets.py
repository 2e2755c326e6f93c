"""Sets of positions: of several masks together, or as another adapter holds them.

A set of masks has the budget of one. The masks in it are asked for more or fewer entries until what remains of them fills
the budget, which takes five to twenty times as long as they do.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MaskError

__all__ = ["Chooser", "common", "from_adapter", "joined", "left"]

Chooser = Callable[[int], Tensor]  # from a count to a mask's positions, int64 and sorted


def joined(chosen: Sequence[Chooser], k: int) -> Tensor:
    """Positions that any of several masks chooses, each asked for equally many: int64 [at most k]."""
    return _fill(lambda count: _all([choose(count) for choose in chosen]), k // len(chosen), k, k)


def common(chosen: Sequence[Chooser], k: int, limit: int) -> Tensor:
    """Positions that all of several masks choose, each asked for equally many, up to a limit: int64 [at most k]."""

    def at(count: int) -> Tensor:
        first, *others = (choose(count) for choose in chosen)
        for other in others:
            first = first[torch.isin(first, other, assume_unique=True)]
        return first

    return _fill(at, k, limit, k)


def left(chosen: Sequence[Chooser], k: int, limit: int) -> Tensor:
    """The first mask's positions that no other chooses with k; it is asked for more, up to a limit: int64 [at most k]."""
    first, *others = chosen
    taken = _all([choose(k) for choose in others])

    def at(count: int) -> Tensor:
        positions = first(count)
        return positions[~torch.isin(positions, taken, assume_unique=True)]

    return _fill(at, k, min(limit, k + taken.numel()), k)


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
