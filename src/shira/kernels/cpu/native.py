"""The kernels in C, for the CPU: one call for a whole plan, on torch's number of threads.

Sparse positions miss every cache and no hardware prefetcher sees them coming; the loop fetches them ahead. And it can
not be interrupted, so keeping and writing may share one pass. Where the extension was not built, `_native` is None and
torch's operators serve.
"""

import importlib
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import torch_ops
from ..plan import Combined, Contribution, Overlap, WeightChanged, Write, WritePlan

__all__ = [
    "available",
    "combine",
    "gather",
    "overwrite_",
    "restore_",
    "sampled_gradient",
    "swap_",
    "takes_gaps",
    "unite",
    "write_",
]

try:
    _native: Any = importlib.import_module("._native", __package__)
except ImportError:
    _native = None

PART = np.dtype(  # as in native.c
    [
        *[("weight", "u8"), ("indices", "u8"), ("values", "u8"), ("stash", "u8"), ("written", "u8")],
        *[("count", "i8"), ("entries", "i8"), ("entry", "i4"), ("index", "i4")],
    ]
)
RUN = np.dtype([("positions", "u8"), ("places", "u8"), ("count", "i8"), ("done", "i8")])  # as in unite.c
CHANGE = np.dtype(  # as in combine.c
    [
        *[("positions", "u8"), ("values", "u8"), ("under", "u8"), ("count", "i8"), ("done", "i8")],
        *[("units", "i8"), ("read", "i8"), ("least", "i8")],
        *[("strength", "f4"), ("is_delta", "i4"), ("is_exact", "i4"), ("unit_bytes", "i4")],
    ]
)
MODES = {"sum": 0, "mean": 1, "max": 2}
GAPS = (torch.uint8, torch.uint16)  # instead of positions: how a file holds them
LINE = 64  # bytes that are fetched at once
MOST = 255  # changes that are counted in a byte
SLACK = 16  # entries that may be written beyond the last
KEEP_AND_WRITE, WRITE, RESTORE = range(3)  # as in native.c

CPU = torch.device("cpu")  # where what C fills must lie, whatever torch.set_default_device says
plain_c: ContextVar[bool] = ContextVar("shira_plain_c", default=False)  # without instructions that not all processors have

BLOCK = 256  # tokens at a time, so that what is read again and again stays in the second-level cache
DENSE_NS = {torch.float32: 0.0066, torch.bfloat16: 0.002}
SAMPLED_NS = 0.03
PACK_NS = 0.4
_rooms = threading.local()


def available(*tensors: Tensor) -> bool:
    """Whether these tensors can be handed to the extension."""
    return _native is not None and all(tensor.device.type == "cpu" for tensor in tensors)


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
    """See `reference.write_`; it looks at a few entries."""
    compiled = _compiled(plan)
    compiled.table["written"] = _compiled(over).table["values"]
    try:
        _run(plan, compiled, WRITE, len(plan.parts), look=True)
    finally:
        compiled.table["written"] = compiled.table["values"]


def swap_(plan: WritePlan) -> None:
    """See `reference.swap_`: keeping and writing in one pass."""
    _run(plan, _compiled(plan), KEEP_AND_WRITE, len(plan.parts))


def restore_(plan: WritePlan, *, look: bool) -> None:
    """See `reference.restore_`; it looks at a few entries."""
    _run(plan, _compiled(plan), RESTORE, int(plan.begun[0]), look=look)


def unite(runs: Sequence[Tensor]) -> Overlap:
    """See `reference.unite`: a bit for each position of a window at a time, no sorting."""
    dtype = torch.int32 if all(run.dtype == torch.int32 for run in runs) else torch.int64
    runs = [run.to(dtype).contiguous() for run in runs]
    if any(run.numel() and not 0 <= int(run[0]) <= int(run[-1]) < 2**62 for run in runs):
        raise IndexError("positions below 0, or from 2^62 on")
    places = [torch.empty(run.numel(), dtype=torch.int32, device=CPU) for run in runs]
    table = np.zeros(len(runs), dtype=RUN)
    table["positions"] = [run.data_ptr() for run in runs]
    table["places"] = [place.data_ptr() for place in places]
    table["count"] = [run.numel() for run in runs]
    end = max((int(run[-1]) + 1 for run in runs if run.numel()), default=0)
    room = sum(place.numel() for place in places)
    indices, counts = (torch.empty(room, dtype=kind, device=CPU) for kind in (dtype, torch.int32))
    given = (table.ctypes.data, len(runs), end, indices.data_ptr(), counts.data_ptr(), indices.itemsize)
    found = _native.unite(*given)
    return Overlap(indices[:found].clone(), places, counts[:found])  # positions are kept: without the room


