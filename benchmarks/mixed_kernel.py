"""The sparse products of a mixed batch in Triton, one launch for all rows of a layer. Importing this module imports Triton.

One program handles one output feature for the rows of one adapter. It gathers their inputs at the columns in which the adapter
changes that row of the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add", "table_of"]

CHUNK = 64  # entries at a time; a row of 4096 has 41 at 1 %


def table_of(changes: list[tuple[Tensor, Tensor, Tensor]], rows: int, device: torch.device) -> Tensor:
    """For each adapter's (starts, columns, deltas): their addresses, and its first row and how many. int64 [adapters, 5]."""
    return torch.tensor(
        [[*(part.data_ptr() for part in parts), number * rows, rows] for number, parts in enumerate(changes)], device=device
    )


def add(output: Tensor, inputs: Tensor, table: Tensor, rows: int) -> None:
    """Add each row's ΔW x to `output`, [batch, out], contiguous. inputs: [batch, in], contiguous. rows: of each adapter."""
    grid = (output.shape[1], len(table))
    _add[grid](output, inputs, table, output.shape[1], inputs.shape[1], triton.next_power_of_2(rows), CHUNK)


@triton.jit
def _add(output, inputs, table, out_features, in_features, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    feature, adapter = tl.program_id(0), table + 5 * tl.program_id(1)
    starts = tl.load(adapter).to(tl.pointer_type(tl.int32)) + feature
    columns = tl.load(adapter + 1).to(tl.pointer_type(tl.int32))
    deltas = tl.load(adapter + 2).to(tl.pointer_type(tl.float32))
    rows = tl.arange(0, ROWS)
    inside = rows < tl.load(adapter + 4)
    rows += tl.load(adapter + 3)
    end = tl.load(starts + 1)
    sums = tl.zeros([ROWS], tl.float32)
    for first in range(tl.load(starts), end, CHUNK):
        at = first + tl.arange(0, CHUNK)
        there = at < end
        column = tl.load(columns + at, mask=there, other=0)
        delta = tl.load(deltas + at, mask=there, other=0.0)
        found = tl.load(
            inputs + rows[:, None] * in_features + column[None, :], mask=inside[:, None] & there[None, :], other=0.0
        )
        sums += tl.sum(found.to(tl.float32) * delta[None, :], axis=1)
    where = output + rows * out_features + feature
    before = tl.load(where, mask=inside, other=0.0)
    tl.store(where, (before.to(tl.float32) + sums).to(output.dtype.element_ty), mask=inside)
