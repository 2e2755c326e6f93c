"""Struct: whole rows or columns at a fixed distance, plus the diagonal."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import MaskError

__all__ = ["frequency_of", "lines", "struct"]

Direction = Literal["rows", "columns"]


def struct(
    weight: Tensor,
    k: int,
    direction: Direction = "rows",
    frequency: int | None = None,
    offset: int = 0,
    diagonal: bool = True,
    avoid: Tensor | None = None,
) -> Tensor:
    """Positions of every f-th row (or column) and the diagonal (SHiRA §3.1, B.1, arXiv 2406.13175).

    The rows alone are of rank at most their number; the diagonal makes the update of high rank.

    Two patterns of one direction and frequency with different offsets share no line: all they have in common is the
    diagonal, and with diagonal=False nothing (§4.2, non-overlapping Struct).

    weight: [out, in]; only its shape matters. frequency: f, by default the smallest that keeps the pattern of offset 0
    within k entries, so that it does not depend on the offset. offset: the first line, from 0 to f − 1.
    avoid: flat positions to leave out, as those where the diagonal of another struct adapter meets this pattern.
    Returns int64 [at most k], sorted, flat in C order.
    Raises MaskError if k does not hold the pattern, there is no such line, or a line would be left out whole.
    """
    if weight.ndim != 2:
        raise MaskError(f"struct needs a matrix, found shape {list(weight.shape)}")
    if direction not in ("rows", "columns"):
        raise MaskError(f"direction must be 'rows' or 'columns', found {direction!r}")
    if frequency is not None and frequency < 1:
        raise MaskError(f"frequency must be at least 1, found {frequency}")
    rows, columns = weight.shape
    smallest = _count(rows, columns, frequency or max(rows, columns), direction, offset if frequency else 0, diagonal)
    if k < smallest:
        wanted = f"{direction} {frequency} apart" if frequency else f"one of the {direction}"
        raise MaskError(
            f"struct needs {'the diagonal and ' if diagonal else ''}{wanted}, {smallest} of {rows} x {columns} entries, but "
            f"the budget is {k}; use a density of at least {smallest / weight.numel():.4f}"
        )
    frequency = frequency or _smallest_frequency(rows, columns, direction, k, diagonal)
    across = rows if direction == "rows" else columns
    if not 0 <= offset < min(frequency, across):
        raise MaskError(
            f"offset must be from 0 to {min(frequency, across) - 1} for {direction} {frequency} apart in {rows} x {columns}, "
            f"found {offset}"
        )
    count = _count(rows, columns, frequency, direction, offset, diagonal)
    if count > k:  # lines beyond the diagonal's end cross it less often
        raise MaskError(
            f"struct from offset {offset} needs {count} entries, but the budget is {k}; use a density of at least "
            f"{count / weight.numel():.6f}"
        )
    pattern = lines(rows, columns, frequency, direction, count, offset, diagonal).to(weight.device)
    if avoid is None or avoid.numel() == 0:
        return pattern
    left = pattern[~torch.isin(pattern, avoid)]
    held = torch.bincount(left // columns if direction == "rows" else left % columns, minlength=across)[offset::frequency]
    if bool((held == 0).any()):
        first = offset + int((held == 0).nonzero()[0]) * frequency
        raise MaskError(
            f"the adapters to avoid hold {int((held == 0).sum())} of its {held.numel()} {direction} whole, the first is number "
            f"{first}; use another offset, or the other direction"
        )
    return left


def lines(
    rows: int, columns: int, frequency: int, direction: Direction, count: int, offset: int = 0, diagonal: bool = True
) -> Tensor:
    """Positions of rows (or columns) offset, offset + frequency, … of a matrix, and of its diagonal.

    Returns int64 [count], sorted. Raises MaskError, before it takes memory, if they are not `count`.
    """
    across = rows if direction == "rows" else columns
    frequency = min(frequency, max(1, across))  # one line is one line, however far away the next would be
    if not 0 <= offset < max(1, across) or _count(rows, columns, frequency, direction, offset, diagonal) != count:
        raise MaskError(f"{direction} {frequency} apart from {offset} in {rows} x {columns} are not {count} positions")
    if not count:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if direction == "rows":
        whole = (_numbers(offset, rows, frequency)[:, None] * columns + _numbers(0, columns)).view(-1)
    else:
        whole = (_numbers(0, rows)[:, None] * columns + _numbers(offset, columns, frequency)).view(-1)
    if not diagonal:
        return whole
    crossing = _numbers(0, min(rows, columns))
    return torch.cat([whole, crossing[crossing % frequency != offset] * (columns + 1)]).sort().values


def _numbers(first: int, stop: int, step: int = 1) -> Tensor:
    return torch.arange(first, stop, step, device="cpu")


def frequency_of(indices: Tensor, rows: int, columns: int, direction: Direction, offset: int = 0) -> int:
    """The distance at which rows (or columns) from the offset on, with or without the diagonal, may be these positions: if any
    is, this one. It is where the second line lies; if there is none, whatever leads out of the matrix.

    indices: [n], sorted, flat in [rows, columns].
    """
    line, place = indices.long() // max(1, columns), indices.long() % max(1, columns)
    if direction == "columns":
        line, place = place[line == 0], line
    lines_held, entries = line.unique(return_counts=True)
    if direction == "rows" and columns > 1:
        lines_held = lines_held[entries > 1]  # the others hold the diagonal alone
    further = lines_held[lines_held > offset]
    across = rows if direction == "rows" else columns
    return int(further[0]) - offset if further.numel() else max(offset + 1, across - offset)


def _count(rows: int, columns: int, frequency: int, direction: Direction, offset: int, diagonal: bool) -> int:
    """How many entries every f-th row (or column) from the offset and the diagonal hold."""
    across, length = (rows, columns) if direction == "rows" else (columns, rows)
    whole = _steps(across, frequency, offset) * length
    crossing = min(rows, columns)
    return whole + (crossing - _steps(crossing, frequency, offset) if diagonal else 0)


def _steps(length: int, frequency: int, offset: int) -> int:
    """How many of offset, offset + frequency, … lie below a length."""
    return max(0, -(-(length - offset) // frequency))


def _smallest_frequency(rows: int, columns: int, direction: Direction, k: int, diagonal: bool) -> int:
    """The smallest f whose pattern of offset 0 holds at most k entries."""
    frequency = max(1, -(-rows * columns // k))  # the lines alone hold at least entries / f
    while _count(rows, columns, frequency, direction, 0, diagonal) > k:
        frequency += 1
    return frequency
