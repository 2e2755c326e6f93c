"""Which way to the weight gradient at a mask's positions is the fastest on a GPU: by sizes alone, so that a run repeats.

    dense     the whole product by cuBLAS, then a gather: fastest a multiplication, but holds a gradient of the weight's size
    blocks    the product in tiles that stay in registers, of which only the positions are stored (gradient.blocks)
    sampled   a dot product a position, over inputs brought into rows (gradient.sampled)

Where the time of each goes, in bytes and operations, is `seconds`; what a GPU does of them in a second is `Speed`.
"""

from typing import Literal, NamedTuple

import torch

__all__ = ["H200", "TILE", "Speed", "Way", "choose", "seconds"]

Way = Literal["dense", "blocks", "sampled"]


class Speed(NamedTuple):
    """What a GPU does in a second. `shira bench products --device cuda` measures these and prints them in this form."""

    half: float  # operations of cuBLAS on bfloat16 and float16
    single: float  # and on float32, without TF32
    blocks: float  # share of those that our own tiles reach
    memory: float  # bytes read or written
    processors: int  # multiprocessors, each of which makes a tile at a time
    packed: float  # entries of the inputs that are brought into rows
    gathered: float  # bytes of short rows that are read again and again out of the second-level cache


# Measured by `shira bench products --device cuda` on an H200 (docs/performance.md has the table).
H200 = Speed(half=686e12, single=51e12, blocks=0.42, memory=4.0e12, processors=132, packed=1.04e11, gathered=7.7e12)

TILE = 128
DENSE_BYTES = 2**27  # no gradient larger than this is formed whole; one exists at a time, so it is little beside the weights


def seconds(way: Way, dtype: torch.dtype, tokens: int, rows: int, columns: int, positions: int, speed: Speed = H200) -> float:
    """How long one weight's gradient takes by a way."""
    multiplied = 2 * tokens * rows * columns / (speed.single if dtype == torch.float32 else speed.half)
    if way == "dense":  # written once, read where the positions are: nearly everywhere, in lines
        return multiplied + 2 * rows * columns * dtype.itemsize / speed.memory
    if way == "blocks":
        tiles = -(-rows // TILE) * -(-columns // TILE)
        waves = -(-tiles // speed.processors) * speed.processors * TILE * TILE / (rows * columns)  # the last one is not full
        return waves * multiplied / speed.blocks
    packed = tokens * (rows + columns) / speed.packed
    return packed + positions * tokens * dtype.itemsize / speed.gathered  # a column each; rows are shared


def choose(dtype: torch.dtype, tokens: int, rows: int, columns: int, positions: int, speed: Speed = H200) -> Way:
    """The fastest way, of those that hold little."""
    ways: list[Way] = ["sampled", "blocks"]
    if rows * columns * dtype.itemsize <= DENSE_BYTES:
        ways.append("dense")
    return min(ways, key=lambda way: seconds(way, dtype, tokens, rows, columns, positions, speed))
