"""Struct: whole rows or columns at a fixed distance, plus the diagonal."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import MaskError

__all__ = ["frequencies", "lines", "struct"]

Direction = Literal["rows", "columns"]


def struct(weight: Tensor, k: int, direction: Direction = "rows", avoid: Tensor | None = None) -> Tensor:
    """Positions of every f-th row (or column) and of the diagonal (SHiRA §3.1, B.1, arXiv 2406.13175).

    The rows alone are of rank at most their number; the diagonal makes the update of high rank. f is the smallest
    distance that keeps the pattern within k entries, so it holds k entries or somewhat fewer, never more.

    weight: [out, in]; only its shape matters. avoid: flat positions to leave out, as those of the diagonal that another
    struct adapter holds. Returns int64 [at most k], sorted, flat in C order.
    Raises MaskError if k does not hold the diagonal and one row (or column), or if one of these is to be avoided whole.
    """
    if weight.ndim != 2:
        raise MaskError(f"struct needs a matrix, found shape {list(weight.shape)}")
    if direction not in ("rows", "columns"):
        raise MaskError(f"direction must be 'rows' or 'columns', found {direction!r}")
    rows, columns = weight.shape
    smallest = _count(rows, columns, max(rows, columns), direction)
    if k < smallest:
        raise MaskError(
            f"struct needs the diagonal and one of the {direction}, {smallest} of {rows} x {columns} entries, but the "
            f"budget is {k}; use a density of at least {smallest / weight.numel():.4f}"
        )
    frequency = _smallest_frequency(rows, columns, direction, k)
    pattern = lines(rows, columns, frequency, direction, _count(rows, columns, frequency, direction)).to(weight.device)
    return pattern if avoid is None or avoid.numel() == 0 else _leave_out(pattern, avoid, rows, columns, frequency, direction)


def lines(rows: int, columns: int, frequency: int, direction: Direction, count: int) -> Tensor:
    """Positions of rows (or columns) 0, frequency, 2·frequency, … and of the diagonal of a matrix.

    Returns int64 [count], sorted. Raises MaskError, before it takes memory, if they are not `count`.
    """
    if _count(rows, columns, frequency, direction) != count:
        raise MaskError(f"{direction} {frequency} apart in {rows} x {columns} are not {count} positions")
    if direction == "rows":
        whole = (torch.arange(0, rows, frequency)[:, None] * columns + torch.arange(columns)).view(-1)
    else:
        whole = (torch.arange(rows)[:, None] * columns + torch.arange(0, columns, frequency)).view(-1)
    diagonal = torch.arange(min(rows, columns))
    return torch.cat([whole, diagonal[diagonal % frequency != 0] * (columns + 1)]).sort().values


def frequencies(rows: int, columns: int, direction: Direction, count: int) -> list[int]:
    """The distances at which rows (or columns), with the diagonal, are `count` positions."""
    across = rows if direction == "rows" else columns
    return [f for f in range(1, across + 1) if _count(rows, columns, f, direction) == count]


def _count(rows: int, columns: int, frequency: int, direction: Direction) -> int:
    """How many entries every f-th row (or column) and the diagonal hold."""
    across, length = (rows, columns) if direction == "rows" else (columns, rows)
    diagonal = min(rows, columns)
    return -(-across // frequency) * length + diagonal - -(-diagonal // frequency)


def _leave_out(pattern: Tensor, avoid: Tensor, rows: int, columns: int, frequency: int, direction: Direction) -> Tensor:
    """The pattern without positions to avoid. Raises MaskError if they hold a whole line of it."""
    left = pattern[~torch.isin(pattern, avoid)]
    across = rows if direction == "rows" else columns
    held = torch.bincount(left // columns if direction == "rows" else left % columns, minlength=across)
    empty = (held[::frequency] == 0).nonzero().view(-1)
    if empty.numel():
        raise MaskError(
            f"the adapters to avoid hold {empty.numel()} of its {held[::frequency].numel()} {direction} whole, the first is "
            f"number {int(empty[0]) * frequency}; give struct other {direction}, or the other direction"
        )
    return left


def _smallest_frequency(rows: int, columns: int, direction: Direction, k: int) -> int:
    """The smallest f whose pattern holds at most k entries."""
    frequency = max(1, -(-rows * columns // k))  # the lines alone hold at least entries / f
    while _count(rows, columns, frequency, direction) > k:
        frequency += 1
    return frequency
