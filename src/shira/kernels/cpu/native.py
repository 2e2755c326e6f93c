"""The kernels in C, for the CPU: one call for a whole plan, on torch's number of threads.

Sparse positions miss every cache, and no hardware prefetcher can predict them, so the loops prefetch. A call cannot be
interrupted, so one pass may both fill the stash and write. If the extension was not built, `_native` is None and torch's
operators run.
"""

import threading
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...sparse.tensor import has_memory
from .. import torch_ops
from ..plan import UnitedPositions, WeightChanged, Write, WritePlan
from ..rows import Group, RowPositions
from .combination import combine, combine_all, takes_gaps
from .extension import CPU, plain_c
from .extension import extension as _native

__all__ = [
    "add_products_",
    "available",
    "built",
    "combine",
    "combine_all",
    "gather",
    "overwrite_",
    "plain_c",
    "restore_",
    "row_products",
    "sampled_gradient",
    "scratch",
    "swap_",
    "takes_gaps",
    "unite",
    "write_",
]

PART = np.dtype(  # as in native.c
    [
        *[("weight", "u8"), ("indices", "u8"), ("values", "u8"), ("stash", "u8"), ("written", "u8")],
        *[("count", "i8"), ("entries", "i8"), ("entry_bytes", "i4"), ("index_bytes", "i4")],
    ]
)
RUN = np.dtype([("positions", "u8"), ("places", "u8"), ("count", "i8"), ("done", "i8")])  # as in unite.c
KEEP_AND_WRITE, WRITE, RESTORE = range(3)  # as in native.c


BLOCK = 256  # tokens at a time, so that data that is read many times stays in the second-level cache
DENSE_NS = {torch.float32: 0.010, torch.bfloat16: 0.003}  # nanoseconds a token, see `sampling_wins`
SAMPLED_NS = 0.025
PACK_NS = 0.35
_kept_scratch = threading.local()
LANES, GROUP_FIELDS, MOST_THREADS = 16, 5, 64  # as in rows.c and in native.h


def built() -> bool:
    """Whether the extension was built."""
    return _native is not None


def available(*tensors: Tensor) -> bool:
    """Whether the extension was built and takes these tensors."""
    return built() and all(tensor.device.type == "cpu" for tensor in tensors)


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """See `reference.gather`."""
    values = torch.empty(indices.numel(), dtype=weight.dtype, device=CPU)
    table = _table([Write(weight, indices, values)])
    table["stash"], table["values"] = table["values"], 0
    _native.swap(table.ctypes.data, 1, KEEP_AND_WRITE, False, 0, torch.get_num_threads())
    return values


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """See `reference.overwrite_`."""
    table = _table([Write(weight, indices, values)])
    _native.swap(table.ctypes.data, 1, WRITE, False, 0, torch.get_num_threads())
    torch.autograd.graph.increment_version(weight)


def write_(plan: WritePlan, over: WritePlan) -> None:
    """See `reference.write_`. Only a few entries of each weight are compared."""
    compiled = _compiled(plan)
    compiled.table["written"] = _compiled(over).table["values"]
    try:
        _run(plan, compiled, WRITE, len(plan.writes), check=True)
    finally:
        compiled.table["written"] = compiled.table["values"]


def swap_(plan: WritePlan) -> None:
    """See `reference.swap_`: one pass fills the stash and writes."""
    _run(plan, _compiled(plan), KEEP_AND_WRITE, len(plan.writes))


def restore_(plan: WritePlan, *, check: bool) -> None:
    """See `reference.restore_`. Only a few entries of each weight are compared."""
    _run(plan, _compiled(plan), RESTORE, int(plan.begun[0]), check=check)


