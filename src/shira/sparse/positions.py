"""Positions of entries: their dtype, their checksum, the rules that draw them, and the overlap of two sets of them."""

import hashlib
import importlib
import zlib
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import MaskError

__all__ = [
    "Direction",
    "checksum",
    "coin",
    "draw",
    "entries_of_lines",
    "frequency_of",
    "index_dtype",
    "lines",
    "overlap",
    "seed_of",
]

try:
    _drawing: Any = importlib.import_module("._drawing", __package__)  # draw.c
except ImportError:
    _drawing = None


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of positions in a tensor of `numel` entries: int32 below 2³¹ entries, int64 from there on."""
    return torch.int32 if numel < 2**31 else torch.int64


def checksum(indices: Tensor) -> int:
    """CRC-32 of the positions as little-endian int64."""
    return zlib.crc32(indices.numpy().astype("<i8").data)


def seed_of(seed: int, name: str) -> int:
    """The seed of one tensor, 0 to 2⁶³ - 1, from a common seed and the tensor's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "big") >> 1


Direction = Literal["rows", "columns"]


def lines(
    rows: int, columns: int, frequency: int, direction: Direction, count: int, offset: int = 0, diagonal: bool = True
) -> Tensor:
    """Positions of rows (or columns) offset, offset + frequency, … of a matrix and, with `diagonal`, of its diagonal.

    Returns int64 [count], sorted. Raises MaskError, before it allocates memory, if there are not exactly `count` positions.
    """
    across = rows if direction == "rows" else columns
    frequency = min(frequency, max(1, across))  # all larger ones mean the same: one line
    if not 0 <= offset < max(1, across) or entries_of_lines(rows, columns, frequency, direction, offset, diagonal) != count:
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
    """The only frequency at which rows (or columns) from the offset on can give these positions, with or without the diagonal.

    It is the distance from the offset to the next line. If there is no next line, it is one that leads out of the matrix.
    indices: [n], sorted, flat in [rows, columns].
    """
    line, place = indices.long() // max(1, columns), indices.long() % max(1, columns)
    if direction == "columns":
        line, place = place[line == 0], line
    lines_held, entries = line.unique(return_counts=True)
    if direction == "rows" and columns > 1:
        lines_held = lines_held[entries > 1]  # a row with one entry has only that of the diagonal
    further = lines_held[lines_held > offset]
    across = rows if direction == "rows" else columns
    return int(further[0]) - offset if further.numel() else max(offset + 1, across - offset)


def entries_of_lines(rows: int, columns: int, frequency: int, direction: Direction, offset: int, diagonal: bool) -> int:
    """Number of entries in the rows (or columns) offset, offset + frequency, … and, with `diagonal`, on the diagonal."""
    across, length = (rows, columns) if direction == "rows" else (columns, rows)
    whole = _steps(across, frequency, offset) * length
    crossing = min(rows, columns)
    return whole + (crossing - _steps(crossing, frequency, offset) if diagonal else 0)


def _steps(length: int, frequency: int, offset: int) -> int:
    """How many of offset, offset + frequency, … are below a length."""
    return max(0, -(-(length - offset) // frequency))


ROUNDS = 6


def draw(numel: int, k: int, seed: int) -> Tensor:
    """k random positions in a tensor of `numel` entries, as the mask `rand` draws them: int64 [k], sorted.

    Raises MaskError if k > numel.
    """
    if not 0 <= k <= numel:
        raise MaskError(f"{k} positions asked of {numel} entries")
    half = max(1, ((max(1, numel - 1)).bit_length() + 1) // 2)
    keys = _mix(torch.arange(1, ROUNDS + 1, device="cpu") * 0x632BE59BD9B4E019 + seed)
    drawn = (_drawn_by_torch if _drawing is None else _drawn_by_c)(numel, k, half, keys)
    # numpy sorts faster than torch, and int32 faster than int64
    return torch.from_numpy(np.sort(drawn.to(index_dtype(numel)).numpy())).long()


def _drawn_by_torch(numel: int, k: int, half: int, keys: Tensor) -> Tensor:
    """The images of 0 … k - 1 under the permutation, which is applied again to each until it is below `numel`; not sorted."""
    drawn = _permute(torch.arange(k, device="cpu"), half, keys)
    outside = (drawn >= numel).nonzero().view(-1)
    while outside.numel():
        drawn[outside] = _permute(drawn[outside], half, keys)
        outside = outside[drawn[outside] >= numel]
    return drawn


def _drawn_by_c(numel: int, k: int, half: int, keys: Tensor) -> Tensor:
    """The same as `_drawn_by_torch`, in another order."""
    drawn = torch.empty(k, dtype=torch.int64, device="cpu")
    _drawing.draw(numel, k, half, keys.data_ptr(), drawn.data_ptr())
    return drawn


def coin(positions: Tensor, probability: float, seed: int) -> Tensor:
    """For each position, True with the given probability. positions: integers [k]. probability: 0 to 1. Returns bool [k].

    Position i uses the i-th word of SplitMix64 started at `seed`. In integers only, so every machine gives the same result.
    """
    words = _mix(positions.long() * -0x61C8864680B583EB + seed)
    return _shift(words, 1) < round(probability * 2**63) if probability < 1 else torch.ones_like(words, dtype=torch.bool)


def _permute(position: Tensor, half: int, keys: Tensor) -> Tensor:
    """A keyed permutation of 0 … 2^(2·half) - 1."""
    low = (1 << half) - 1
    left, right = position >> half, position & low
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & low)
    return (left << half) | right


def _mix(word: Tensor) -> Tensor:
    """Scramble 64-bit words: the finalizer of SplitMix64 (Steele et al., 2014), on wrapping int64."""
    word = (word ^ _shift(word, 30)) * -0x40A7B892E31B1A47
    word = (word ^ _shift(word, 27)) * -0x6B2FB644ECCEEE15
    return word ^ _shift(word, 31)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 words."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that two sorted lists share: their places in the first and in the second, int64 [shared] each."""
    if first.numel() == 0:
        return first.long(), first.long()
    place = torch.searchsorted(first, second).clamp_(max=first.numel() - 1)
    in_second = (first[place] == second).nonzero().view(-1)
    return place[in_second], in_second
