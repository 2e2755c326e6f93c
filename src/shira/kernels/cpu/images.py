"""The gradient of a convolution's weight at some positions, in C (`sampled.c`), straight from the images."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..sliding import Sliding
from .extension import CPU, extension
from .native import scratch

__all__ = ["sampled_images", "sampling_wins", "takes"]

# The most floats of a row, and of all rows of the input that exist at a time, so that they stay in cache.
LENGTH, COLUMNS = 2**11, 2**17

# Nanoseconds on one processor (docs/notebook.md). Of the whole gradient: a multiply-add, and an entry that is written. Of
# sampling: a multiply-add, a position in each part, and a float that is copied into a row.
WHOLE_NS, ENTRY_NS = {torch.float32: 0.02, torch.bfloat16: 0.01}, 1.0
SAMPLED_NS, POSITION_NS, PACK_NS = 0.06, 8.0, 0.6


def takes(grad_output: Tensor, input: Tensor) -> bool:
    """Whether `sampled_images` takes the tensors: plain ones, both float32 or both bfloat16."""
    return type(grad_output) is type(input) is Tensor and grad_output.dtype in WHOLE_NS and input.dtype == grad_output.dtype


def sampling_wins(grad_output: Tensor, input: Tensor, positions: int, sliding: Sliding) -> bool:
    """Whether `sampled_images` takes the tensors and is faster than the whole gradient.

    The choice depends on sizes and dtypes only, so that a run repeats to the bit.
    """
    if not takes(grad_output, input):
        return False
    (images, outs, *places), ins = grad_output.shape, input.shape[1]
    rows = outs + ins * math.prod(sliding.phases())
    some_images, some_lines = _at_a_time(images, places, sliding)
    parts = -(-images // some_images) * -(-places[0] // some_lines)
    length = parts * _length(some_images, some_lines, places, sliding)  # of all parts' rows together
    sampled = positions * (SAMPLED_NS * length + POSITION_NS * parts) + PACK_NS * rows * length
    entries = outs * ins * math.prod(sliding.kernel)
    return sampled < entries * (WHOLE_NS[grad_output.dtype] * images * math.prod(places) + ENTRY_NS)


def sampled_images(grad_output: Tensor, input: Tensor, indices: Tensor, sliding: Sliding) -> Tensor:
    """See `reference.sampled_images`. `takes` says for which tensors.

    Where an input is infinite, gradients may be NaN that are infinite, or finite, there.
    """
    (images, outs, *places), (_, ins, *sides) = grad_output.shape, input.shape
    if sliding.places(sides) != places or len(input) != images:
        raise ValueError(f"a gradient {list(grad_output.shape)} is not that of images {list(input.shape)} and {sliding}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise IndexError(f"positions must be int32 or int64, found {indices.dtype}")
    if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < outs * ins * math.prod(sliding.kernel):
        raise IndexError(f"positions {int(indices[0])} to {int(indices[-1])} in a weight {[outs, ins, *sliding.kernel]}")
    grad_output, input, indices = grad_output.contiguous(), input.contiguous(), indices.contiguous()
    some_images, some_lines = _at_a_time(images, places, sliding)
    length, phases = _length(some_images, some_lines, places, sliding), math.prod(sliding.phases())
    some_channels = max(1, min(ins, COLUMNS // (phases * length)))
    integers = ins * math.prod(sliding.kernel) + 2 * outs
    starts, packed = scratch(integers, length * (outs + some_channels * phases))
    out = torch.zeros(len(indices), dtype=torch.float32, device=CPU)
    two_sides = zip(places, sides, *sliding, sliding.phases(), sliding.reach(), strict=True)
    table = np.array([*two_sides], dtype=np.int64)  # as in sampled.c
    extension.sampled_images(
        grad_output.data_ptr(),
        input.data_ptr(),
        input.itemsize,
        images,
        outs,
        ins,
        table.ctypes.data,
        indices.data_ptr(),
        indices.itemsize,
        len(indices),
        out.data_ptr(),
        starts.data_ptr(),
        packed.data_ptr(),
        some_images,
        some_lines,
        some_channels,
        torch.get_num_threads(),
    )
    return out


def _length(images: int, lines: int, places: Sequence[int], sliding: Sliding) -> int:
    """Floats of a row that holds so many images, and so many lines of their outputs."""
    down, across = sliding.reach()
    return images * (lines + down) * (places[1] + across)


def _at_a_time(images: int, places: Sequence[int], sliding: Sliding) -> tuple[int, int]:
    """How many images, and how many lines of their outputs, fit into a row; one line at least."""
    down, across = sliding.reach()
    fit = LENGTH // _length(1, places[0], places, sliding)
    return (max(1, min(images, fit)), places[0]) if fit else (1, max(1, LENGTH // (places[1] + across) - down))
