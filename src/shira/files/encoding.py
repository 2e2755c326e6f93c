"""Positions in few bytes: from strictly increasing integers to their form in a file, and back. docs/format.md specifies it.

At 1 % random positions, gaps in bytes take 8.67 bits a position; the entropy is 8.08. A mask that a rule can draw again takes
no bytes: `rand` from its seed, `struct` from its frequency.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError, MaskError
from ..sparse.positions import checksum, draw, index_dtype, lines
from ..sparse.tensor import dtype_name, numel_of
from ..texts import shown

__all__ = ["Stored", "decode", "encode"]

UNITS = {torch.uint8: 255, torch.uint16: 65535}  # dtype -> its largest unit, after which the same gap continues
PIECE = 2**16  # positions that are encoded at a time


class Stored(NamedTuple):
    """Positions as in a file: an array, or a rule without an array."""

    positions: str | dict[str, Any]  # "plain", "gap", or a rule
    array: Tensor | None


def encode(indices: Tensor, shape: tuple[int, ...], rules: list[dict[str, Any]]) -> Stored:
    """Positions [n] in the fewest bytes: as the first rule that draws exactly these; else the smaller of gaps and plain."""
    for rule in rules:
        drawn = _draw(rule, shape, indices.numel())
        if drawn is not None and torch.equal(drawn, indices.long()):
            return Stored(rule | {"crc32": checksum(indices)}, None)
    plain = indices.to(index_dtype(_numel(shape)))
    sizes = dict.fromkeys(UNITS, 0)
    for gaps in _gaps(indices):
        for dtype, largest in UNITS.items():
            sizes[dtype] += len(gaps) + int((gaps // largest).sum())
    best = min(UNITS, key=lambda dtype: sizes[dtype] * dtype.itemsize)
    if sizes[best] * best.itemsize >= plain.nbytes:
        return Stored("plain", plain)
    units = torch.empty(sizes[best], dtype=best, device="cpu")
    end = 0
    for gaps in _gaps(indices):
        piece = _gap_units(gaps, best)
        start, end = end, end + len(piece)
        units.numpy()[start:end] = piece
    return Stored("gap", units)


def _gaps(indices: Tensor) -> "Iterator[np.ndarray[Any, Any]]":
    """The gaps between positions, piece by piece, because computing them takes several times the memory of the positions."""
    positions = indices.numpy()
    for start in range(0, len(positions), PIECE):
        piece = positions[start : start + PIECE].astype(np.int64)
        yield np.diff(piece, prepend=positions[start - 1].astype(np.int64) if start else -1) - 1


def decode(stored: Stored, shape: tuple[int, ...], count: int) -> Tensor:
    """The positions in a file; strictly increasing if they come from gaps or a rule.

    Raises AdapterError if they are invalid, or, from gaps or a rule, are not exactly `count`.
    """
    positions, array = stored
    if isinstance(positions, Mapping):
        if array is not None:
            raise AdapterError("positions are given by a rule and by an array; expected one of them")
        return _from_rule(dict(positions), shape, count)
    if array is None:
        raise AdapterError(f"positions {shown(positions)} need an array of indices, found none")
    if positions == "plain":
        if array.dtype != index_dtype(_numel(shape)):
            expected, found = (dtype_name(dtype) for dtype in (index_dtype(_numel(shape)), array.dtype))
            raise AdapterError(f"indices of {_numel(shape)} entries must be {expected}, found {found}")
        return array
    if positions == "gap":
        return _from_gaps(array, _numel(shape), count)
    raise AdapterError(f"positions must be 'plain', 'gap' or a rule, found {shown(positions)}")


def _gap_units(gaps: "np.ndarray[Any, Any]", dtype: torch.dtype) -> "np.ndarray[Any, Any]":
    """Gaps as units: a gap g becomes ⌊g / M⌋ units of value M and one unit of value g mod M, where M is the largest unit."""
    largest = UNITS[dtype]
    ends = np.cumsum(gaps // largest + 1)
    units = np.full(int(ends[-1]) if len(ends) else 0, largest, dtype=np.uint8 if dtype == torch.uint8 else np.uint16)
    units[ends - 1] = gaps % largest
    return units


def _from_gaps(array: Tensor, numel: int, count: int) -> Tensor:
    if array.dtype not in UNITS or array.ndim != 1:
        raise AdapterError(f"gaps must be uint8 or uint16 and 1-D, found {array.dtype} {list(array.shape)}")
    largest = UNITS[array.dtype]
    units = array.numpy()
    last = units != largest  # whether a unit is the last of its gap
    found = int(np.count_nonzero(last))
    if found != count or (len(units) and not last[-1]):
        raise AdapterError(f"gaps must end and give one position for each of {count} values, found {found}")
    end = int(units.sum(dtype=np.int64)) + found
    if end > numel:
        raise AdapterError(f"indices must be from 0 to {numel - 1}, the gaps lead to {end - 1}")
    steps = units + last  # no overflow: the largest unit is never the last of its gap
    sums = np.cumsum(steps, dtype=np.int32 if numel < 2**31 else np.int64)
    positions = sums if found == len(units) else sums[last]
    positions -= 1
    return torch.from_numpy(positions)


def _from_rule(rule: dict[str, Any], shape: tuple[int, ...], count: int) -> Tensor:
    written = rule.pop("crc32", None)
    drawn = _draw(rule, shape, count)
    if drawn is None or drawn.numel() != count:
        raise AdapterError(
            f"the rule {shown(rule)} does not give one position for each of {count} values in shape {list(shape)}"
        )
    drawn = drawn.to(index_dtype(_numel(shape)))
    if type(written) is not int or checksum(drawn) != written:
        raise AdapterError(f"the rule {shown(rule)} gives other positions than were written (checksum)")
    return drawn


def _draw(rule: Mapping[str, Any], shape: tuple[int, ...], count: int) -> Tensor | None:
    """The positions of a rule, int64; None if it is not a rule, or cannot give `count` positions.

    Memory is taken for `count` positions only, whatever the rule says.
    """
    try:
        match rule:
            case {"mask": "rand", "seed": int(seed), **rest} if not rest and 0 <= seed < 2**63 and type(seed) is int:
                return draw(_numel(shape), count, seed)
            case {"mask": "struct", "direction": "rows" | "columns" as direction, "frequency": int(frequency), **rest}:
                offset, diagonal = rest.pop("offset", 0), rest.pop("diagonal", True)
                whole = type(frequency) is int and type(offset) is int and 0 <= offset < frequency
                if not rest and len(shape) == 2 and whole and type(diagonal) is bool and _numel(shape) >= count:
                    return lines(shape[0], shape[1], frequency, direction, count, offset, diagonal)
    except MaskError:
        return None
    return None


def _numel(shape: tuple[int, ...]) -> int:
    try:
        return numel_of(shape)
    except ValueError as error:
        raise AdapterError(str(error)) from None
