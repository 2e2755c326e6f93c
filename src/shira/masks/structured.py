"""Struct: whole rows or columns at a fixed distance, and the diagonal."""

import torch
from torch import Tensor

from ..errors import MaskError
from ..sparse.positions import Direction, entries_of_lines, lines

__all__ = ["struct"]


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

    The rank of the rows alone is at most their number. The diagonal makes the rank of the update high.

    Two patterns with the same direction and frequency but different offsets share no line. They share only the diagonal, and
    nothing with diagonal=False (§4.2, non-overlapping Struct).

    weight: [out, in]; only its shape matters.
    frequency: f. The default is the smallest f whose pattern of offset 0 has at most k entries; so it does not depend on the
        offset.
    offset: the first line, from 0 to f − 1.
    avoid: flat positions to leave out, such as those where the diagonal of another struct adapter crosses this pattern.
    Returns int64 [at most k], sorted, flat in C order.
    Raises MaskError if the pattern has more than k entries, there is no such line, or `avoid` holds a whole line.
    """
    if weight.ndim != 2:
        raise MaskError(f"struct needs a matrix, found shape {list(weight.shape)}")
    if direction not in ("rows", "columns"):
        raise MaskError(f"direction must be 'rows' or 'columns', found {direction!r}")
    if frequency is not None and frequency < 1:
        raise MaskError(f"frequency must be at least 1, found {frequency}")
    rows, columns = weight.shape
    smallest = entries_of_lines(rows, columns, frequency or max(rows, columns), direction, offset if frequency else 0, diagonal)
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
    count = entries_of_lines(rows, columns, frequency, direction, offset, diagonal)
    if count > k:  # a line beyond the end of the diagonal does not cross it, so this pattern has more entries
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


def _smallest_frequency(rows: int, columns: int, direction: Direction, k: int, diagonal: bool) -> int:
    """The smallest f whose pattern of offset 0 has at most k entries."""
    frequency = max(1, -(-rows * columns // k))  # the lines alone hold at least entries / f
    while entries_of_lines(rows, columns, frequency, direction, 0, diagonal) > k:
        frequency += 1
    return frequency
