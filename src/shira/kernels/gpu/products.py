"""The fastest way to compute the weight gradient at a mask's positions on a GPU; chosen by sizes only, so that a run repeats.

    dense     the whole product by cuBLAS, then a gather: fastest per operation, but it holds a gradient of the weight's size
    blocks    the product in tiles that stay in registers; only the positions are stored (gradient.blocks)
    sampled   one dot product for each position, over inputs packed into rows (gradient.sampled)

`seconds` estimates the time of each way from bytes and operations. `Speed` says how many of these a GPU does in a second.
"""

from typing import Literal, NamedTuple

import torch

__all__ = ["H200", "TILE", "Speed", "Way", "choose", "seconds"]

Way = Literal["dense", "blocks", "sampled"]


class Speed(NamedTuple):
    """What a GPU does in a second. `shira bench products --device cuda` measures these numbers and prints them in this form."""

    half: float  # operations of cuBLAS in bfloat16 and float16, a second
    single: float  # operations of cuBLAS in float32 without TF32, a second
    blocks: float  # speed of our tiles as a share of cuBLAS's, 0 to 1
    memory: float  # bytes read or written, a second
    processors: int  # multiprocessors; each computes one tile at a time
    packed: float  # entries of the inputs that are packed into rows, a second
    gathered: float  # bytes of short rows that are read repeatedly from the second-level cache, a second


# Measured by `shira bench products --device cuda` on an H200 (docs/performance.md has the table).
H200 = Speed(half=686e12, single=51e12, blocks=0.42, memory=4.0e12, processors=132, packed=1.04e11, gathered=7.7e12)

TILE = 128
DENSE_BYTES = 2**27  # the largest gradient that is formed whole; one exists at a time, so it is small beside the weights


def seconds(way: Way, dtype: torch.dtype, tokens: int, rows: int, columns: int, positions: int, speed: Speed = H200) -> float:
    """Estimated seconds for the gradient of one weight [rows, columns] by a way."""
    multiplied = 2 * tokens * rows * columns / (speed.single if dtype == torch.float32 else speed.half)
    if way == "dense":  # written once, and nearly all of it read again: almost every cache line has a position
        return multiplied + 2 * rows * columns * dtype.itemsize / speed.memory
    if way == "blocks":
        tiles = -(-rows // TILE) * -(-columns // TILE)
        waves = -(-tiles // speed.processors) * speed.processors * TILE * TILE / (rows * columns)  # the last wave is not full
        return waves * multiplied / speed.blocks
    packed = tokens * (rows + columns) / speed.packed
    return packed + positions * tokens * dtype.itemsize / speed.gathered  # each position reads a column; rows are shared


def choose(dtype: torch.dtype, tokens: int, rows: int, columns: int, positions: int, speed: Speed = H200) -> Way:
    """The fastest way, without "dense" if its gradient is larger than DENSE_BYTES."""
    ways: list[Way] = ["sampled", "blocks"]
    if rows * columns * dtype.itemsize <= DENSE_BYTES:
        ways.append("dense")
    return min(ways, key=lambda way: seconds(way, dtype, tokens, rows, columns, positions, speed))
