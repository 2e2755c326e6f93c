"""Budgets: how many entries train, for each tensor or over the whole model.

A budget is a density (a share of a tensor's entries), the rank of a LoRA of the same size, or a total number. `plan` turns
it into a count for each tensor. Over the model, it turns it into one count that all tensors share, and a least number (a floor)
for each. `Pool` then chooses the entries with the highest scores.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError
from ..sparse.positions import index_dtype
from ..sparse.topk import top_k
from ..texts import as_share, plain_number, shown

__all__ = ["BudgetPlan", "Pool", "budget", "plan", "scores_without", "share_out"]

ABSENT = -math.inf  # the score of an entry that must not train

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BudgetPlan:
    """How many entries train. Each tensor is either in `counts` or in `floors`.

    counts: tensor name -> how many of its entries train.
    shared: how many entries train in all tensors of `floors` together.
    floors: tensor name -> how many of its entries train at least.
    """

    counts: dict[str, int]
    shared: int
    floors: dict[str, int]


def budget(shape: Shape, *, density: float | None = None, rank: int | None = None) -> int:
    """How many entries of a tensor may train.

    density: the share, so density · entries, rounded, and at least 1. rank: rank · (out + in), the size of a LoRA of that rank.
    In a stack [experts, out, in] the rank counts for each expert. A rank allows all entries of a vector, because LoRA does not
    adapt vectors.
    Raises MaskError unless exactly one is given, 0 < density ≤ 1, rank ≥ 1, and the rank's count fits the tensor.
    """
    if (density is None) == (rank is None):
        raise MaskError(_one_of(density=density, rank=rank))
    density, rank, numel = plain_number(density), plain_number(rank), math.prod(shape)
    if rank is not None:
        if len(shape) < 2:
            return numel
        experts, sides = math.prod(shape[:-2]), sum(shape[-2:])
        most = numel // max(1, experts * sides)
        if not _whole(rank) or not 1 <= rank <= most:
            raise MaskError(f"rank must be from 1 to {most} for shape {list(shape)}, found {shown(rank)}")
        return rank * experts * sides
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise MaskError(f"density must be above 0 and at most 1, found {shown(density)}{as_share(density)}")
    return max(1, round(float(density) * numel))


def _one_of(**budgets: float | None) -> str:
    given = [f"{name}={value}" for name, value in budgets.items() if value is not None]
    if not given:
        return f"no budget is given; give one of {', '.join(f'{name}=' for name in budgets)}"
    return f"give one of them: found {' and '.join(given)}"


def plan(
    shapes: Mapping[str, Shape],
    *,
    density: float | None = None,
    rank: int | None = None,
    total: int | None = None,
    scope: str = "tensor",
    floor: float = 0.0,
    overrides: Mapping[str, Any] | None = None,
    avoided: Mapping[str, int] | None = None,
) -> BudgetPlan:
    """The counts for tensors of these shapes. It checks that they fit.

    density, rank, total: exactly one of them. `total` is exact and includes the tensors with overrides. The rest of it is
        shared out in proportion to the entries that may train; with scope "tensor" each tensor gets at least one.
    scope: "tensor": each tensor has its own count. "model": all tensors share one count, which is `total` or the sum of
        their own counts.
    floor: with scope "model", the share of its own count that each tensor keeps, 0 to 1; the number is rounded up.
    overrides: tensor name -> its own budget: a density, or {"density": …}, {"rank": …} or {"total": …}. Such a tensor
        does not share in the count of the others.
    avoided: tensor name -> how many of its entries must not train.

    Raises MaskError, with the numbers, if a budget does not fit.
    """
    if sum(value is not None for value in (density, rank, total)) != 1:
        raise MaskError(_one_of(density=density, rank=rank, total=total))
    if scope not in ("tensor", "model"):
        raise MaskError(f"scope must be 'tensor' or 'model', found {scope!r}")
    if not isinstance(floor, int | float) or not 0 <= floor <= 1:
        raise MaskError(
            f"floor must be from 0 to 1, a share of what a tensor would get by itself, found {floor!r}{as_share(floor)}"
        )
    if floor and scope == "tensor":
        raise MaskError(f"floor={floor} has a meaning with scope='model' only; every tensor has its own budget now")
    empty = next((name for name, shape in shapes.items() if not math.prod(shape)), None)
    if empty is not None:
        raise MaskError(f"tensor '{empty}' has no entries, its shape is {list(shapes[empty])}; leave it out of the targets")
    avoided, own = avoided or {}, {}
    free = {name: math.prod(shape) - avoided.get(name, 0) for name, shape in shapes.items()}
    for name, value in (overrides or {}).items():
        own[name] = _count_of(name, _override, shapes[name], value)
        _check_room(name, own[name], shapes[name], avoided)
    others = {name: shape for name, shape in shapes.items() if name not in own}
    if density is not None:
        budget((1,), density=density)  # a wrong density is not the error of one tensor
    if total is None:
        counts = {name: _count_of(name, budget, shape, density=density, rank=rank) for name, shape in others.items()}
    else:
        sizes = {name: free[name] for name in others}
        left = _left(total, own, sizes, least=1 if scope == "model" else len(others))
        counts = share_out(left, sizes, dict.fromkeys(sizes, 1 if left >= len(sizes) else 0))
    if scope == "tensor":
        for name, count in counts.items():
            _check_room(name, count, shapes[name], avoided)
        return BudgetPlan(own | counts, 0, {})
    floors = {name: min(count, math.ceil(floor * count)) for name, count in counts.items()}
    for name, count in floors.items():
        _check_room(name, count, shapes[name], avoided)
    shared, room = sum(counts.values()), sum(free[name] for name in others)
    if shared > room:
        raise MaskError(f"{shared:,} entries are to train over the model, but only {room:,} may: {_numbers(others, avoided)}")
    return BudgetPlan(own, shared, floors)


def share_out(total: int, sizes: Mapping[str, int], floors: Mapping[str, int]) -> dict[str, int]:
    """Share out `total` in proportion to `sizes`, with no result below its floor.

    The results add up to `total`: the largest remainders are rounded up, the first ones among equals.
    The floors must not add up to more than `total`.
    """
    at_floor: set[str] = set()
    while True:
        others = [name for name in sizes if name not in at_floor]
        left, size = total - sum(floors[name] for name in at_floor), max(1, sum(sizes[name] for name in others))
        below = {name for name in others if left * sizes[name] < floors[name] * size}
        if not below:
            break
        at_floor |= below
    counts = {name: floors[name] if name in at_floor else left * sizes[name] // size for name in sizes}
    remainders = sorted(others, key=lambda name: -(left * sizes[name] % size))
    for name in remainders[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def scores_without(scores: Tensor, avoid: Tensor | None) -> Tensor:
    """A flat float32 copy of the scores, with `ABSENT` at the flat positions `avoid`."""
    flat = scores.detach().to(torch.float32, copy=True).reshape(-1)
    if avoid is not None:
        flat[avoid.to(flat.device, torch.int64)] = ABSENT
    return flat


class Pool:
    """Chooses the entries with the highest scores over many tensors, which come one at a time, in any order.

    First each tensor's floor is filled with its best entries. The rest of `shared` goes to the best of all other entries, as if
    all scores were ranked in one list in the order of `floors`: among equal scores the first tensor wins, then the first
    position. The pool holds at most 2 · shared entries, whatever the model's size.
    """

    def __init__(self, shared: int, floors: Mapping[str, int]) -> None:
        self.floors = dict(floors)
        self.open = shared - sum(floors.values())  # entries that the tensors compete for
        self.level = ABSENT  # an entry with a lower score can no longer be chosen
        self.reserved: dict[str, Tensor] = {}  # name -> positions
        self.candidates: dict[str, tuple[Tensor, Tensor]] = {}  # name -> positions, sorted; their scores float32

    def __len__(self) -> int:
        """How many entries are held."""
        return sum(p.numel() for p in self.reserved.values()) + sum(p.numel() for p, _ in self.candidates.values())

    def add(self, name: str, scores: Tensor, avoid: Tensor | None = None) -> None:
        """Add the scores of one tensor. scores: any shape, floating point; avoid: flat positions that must not train.

        Raises MaskError that names the tensor if a score is NaN, or if fewer entries than its floor may train.
        """
        flat = scores_without(scores, avoid)
        if bool(flat.max().isnan()):
            raise MaskError(f"tensor '{name}': scores hold NaN; check the model and the calibration data")
        reserved = top_k(flat, self.floors[name])
        if bool((flat[reserved] == ABSENT).any()):
            raise MaskError(f"tensor '{name}': fewer than the {reserved.numel():,} entries of its floor have a score")
        small = index_dtype(flat.numel())
        self.reserved[name] = reserved.to("cpu", small)
        flat[reserved] = ABSENT
        positions = ((flat >= self.level) & (flat > ABSENT)).nonzero().view(-1)
        if positions.numel() > self.open:
            positions = positions[top_k(flat[positions], self.open)]
        held = sum(p.numel() for p, _ in self.candidates.values())
        if held + positions.numel() > 2 * self.open:
            self._prune()
        self.candidates[name] = positions.to("cpu", small), flat[positions].cpu()

    def positions(self) -> dict[str, Tensor]:
        """Tensor name -> int64 positions, sorted, for each tensor that has any.

        Raises MaskError if fewer entries than `shared` have a score.
        """
        self._prune()
        found = sum(p.numel() for p, _ in self.candidates.values())
        if found < self.open:
            raise MaskError(f"{self.open:,} more entries are to train over the model, but only {found:,} have a score")
        none = torch.empty(0, dtype=torch.int32, device="cpu")
        merged = {
            name: torch.cat([self.reserved.get(name, none), self.candidates.get(name, (none, none))[0]]).long().sort().values
            for name in self.floors
        }
        return {name: positions for name, positions in merged.items() if positions.numel()}

    def _prune(self) -> None:
        """Keep the best `open` candidates."""
        names = [name for name in self.floors if name in self.candidates]
        scores = torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *(self.candidates[name][1] for name in names)])
        if scores.numel() <= self.open:
            return
        best = top_k(scores, self.open)
        if self.open:
            self.level = float(scores[best].min())
        end = 0
        for name in names:
            positions, own = self.candidates[name]
            start, end = end, end + positions.numel()
            chosen = best[(best >= start) & (best < end)] - start
            self.candidates[name] = positions[chosen], own[chosen]


def _override(shape: Shape, value: Any) -> int:
    """The count of a tensor with its own budget. Raises MaskError if that budget is not possible."""
    given = dict(value) if isinstance(value, Mapping) else {"density": value}
    if len(given) != 1 or not given.keys() <= {"density", "rank", "total"}:
        raise MaskError(f"an override is a density, or one of density, rank and total with its value; found {value!r}")
    if "total" not in given:
        return budget(shape, **given)
    if not _whole(given["total"]) or not 1 <= given["total"] <= math.prod(shape):
        raise MaskError(f"total must be a whole number from 1 to {math.prod(shape):,}, found {given['total']!r}")
    return int(given["total"])


def _left(total: int, own: Mapping[str, int], free: Mapping[str, int], least: int) -> int:
    """What remains of a total for the tensors without an override. Raises MaskError if it does not fit them."""
    if not _whole(total) or total < 1:
        raise MaskError(f"total must be a whole number from 1 on, found {shown(total)}")
    taken, room = sum(own.values()), sum(free.values())
    left = total - taken
    least = min(least, len(free))
    if not least <= left <= room:
        raise MaskError(
            f"total={total:,} does not fit: overrides take {taken:,}, which leaves {left:,} for {len(free)} tensors that need "
            f"at least {least:,} and hold {room:,} entries that may train"
        )
    return left


def _check_room(name: str, count: int, shape: Shape, avoided: Mapping[str, int]) -> None:
    """Raise MaskError unless the tensor has `count` entries that may train."""
    if count > math.prod(shape) - avoided.get(name, 0):
        raise MaskError(
            f"tensor '{name}': {count:,} of its entries are to train, but {_numbers({name: shape}, avoided)}; use a smaller "
            "budget, or avoid fewer adapters"
        )


def _numbers(shapes: Mapping[str, Shape], avoided: Mapping[str, int]) -> str:
    entries, taken = sum(map(math.prod, shapes.values())), sum(avoided.get(name, 0) for name in shapes)
    return f"of {entries:,} the adapters to avoid hold {taken:,}"


def _count_of(name: str, count: Callable[..., int], *arguments: Any, **options: Any) -> int:
    """Call `count`, and put the tensor's name into its MaskError."""
    try:
        return count(*arguments, **options)
    except MaskError as error:
        raise MaskError(f"tensor '{name}': {error}") from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