def takes_gaps(weight: Tensor | None, entries: int) -> bool:
    """Whether `combine` does as well without positions to look ahead at: there is no base, or so many entries that it is
    fetched line by line."""
    return weight is None or LINE * entries > weight.nbytes


def combine(
    weight: Tensor | None, changes: Sequence[Contribution], dtype: torch.dtype, method: str, numel: int
) -> Combined | None:
    """See `kernels.combine`: a window of positions at a time, without finding first where they meet. For sums, means and the
    largest, in float32 and bfloat16, below 2³¹ entries; deltas may have any dtype."""
    where = [change.indices.contiguous() for change in changes]
    known = method in MODES and dtype in (torch.float32, torch.bfloat16) and len(changes) <= MOST
    if not known or numel >= 2**31 or any(at.dtype not in (torch.int32, *GAPS) for at in where):
        return None
    common = torch.bfloat16 if all(change.values.dtype == dtype == torch.bfloat16 for change in changes) else torch.float32
    values = [change.values.to(common).contiguous() for change in changes]
    _check_addresses(weight, where, values, dtype, numel)
    sizes = [given.numel() for given in values]
    room = sum(sizes) + SLACK
    found_at, fresh = _room(room, torch.int32, dtype)
    base, *under = [fresh[:0]] * (1 + len(sizes))
    if weight is not None:
        base, *under = _room(room + sum(sizes), dtype)[0].split([room, *sizes])
    table = np.zeros(len(changes), dtype=CHANGE)
    for field, tensors in (("positions", where), ("values", values), ("under", under)):
        table[field] = [tensor.data_ptr() for tensor in tensors]
    table["count"] = sizes
    table["unit_bytes"] = [at.itemsize if at.dtype in GAPS else 0 for at in where]
    table["units"] = [at.numel() if at.dtype in GAPS else 0 for at in where]
    for field in ("strength", "is_delta", "is_exact"):
        table[field] = [getattr(change, field) for change in changes]
    given = (
        table.ctypes.data,
        len(changes),
        common.itemsize,
        0 if weight is None else weight.data_ptr(),
        dtype.itemsize,
        numel,
    )
    found = _native.combine(*given, found_at.data_ptr(), fresh.data_ptr(), base.data_ptr(), MODES[method], plain_c.get())
    if found < 0:
        return None
    return Combined(_kept(found_at, found), _kept(fresh, found), base[:found], under)


def _check_addresses(
    weight: Tensor | None, where: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype, numel: int
) -> None:
    """Raises IndexError for what C would not notice, and memory would pay for."""
    for at, given in zip(where, values, strict=True):
        if at.dtype in GAPS:
            continue
        if at.numel() and (int(at[0]) < 0 or int(at[-1]) >= numel):  # they are sorted
            raise IndexError(f"positions below 0, or up to {int(at[-1])} in a tensor of {numel} entries")
        if at.shape != given.shape:
            raise IndexError("there must be as many values as positions")
    if weight is not None and not (weight.is_contiguous() and weight.dtype == dtype and weight.numel() == numel):
        raise IndexError(f"the base must be contiguous, {dtype}, of {numel} entries, found {weight.dtype}, {weight.numel()}")


def _room(count: int, *dtypes: torch.dtype) -> list[Tensor]:
    """Memory for `count` entries of each dtype, the widest first, in one piece: from numpy, which asks for large pages if it is
    large, since to be given many small ones takes longer than to fill them."""
    content = torch.from_numpy(np.empty(count * sum(dtype.itemsize for dtype in dtypes), dtype=np.uint8))
    pieces = content.split([count * dtype.itemsize for dtype in dtypes])
    return [piece.view(dtype) for piece, dtype in zip(pieces, dtypes, strict=True)]


