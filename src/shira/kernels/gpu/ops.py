"""The kernels on a GPU, in Triton: one launch switches a whole model. The first call of a kernel imports Triton.

A launch is queued and returns at once. Later work on the same stream runs after it. The tables of a plan on a device
(addresses, and where the positions of each window begin) are built once and kept with the plan.
"""

import bisect
import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import torch_ops
from ..plan import Sum, Write, WritePlan
from ..torch_ops import add_products_, gather, unite
from . import products

__all__ = [
    "add_products_",
    "available",
    "change_",
    "gather",
    "known_starts",
    "overwrite_",
    "prepare",
    "product",
    "remember_starts",
    "restore_",
    "sampled_gradient",
    "swap_",
    "unite",
    "write_",
    "write_sums_",
]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # dtypes that can be summed; as in switch.py
FUSED = {"enable_fp_fusion": True}  # stated, because Triton is about to change its default
_starts: Any = WeakIdKeyDictionary()  # positions -> (entries, WINDOW, where the positions of each window begin)


def available(*tensors: Tensor) -> bool:
    """Whether Triton takes these tensors: all are on GPUs, and Triton is installed."""
    return bool(tensors) and all(tensor.is_cuda for tensor in tensors) and _installed()


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


class _Launch(NamedTuple):
    """The writes of a plan on one device, as the kernels read them."""

    table: Tensor  # int64 [writes here, COLUMNS], see switch.py
    rows: "np.ndarray[Any, Any]"  # the same table on the host
    windows: Tensor  # int32 [programs, 2]: row and window of each program
    ends: list[int]  # how many programs the first 0, 1, 2, … writes here have
    numbers: list[int]  # the writes' numbers in the plan
    weights: list[Tensor]
    flag: Tensor  # int64 [1], the number of the switch whose old values are in the stash
    switch: list[int]  # [1], the number of the latest switch that the host requested
    alive: list[Tensor]  # tensors that the table points to and that nothing else holds


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """See `reference.overwrite_`."""
    from . import switch as kernels

    _check(Write(weight, indices, values))
    count, bits = indices.numel(), BITS[weight.itemsize]
    if count:
        with torch.cuda.device_of(weight):
            kernels.overwrite[(-(-count // kernels.BLOCK),)](
                weight.detach().view(-1).view(bits), indices, values.detach().view(bits), count, BLOCK=kernels.BLOCK, **FUSED
            )
    torch.autograd.graph.increment_version(weight)


def prepare(plan: WritePlan) -> None:
    """Build the tables that a launch needs, once. They stay valid: `kernels` checks the weights before every call.

    Raises IndexError for tensors or positions that do not fit the weight.
    """
    if plan.launches:
        return
    by_device: dict[torch.device, list[int]] = {}
    for number, write in enumerate(plan.writes):
        by_device.setdefault(write.weight.device, []).append(number)
    plan.launches = {device: _launch(plan, device, numbers) for device, numbers in by_device.items()}


def write_(plan: WritePlan, over: WritePlan) -> None:
    """See `reference.write_`. Values in the weights are not compared: that would cost a launch and a wait."""
    _run("write", plan.values_from or plan)
    _written(plan)


def swap_(plan: WritePlan) -> None:
    """See `reference.swap_`: one launch fills the stash and writes."""
    prepare(plan)
    _announce(plan)
    _run("swap", plan)
    _written(plan)


def restore_(plan: WritePlan, *, check: bool) -> None:
    """See `reference.restore_`. Values in the weights are not compared: that would cost a launch and a wait."""
    _run("restore", plan.stash_from or plan, begun=int(plan.begun[0]))
    _written(plan)


def change_(leaving: WritePlan, coming: WritePlan) -> None:
    """See `kernels.change_`: one launch for both plans."""
    prepare(leaving.stash_from or leaving)
    prepare(coming)
    _announce(coming)
    _run("change", coming, leaving.stash_from or leaving)
    leaving.begun[0] = 0
    _written(leaving)
    _written(coming)


def write_sums_(plan: WritePlan, leaving: WritePlan | None = None) -> bool:
    """See `reference.write_sums_` and `kernels.write_sums_`: the launch that writes the sums also computes them."""
    overflow = {write.weight.device: torch.zeros(1, dtype=torch.int32, device=write.weight.device) for write in plan.writes}
    prepare(plan)
    _announce(plan)
    if leaving is None:
        _run("swap", plan, overflow=overflow)
    else:
        prepare(leaving.stash_from or leaving)
        _run("change", plan, leaving.stash_from or leaving, overflow=overflow)
        leaving.begun[0] = 0
        _written(leaving)
    _written(plan)
    finite = not any(bool(flag) for flag in overflow.values())  # waits for the launch
    plan.sums = ()
    for launch in plan.launches.values():
        launch.table[:, 7] = 0
        launch.rows[:, 7] = 0
    return finite


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `reference.sampled_gradient`. products.py chooses the way."""
    tokens, rows = grad_output.shape
    way = products.choose(grad_output.dtype, tokens, rows, input.shape[1], indices.numel())
    return product(way, grad_output, input, indices)


def product(way: products.Way, grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """The same by the given way. Dtypes that our kernels do not support, and empty inputs, use the dense way."""
    tokens, rows, columns, count = *grad_output.shape, input.shape[1], indices.numel()
    known = grad_output.dtype in KINDS and grad_output.dtype == input.dtype
    if way == "dense" or not known or not count * tokens:
        return torch_ops.sampled_gradient(grad_output, input, indices)
    from . import gradient as kernels

    out = torch.empty(count, device=input.device)
    with torch.cuda.device_of(input):
        if way == "sampled":
            left, right = grad_output.T.contiguous(), input.T.contiguous()
            kernels.sampled[(-(-count // 32),)](
                left, right, indices, out, tokens, columns, count, POSITIONS=32, TOKENS=64, **FUSED
            )
            return out
        side = products.TILE
        borders = torch.arange(0, rows + side, side, device=indices.device).clamp_(max=rows) * columns
        starts = torch.searchsorted(indices, borders.to(indices.dtype))
        tf32 = torch.backends.cuda.matmul.allow_tf32
        kernels.blocks[(-(-columns // side), -(-rows // side))](
            grad_output.contiguous(),
            input.contiguous(),
            indices,
            starts,
            out,
            tokens,
            rows,
            columns,
            ROWS=side,
            COLUMNS=side,
            TOKENS=32 if grad_output.dtype == torch.float32 else 64,
            CHUNK=2048,
            PRECISION="tf32" if tf32 else "ieee",
            WIDEN=not input.is_cuda,
            num_warps=8,
            **FUSED,
        )
    return out


def _announce(plan: WritePlan) -> None:
    """Give the coming switch a new number, and mark all writes of the plan as begun.

    If an interruption comes before the launch, `restore_` finds another number in the flag, and writes nothing.
    """
    for launch in plan.launches.values():
        launch.switch[0] += 1
    plan.begun[0] = len(plan.writes)


def _run(
    mode: str,
    plan: WritePlan,
    leaving: WritePlan | None = None,
    *,
    begun: int | None = None,
    overflow: dict[torch.device, Tensor] | None = None,
) -> None:
    """One launch for each device."""
    from . import switch as kernels

    prepare(plan)
    others = leaving.launches if leaving is not None else {}
    for device in others | plan.launches:
        coming, old, this_mode = plan.launches.get(device), others.get(device), mode
        if coming is None:  # one of two plans may have no write on this device
            coming, this_mode = others[device], "restore"
        elif old is None:
            this_mode = "swap" if mode == "change" else mode
        old = old or coming
        out_table, in_table, windows, ends = _side_by_side(old, coming)
        count = ends[-1] if begun is None else ends[bisect.bisect_left(coming.numbers, begun)]
        if count:
            with torch.cuda.device_of(in_table):
                kernels.change[(count,)](
                    out_table,
                    in_table,
                    windows,
                    old.flag,
                    coming.flag,
                    overflow[device] if overflow else coming.flag,
                    coming.switch[0],
                    MODE=this_mode,
                    SUMS=overflow is not None,
                    BLOCK=kernels.BLOCK,
                    num_warps=8,
                    enable_fp_fusion=False,  # a product is rounded before it is added, as in the other backends
                )


def _side_by_side(old: _Launch, new: _Launch) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The tables of two plans with the same weights in the same rows, and their windows and ends (see `_Launch`).

    If the plans have the same weights, these are their own tables.
    """
    if old is new or [id(weight) for weight in old.weights] == [id(weight) for weight in new.weights]:
        return old.table, new.table, new.windows, new.ends
    from .switch import WINDOW

    weights = {id(weight): weight for weight in [*new.weights, *old.weights]}
    row = {key: number for number, key in enumerate(weights)}
    tables = []
    for launch in (old, new):
        rows = np.zeros((len(weights), launch.rows.shape[1]), dtype=np.int64)
        rows[[row[id(weight)] for weight in launch.weights]] = launch.rows
        tables.append(torch.from_numpy(rows).to(new.table.device))
    return tables[0], tables[1], *_windows(new.table.device, tuple(weight.numel() for weight in weights.values()), WINDOW)


def _written(plan: WritePlan) -> None:
    """Increment the weights' version counters: Triton has changed the weights without torch, and autograd must know."""
    torch.autograd.graph.increment_version([write.weight for write in plan.writes])


def _launch(plan: WritePlan, device: torch.device, numbers: list[int]) -> _Launch:
    from . import switch as kernels

    rows = np.zeros((len(numbers), kernels.COLUMNS), dtype=np.int64)
    alive, starts = [], []
    for row, number in enumerate(numbers):
        write, stash = plan.writes[number], plan.stash[number]
        _check(write)
        _check(write._replace(values=stash))
        starts.append(_starts_of(write.indices, write.weight.numel(), kernels.WINDOW))
        held = [write.weight, write.indices, write.values, stash, starts[-1]]
        rows[row, :5] = [tensor.data_ptr() for tensor in held]
        rows[row, 5:7] = [write.indices.itemsize, write.weight.itemsize]
        terms = plan.sums[number] if plan.sums else None
        if terms is not None:
            alive.append(_sum_table(write, terms))
            rows[row, 7] = alive[-1].data_ptr()
        rows[row, 8] = KINDS.get(write.weight.dtype, 0)
    weights = [plan.writes[number].weight for number in numbers]
    windows, ends_of_writes = _windows(device, tuple(weight.numel() for weight in weights), kernels.WINDOW)
    return _Launch(
        torch.from_numpy(rows).to(device, copy=True),
        rows,
        windows,
        ends_of_writes,
        numbers,
        weights,
        torch.zeros(1, dtype=torch.int64, device=device),
        [0],
        alive + starts,
    )


def _check(write: Write) -> None:
    """Raise IndexError for tensors that a kernel does not check, and that would corrupt memory."""
    write.check(can_reach=write.weight.device == write.indices.device == write.values.device)


def known_starts(indices: Tensor) -> Tensor | None:
    """Where the positions of each window begin, int64 [windows + 1]; None if nothing has needed it yet."""
    known = _starts.get(indices)
    return None if known is None else known[2]


def remember_starts(indices: Tensor, numel: int, starts: Tensor) -> None:
    """Record where the positions of each window begin, for a copy of positions whose `known_starts` exist."""
    from .switch import WINDOW

    _starts[indices] = (numel, WINDOW, starts)


def _starts_of(indices: Tensor, numel: int, window: int) -> Tensor:
    """Where the positions of each window begin; computed once, and kept as long as the positions exist.

    Raises IndexError for positions outside of the tensor.
    """
    known: tuple[int, int, Tensor] | None = _starts.get(indices)
    if known is None or known[:2] != (numel, window):
        borders = torch.arange(0, numel + window, window, device=indices.device).clamp_(max=numel)
        starts = torch.searchsorted(indices, borders.to(indices.dtype))
        if (int(starts[0]), int(starts[-1])) != (0, indices.numel()):
            raise IndexError(f"positions {int(indices[0])} to {int(indices[-1])} in a tensor of {numel} entries")
        known = _starts[indices] = (numel, window, starts)
    return known[2]


def _sum_table(write: Write, terms: Sum) -> Tensor:
    """A sum as `_sum` in switch.py reads it. Raises IndexError for dtypes that cannot be summed."""
    if write.weight.dtype not in KINDS or any(values.dtype != write.weight.dtype for values in terms.values):
        raise IndexError(f"cannot sum {[values.dtype for values in terms.values]} into {write.weight.dtype}")
    cells = [len(terms.values)]
    for values, places, strength in zip(*terms, strict=True):
        cells += [values.data_ptr(), places.data_ptr(), int(np.float32(strength).view(np.int32)), int(strength == 1)]
    return torch.tensor(cells, device=write.weight.device)


@functools.lru_cache(maxsize=64)
def _windows(device: torch.device, sizes: Sequence[int], window: int) -> tuple[Tensor, list[int]]:
    """The row and the window of each program, int32 [programs, 2]; how many programs the first 0, 1, 2, … rows have."""
    counts = np.array([-(-size // window) for size in sizes], dtype=np.int64)
    ends = np.concatenate([[0], counts.cumsum()])
    row = np.repeat(np.arange(len(counts)), counts)
    pairs = np.stack([row, np.arange(ends[-1]) - ends[row]], axis=1).astype(np.int32)
    return torch.from_numpy(pairs).to(device), ends.tolist()
