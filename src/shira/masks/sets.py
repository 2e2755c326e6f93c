"""Sets of positions: those of several masks combined, or those that another adapter holds.

A set of masks has the budget of one mask. Its masks are asked for more or fewer entries until their combination fills the
budget. This takes five to twenty times as long as the masks alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MaskError

__all__ = ["Chooser", "common", "from_adapter", "joined", "positions_in", "remaining"]

Chooser = Callable[[int], Tensor]  # from a count to a mask's positions, int64 and sorted


def positions_in(answer: Any, weight: Tensor, k: int) -> Tensor:
    """The positions in a mask's answer, int64 [at most k], sorted. Raises MaskError if the answer is not valid."""
    if not isinstance(answer, Tensor) or answer.dtype not in (torch.bool, torch.int32, torch.int64):
        found = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise MaskError(f"expected a tensor of integer positions or a boolean mask, found {found}")
    if answer.is_meta:
        raise MaskError("it returned positions without data, on the meta device")
    if answer.dtype == torch.bool:
        if answer.shape != weight.shape:
            raise MaskError(f"expected a boolean mask of shape {list(weight.shape)}, found {list(answer.shape)}")
        answer = answer.reshape(-1).nonzero()
    indices: Tensor = answer.to(weight.device, torch.int64).reshape(-1).sort().values
    if indices.numel() > k:
        raise MaskError(f"the budget is {k} positions, it returned {indices.numel()}")
    if bool((indices[1:] == indices[:-1]).any()):
        raise MaskError("it returned a position twice")
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= weight.numel()):
        raise MaskError(f"positions must be from 0 to {weight.numel() - 1}, found {int(indices[0])} to {int(indices[-1])}")
    return indices


def joined(chosen: Sequence[Chooser], k: int) -> Tensor:
    """The positions that any of several masks chooses, each asked for equally many. Returns int64 [at most k]."""
    return _fill(lambda count: _all([choose(count) for choose in chosen]), k // len(chosen), k, k)


def common(chosen: Sequence[Chooser], k: int, limit: int) -> Tensor:
    """The positions that all of several masks choose, each asked for equally many, up to `limit`. Returns int64 [at most k]."""

    def at(count: int) -> Tensor:
        first, *others = (choose(count) for choose in chosen)
        for other in others:
            first = first[torch.isin(first, other, assume_unique=True)]
        return first

    return _fill(at, k, limit, k)


def remaining(chosen: Sequence[Chooser], k: int, limit: int) -> Tensor:
    """The positions of the first mask that no other mask chooses when asked for k. Returns int64 [at most k].

    The first mask is asked for more entries until k remain, but for at most `limit`.
    """
    first, *others = chosen
    taken = _all([choose(k) for choose in others])

    def at(count: int) -> Tensor:
        positions = first(count)
        return positions[~torch.isin(positions, taken, assume_unique=True)]

    return _fill(at, k, min(limit, k + taken.numel()), k)


def from_adapter(weight: Tensor, k: int, name: str, adapter: Adapter | None = None) -> Tensor:
    """Positions of the entries that another adapter holds in the tensor of the same name (ours).

    adapter: set it with `functools.partial(masks.from_adapter, adapter=shira.load("poet.safetensors"))`.
    Returns int64 [entries that the adapter holds], sorted, flat in C order.
    Raises MaskError if the adapter lacks this tensor, has it in another shape, or holds more than k of its entries.
    """
    if not isinstance(adapter, Adapter):
        raise MaskError(
            "from_adapter needs an adapter: functools.partial(masks.from_adapter, adapter=shira.load(…)), found "
            f"{type(adapter).__name__}"
        )
    adapter.check()
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


def _all(chosen: list[Tensor]) -> Tensor:
    """The positions that are in any of these, sorted and unique."""
    positions: Tensor = torch.cat(chosen).unique()
    return positions


def _fill(at: Callable[[int], Tensor], count: int, limit: int, k: int) -> Tensor:
    """The largest set of at most k that `at` gives for a count up to `limit`. The set's size must not fall as the count grows.

    The search starts at `count`, which gives at most k, and doubles it until the set is too large. Then it bisects; every other
    step goes to where linear interpolation expects k.
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
