"""Struct: whole rows or columns at a fixed distance, plus the diagonal."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import MaskError

__all__ = ["struct"]


def struct(weight: Tensor, k: int, direction: Literal["rows", "columns"] = "rows") -> Tensor:
    """Positions of every f-th row (or column) and of the diagonal (SHiRA §3.1, B.1, arXiv 2406.13175).

    The rows alone are of rank at most their number; the diagonal makes the update of high rank. f is the smallest
    distance that keeps the pattern within k entries, so it holds k entries or somewhat fewer, never more.

    weight: [out, in]; only its shape matters. Returns int64 [at most k], sorted, flat in C order.
    Raises MaskError if k does not hold the diagonal and one row (or column).
    """
    if weight.ndim != 2:
        raise MaskError(f"struct needs a matrix, found shape {list(weight.shape)}")
    if direction not in ("rows", "columns"):
        raise MaskError(f"direction must be 'rows' or 'columns', found {direction!r}")
    rows, columns = weight.shape
    lines, length = (rows, columns) if direction == "rows" else (columns, rows)
    diagonal = min(rows, columns)
    smallest = diagonal + length - 1
    if k < smallest:
        raise MaskError(
            f"struct needs the diagonal and one of the {direction}, {smallest} of {rows} x {columns} entries, but the "
            f"budget is {k}; use a density of at least {smallest / weight.numel():.4f}"
        )
    pattern = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    frequency = _smallest_frequency(lines, length, diagonal, k)
    if direction == "rows":
        pattern[::frequency] = True
    else:
        pattern[:, ::frequency] = True
    pattern.diagonal().fill_(True)
    return pattern.view(-1).nonzero().view(-1)


def _smallest_frequency(lines: int, length: int, diagonal: int, k: int) -> int:
    """The smallest f for which every f-th line and the diagonal hold at most k entries."""
    if lines * length <= k:
        return 1
    for frequency in range(max(1, lines * length // (2 * k)), lines + 1):
        taken = -(-lines // frequency)
        crossings = -(-diagonal // frequency)
        if taken * length + diagonal - crossings <= k:
            return frequency
    return lines