def unite(runs: Sequence[Tensor]) -> UnitedPositions:
    """See `reference.unite`: one window of positions at a time, one bit for each position, without sorting.

    Raises IndexError for positions below 0, or from 2⁶² on.
    """
    dtype = torch.int32 if all(run.dtype == torch.int32 for run in runs) else torch.int64
    runs = [run.to(dtype).contiguous() for run in runs]
    if not all(map(has_memory, runs)):
        raise IndexError("positions whose memory was freed")
    if any(run.numel() and not 0 <= int(run[0]) <= int(run[-1]) < 2**62 for run in runs):
        raise IndexError("positions below 0, or from 2^62 on")
    places = [torch.empty(run.numel(), dtype=torch.int32, device=CPU) for run in runs]
    table = np.zeros(len(runs), dtype=RUN)
    table["positions"] = [run.data_ptr() for run in runs]
    table["places"] = [place.data_ptr() for place in places]
    table["count"] = [run.numel() for run in runs]
    end = max((int(run[-1]) + 1 for run in runs if run.numel()), default=0)
    most = sum(place.numel() for place in places)
    indices, counts = (torch.empty(most, dtype=kind, device=CPU) for kind in (dtype, torch.int32))
    found = _native.unite(table.ctypes.data, len(runs), end, indices.data_ptr(), counts.data_ptr(), indices.itemsize)
    own = indices[:found].clone()  # callers keep the positions; a view would keep the spare memory, too
    return UnitedPositions(own, places, counts[:found])


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `reference.sampled_gradient`: dot products at the positions only, in float32; or the dense product of `torch_ops`
    where that is faster. The choice depends on sizes and dtypes only, so that a run repeats to the bit."""
    (tokens, rows), columns = grad_output.shape, input.shape[1]
    fits = grad_output.dtype == input.dtype and input.shape[0] == tokens and indices.dtype in (torch.int32, torch.int64)
    fits = fits and type(grad_output) is type(input) is Tensor  # other kinds may have no memory that C can read
    if not fits or not sampling_wins(grad_output.dtype, rows, columns, indices.numel()):
        return torch_ops.sampled_gradient(grad_output, input, indices)
    grad_output, input, indices = grad_output.contiguous(), input.contiguous(), indices.contiguous()
    out = torch.zeros(indices.numel(), dtype=torch.float32, device=CPU)
    starts, packed = scratch(columns, BLOCK * (rows + columns))
    _native.sampled(
        grad_output.data_ptr(),
        input.data_ptr(),
        input.itemsize,
        tokens,
        rows,
        columns,
        indices.data_ptr(),
        indices.itemsize,
        indices.numel(),
        out.data_ptr(),
        starts.data_ptr(),
        packed.data_ptr(),
        BLOCK,
        torch.get_num_threads(),
    )
    return out


def add_products_(output: Tensor, input: Tensor, groups: Sequence[Group]) -> None:
    """See `reference.add_products_`: all groups in one call, for float32 and bfloat16; other dtypes as in `torch_ops`.

    `kernels` has checked the groups, and their changes cannot move: a `RowChange` owns the memory at its addresses.
    """
    if output.dtype not in (torch.float32, torch.bfloat16) or input.dtype not in (torch.float32, torch.bfloat16):
        return torch_ops.add_products_(output, input, groups)
    table = array("q", [field for first, end, change in groups for field in (first, end, *change.addresses)])
    _add_products(output, input.contiguous(), table)
    torch.autograd.graph.increment_version(output)


def row_products(input: Tensor, positions: RowPositions, values: Tensor) -> Tensor:
    """See `kernels.row_products`: for float32 values, and an input in float32 or bfloat16. `kernels` has checked all three."""
    with torch.inference_mode(False), torch.no_grad():
        output = torch.zeros((input.shape[0], positions.shape[0]), dtype=torch.float32, device=CPU)
        with_none = torch.cat([values.detach(), torch.zeros(1, dtype=torch.float32, device=CPU)])
    _add_products(output, input.contiguous(), array("q", [0, input.shape[0], *positions.addresses[:2], with_none.data_ptr()]))
    return output


def _add_products(output: Tensor, input: Tensor, table: "array[int]") -> None:
    """table: the fields of the groups, as in rows.c."""
    outs, ins = output.shape[1], input.shape[1]
    threads = min(torch.get_num_threads(), MOST_THREADS)
    _native.add_products(
        table.buffer_info()[0],
        len(table) // GROUP_FIELDS,
        input.data_ptr(),
        input.itemsize,
        output.data_ptr(),
        output.itemsize,
        ins,
        outs,
        scratch(0, threads * LANES * (ins + 1))[1].data_ptr(),
        threads,
    )


def scratch(integers: int, floats: int) -> tuple[Tensor, Tensor]:
    """Memory for so many integers and floats, kept for the next call of this thread: new memory would cause page faults in
    every call."""
    size = 2 * integers + floats
    kept: Tensor | None = getattr(_kept_scratch, "tensor", None)
    if kept is None or kept.numel() < size:
        kept = _kept_scratch.tensor = torch.empty(size, dtype=torch.float32, device=CPU)
    return kept[: 2 * integers].view(torch.int64), kept[2 * integers : size]


def sampling_wins(dtype: torch.dtype, rows: int, columns: int, positions: int) -> bool:
    """Whether dot products at the positions are faster than a dense product.

    It compares nanoseconds a token, measured on two cores (docs/notebook.md): DENSE_NS for a dense multiply-add, SAMPLED_NS
    for a sampled one, PACK_NS for one entry of the inputs that is packed into rows.
    """
    dense = DENSE_NS.get(dtype)
    return dense is not None and SAMPLED_NS * positions + PACK_NS * (rows + columns) < dense * rows * columns


class _Compiled(NamedTuple):
    """A plan as C reads it."""

    table: "np.ndarray[Any, Any]"  # of PART
    address: int
    begun: int
    weights: list[Tensor]


def _compiled(plan: WritePlan) -> _Compiled:
    """The plan as C reads it, made once. Its addresses stay valid: `kernels` checks the weights before every call, and the plan
    owns all other tensors."""
    if plan.compiled is None:
        if plan.values_from is not None and plan.stash_from is not None:
            table = _compiled(plan.values_from).table.copy()
            table["stash"] = _compiled(plan.stash_from).table["stash"]
        else:
            table = _table(plan.writes, plan.stash)
            table["written"] = table["values"]
        plan.compiled = _Compiled(table, table.ctypes.data, plan.begun.ctypes.data, [write.weight for write in plan.writes])
    compiled: _Compiled = plan.compiled
    return compiled


def _run(plan: WritePlan, compiled: _Compiled, mode: int, count: int, *, check: bool = False) -> None:
    """Run a plan, then increment the version counters: C changes the weights without torch, and autograd must know."""
    begun = compiled.begun if mode == KEEP_AND_WRITE else 0
    wrong = _native.swap(compiled.address, count, mode, check, begun, torch.get_num_threads())
    if wrong >= 0:
        raise WeightChanged(f"a weight {list(plan.writes[wrong].weight.shape)} no longer holds what was written")
    torch.autograd.graph.increment_version(compiled.weights[:count])


def _table(writes: Sequence[Write], stash: Sequence[Tensor] = ()) -> "np.ndarray[Any, Any]":
    """The addresses and sizes that C reads.

    Raises IndexError for a layout, dtype, device or position that C does not check, and that would corrupt memory.
    """
    for write in writes:
        write.check(can_reach=available(*write))
    table = np.zeros(len(writes), dtype=PART)
    for field in ("weight", "indices", "values"):
        table[field] = [getattr(write, field).data_ptr() for write in writes]
    table["count"] = [write.indices.numel() for write in writes]
    table["entries"] = [write.weight.numel() for write in writes]
    table["entry_bytes"] = [write.weight.itemsize for write in writes]
    table["index_bytes"] = [write.indices.itemsize for write in writes]
    if stash:
        table["stash"] = [kept.data_ptr() for kept in stash]
    wrong = _native.outside(table.ctypes.data, len(writes))
    if wrong >= 0:
        raise IndexError(f"a position outside of a tensor of {writes[wrong].weight.numel()} entries")
    return table