def _kept(tensor: Tensor, count: int) -> Tensor:
    """Its first entries, without the room for others where that is more than an eighth."""
    return tensor[:count] if 8 * count > 7 * tensor.numel() else tensor[:count].clone()


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `reference.sampled_gradient`: dot products at the positions alone, in float32, or, where that is faster, the dense
    product of `torch_ops`. The choice depends on the sizes only, so that a run repeats to the bit."""
    (tokens, rows), columns = grad_output.shape, input.shape[1]
    fits = grad_output.dtype == input.dtype and input.shape[0] == tokens and indices.dtype in (torch.int32, torch.int64)
    if not fits or not sampling_wins(grad_output.dtype, rows, columns, indices.numel()):
        return torch_ops.sampled_gradient(grad_output, input, indices)
    grad_output, input, indices = grad_output.contiguous(), input.contiguous(), indices.contiguous()
    out = torch.zeros(indices.numel(), dtype=torch.float32, device=CPU)
    scratch = _scratch(BLOCK * (rows + columns))
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
        scratch.data_ptr(),
        BLOCK,
        torch.get_num_threads(),
    )
    return out


def _scratch(size: int) -> Tensor:
    """Room for `size` floats, kept for the next call of this thread: fresh memory would have to be paged in each time."""
    room: Tensor | None = getattr(_rooms, "room", None)
    if room is None or room.numel() < size:
        room = _rooms.room = torch.empty(size, dtype=torch.float32, device=CPU)
    return room


def sampling_wins(dtype: torch.dtype, rows: int, columns: int, positions: int) -> bool:
    """Whether dot products at the positions beat a dense product, by nanoseconds a token measured on two cores
    (docs/notebook.md): of a dense multiply-add, of a sampled one, and of an entry of the inputs brought into rows."""
    dense = DENSE_NS.get(dtype)
    return dense is not None and SAMPLED_NS * positions + PACK_NS * (rows + columns) < dense * rows * columns


class _Compiled(NamedTuple):
    """A plan as C sees it."""

    table: "np.ndarray[Any, Any]"  # of PART
    address: int
    begun: int
    weights: list[Tensor]


def _compiled(plan: WritePlan) -> _Compiled:
    """Made once: `kernels` asks before every call whether the weights are still what they were; all else is the plan's own."""
    if plan.compiled is None:
        if plan.writer is not None and plan.keeper is not None:
            table = _compiled(plan.writer).table.copy()
            table["stash"] = _compiled(plan.keeper).table["stash"]
        else:
            table = _table(plan.parts, plan.stash)
            table["written"] = table["values"]
        plan.compiled = _Compiled(table, table.ctypes.data, plan.begun.ctypes.data, [part.weight for part in plan.parts])
    compiled: _Compiled = plan.compiled
    return compiled


def _run(plan: WritePlan, compiled: _Compiled, mode: int, parts: int, *, look: bool = False) -> None:
    """Write, and move the version counters: the weights change behind torch's back, and autograd must know."""
    begun = compiled.begun if mode == KEEP_AND_WRITE else 0
    wrong = _native.swap(compiled.address, parts, mode, look, begun, torch.get_num_threads())
    if wrong >= 0:
        raise WeightChanged(f"a weight {list(plan.parts[wrong].weight.shape)} no longer holds what was written")
    torch.autograd.graph.increment_version(compiled.weights[:parts])


def _table(parts: "tuple[Write, ...] | list[Write]", stash: tuple[Tensor, ...] = ()) -> "np.ndarray[Any, Any]":
    """Addresses and sizes. What C would not notice, and memory would pay for, is checked here: layout, dtypes, device, range.

    Raises IndexError.
    """
    for part in parts:
        weight, indices, values = part
        plain = weight.is_contiguous() and indices.is_contiguous() and values.is_contiguous()
        fits = values.dtype == weight.dtype and indices.dtype in (torch.int32, torch.int64) and indices.shape == values.shape
        if not (plain and fits and available(*part) and weight.itemsize in (1, 2, 4, 8)):
            raise IndexError(
                f"cannot write {values.dtype} {list(values.shape)} on {values.device} into {weight.dtype} {list(weight.shape)} "
                f"on {weight.device}"
            )
    table = np.zeros(len(parts), dtype=PART)
    for field in ("weight", "indices", "values"):
        table[field] = [getattr(part, field).data_ptr() for part in parts]
    table["count"] = [part.indices.numel() for part in parts]
    table["entries"] = [part.weight.numel() for part in parts]
    table["entry"] = [part.weight.itemsize for part in parts]
    table["index"] = [part.indices.itemsize for part in parts]
    if stash:
        table["stash"] = [kept.data_ptr() for kept in stash]
    wrong = _native.outside(table.ctypes.data, len(parts))
    if wrong >= 0:
        raise IndexError(f"a position outside of a tensor of {parts[wrong].weight.numel()} entries")
    return table
