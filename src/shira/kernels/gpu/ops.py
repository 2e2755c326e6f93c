"""The kernels on a GPU: a whole model switched in one launch, by Triton, which is imported when the first is called.

A launch is queued and returns; whatever uses the weights on the same stream comes after it. What a plan looks like on a device
(addresses, and where each window's positions begin) is made once and kept with it.
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
from ..torch_ops import gather, unite
from . import products

__all__ = [
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
KINDS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # of which sums are made; as in switch.py
FUSED = {"enable_fp_fusion": True}  # Triton is about to change what it does if it is not told
_starts: Any = WeakIdKeyDictionary()  # positions -> where each window's begin


def available(*tensors: Tensor) -> bool:
    """Whether these tensors can be handed to Triton: all on GPUs, and it is installed."""
    return bool(tensors) and all(tensor.is_cuda for tensor in tensors) and _installed()


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


class _Launch(NamedTuple):
    """A plan as one device sees it."""

    table: Tensor  # int64 [parts here, COLUMNS], see switch.py
    rows: "np.ndarray[Any, Any]"  # the same on the host
    windows: Tensor  # int32 [programs, 2]
    ends: list[int]  # how many programs the first 0, 1, 2 … parts have
    numbers: list[int]  # which of the plan's parts they are
    weights: list[Tensor]
    flag: Tensor  # int64 [1], the number of the switch whose stash is kept
    switch: list[int]  # that of the latest switch that was asked for
    alive: list[Tensor]  # what the table points to and nobody else holds


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
    """Make what a launch needs, if it is not made yet: `kernels` asks before every call whether the weights are still what they
    were. Raises IndexError for a plan that does not fit."""
    if plan.launches:
        return
    by_device: dict[torch.device, list[int]] = {}
    for number, part in enumerate(plan.parts):
        by_device.setdefault(part.weight.device, []).append(number)
    plan.launches = {device: _launch(plan, device, numbers) for device, numbers in by_device.items()}


def write_(plan: WritePlan, over: WritePlan) -> None:
    """See `reference.write_`; but it is not asked what the weights hold, which would cost a launch and a wait."""
    _run("write", plan.writer or plan)
    _moved(plan)


def swap_(plan: WritePlan) -> None:
    """See `reference.swap_`: keeping and writing in one launch."""
    prepare(plan)
    _ask(plan)
    _run("swap", plan)
    _moved(plan)


def restore_(plan: WritePlan, *, look: bool) -> None:
    """See `reference.restore_`; but it is not asked what the weights hold, which would cost a launch and a wait."""
    _run("restore", plan.keeper or plan, parts=int(plan.begun[0]))
    _moved(plan)


def change_(leaving: WritePlan, coming: WritePlan) -> None:
    """See `kernels.change_`: one launch for both."""
    prepare(leaving.keeper or leaving)
    prepare(coming)
    _ask(coming)
    _run("change", coming, leaving.keeper or leaving)
    leaving.begun[0] = 0
    _moved(leaving)
    _moved(coming)


def write_sums_(plan: WritePlan, leaving: WritePlan | None = None) -> bool:
    """See `reference.write_sums_` and `kernels.write_sums_`: the sums are computed in the launch that writes them."""
    overflow = {part.weight.device: torch.zeros(1, dtype=torch.int32, device=part.weight.device) for part in plan.parts}
    prepare(plan)
    _ask(plan)
    if leaving is None:
        _run("swap", plan, overflow=overflow)
    else:
        prepare(leaving.keeper or leaving)
        _run("change", plan, leaving.keeper or leaving, overflow=overflow)
        leaving.begun[0] = 0
        _moved(leaving)
    _moved(plan)
    finite = not any(bool(flag) for flag in overflow.values())  # waits for the launch
    plan.sums = ()
    for launch in plan.launches.values():
        launch.table[:, 7] = 0
        launch.rows[:, 7] = 0
    return finite


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `reference.sampled_gradient`: the way that products.py chooses."""
    tokens, rows = grad_output.shape
    way = products.choose(grad_output.dtype, tokens, rows, input.shape[1], indices.numel())
    return product(way, grad_output, input, indices)


def product(way: products.Way, grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """The same by a way of one's own choice; what our kernels do not know is dense."""
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


def _ask(plan: WritePlan) -> None:
    """Say that the plan is to be kept under a new number. Should an interruption come before the launch, `restore_` finds
    another number in the flag, and does nothing."""
    for launch in plan.launches.values():
        launch.switch[0] += 1
    plan.begun[0] = len(plan.parts)


def _run(
    mode: str,
    plan: WritePlan,
    leaving: WritePlan | None = None,
    *,
    parts: int | None = None,
    overflow: dict[torch.device, Tensor] | None = None,
) -> None:
    """One launch a device."""
    from . import switch as kernels

    prepare(plan)
    others = leaving.launches if leaving is not None else {}
    for device in others | plan.launches:
        coming, old, this_mode = plan.launches.get(device), others.get(device), mode
        if coming is None:  # of two plans one may have nothing on this device
            coming, this_mode = others[device], "restore"
        elif old is None:
            this_mode = "swap" if mode == "change" else mode
        old = old or coming
        out_table, in_table, windows, ends = _side_by_side(old, coming)
        count = ends[-1] if parts is None else ends[bisect.bisect_left(coming.numbers, parts)]
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
                    enable_fp_fusion=False,  # a product is rounded before it is added, as everywhere else
                )


def _side_by_side(old: _Launch, new: _Launch) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The tables of two plans with the same weights in the same rows: their own, if they are of the same ones."""
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


def _moved(plan: WritePlan) -> None:
    """The weights have changed behind torch's back: autograd must know."""
    torch.autograd.graph.increment_version([part.weight for part in plan.parts])


def _launch(plan: WritePlan, device: torch.device, numbers: list[int]) -> _Launch:
    from . import switch as kernels

    rows = np.zeros((len(numbers), kernels.COLUMNS), dtype=np.int64)
    alive, starts = [], []
    for row, number in enumerate(numbers):
        part, stash = plan.parts[number], plan.stash[number]
        _check(part)
        _check(part._replace(values=stash))
        starts.append(_starts_of(part.indices, part.weight.numel(), kernels.WINDOW))
        held = [part.weight, part.indices, part.values, stash, starts[-1]]
        rows[row, :5] = [tensor.data_ptr() for tensor in held]
        rows[row, 5:7] = [part.indices.itemsize, part.weight.itemsize]
        made = plan.sums[number] if plan.sums else None
        if made is not None:
            alive.append(_sum_table(part, made))
            rows[row, 7] = alive[-1].data_ptr()
        rows[row, 8] = KINDS.get(part.weight.dtype, 0)
    weights = [plan.parts[number].weight for number in numbers]
    windows, ends_of_parts = _windows(device, tuple(weight.numel() for weight in weights), kernels.WINDOW)
    return _Launch(
        torch.from_numpy(rows).to(device, copy=True),
        rows,
        windows,
        ends_of_parts,
        numbers,
        weights,
        torch.zeros(1, dtype=torch.int64, device=device),
        [0],
        alive + starts,
    )


def _check(part: Write) -> None:
    """What a kernel would not notice, and memory would pay for. Raises IndexError."""
    weight, indices, values = part
    plain = weight.is_contiguous() and indices.is_contiguous() and values.is_contiguous()
    fits = values.dtype == weight.dtype and indices.dtype in (torch.int32, torch.int64) and indices.shape == values.shape
    if not (plain and fits and weight.device == indices.device == values.device):
        raise IndexError(
            f"cannot write {values.dtype} {list(values.shape)} on {values.device} into {weight.dtype} {list(weight.shape)} "
            f"on {weight.device}"
        )


def known_starts(indices: Tensor) -> Tensor | None:
    """Where each window's positions begin, int64 [windows + 1], if a launch has needed it."""
    known = _starts.get(indices)
    return None if known is None else known[2]


def remember_starts(indices: Tensor, numel: int, starts: Tensor) -> None:
    """Positions that have come from elsewhere, and what was known of them there."""
    from .switch import WINDOW

    _starts[indices] = (numel, WINDOW, starts)


def _starts_of(indices: Tensor, numel: int, window: int) -> Tensor:
    """The same, made if need be, and kept for as long as the positions are. Raises IndexError for positions outside."""
    known: tuple[int, int, Tensor] | None = _starts.get(indices)
    if known is None or known[:2] != (numel, window):
        borders = torch.arange(0, numel + window, window, device=indices.device).clamp_(max=numel)
        starts = torch.searchsorted(indices, borders.to(indices.dtype))
        if (int(starts[0]), int(starts[-1])) != (0, indices.numel()):
            raise IndexError(f"positions {int(indices[0])} to {int(indices[-1])} in a tensor of {numel} entries")
        known = _starts[indices] = (numel, window, starts)
    return known[2]


def _sum_table(part: Write, made: Sum) -> Tensor:
    """A sum as switch.py's `_sum` reads it."""
    if part.weight.dtype not in KINDS or any(values.dtype != part.weight.dtype for values in made.values):
        raise IndexError(f"cannot sum {[values.dtype for values in made.values]} into {part.weight.dtype}")
    cells = [len(made.values)]
    for values, places, strength in zip(*made, strict=True):
        cells += [values.data_ptr(), places.data_ptr(), int(np.float32(strength).view(np.int32)), int(strength == 1)]
    return torch.tensor(cells, device=part.weight.device)


@functools.lru_cache(maxsize=64)
def _windows(device: torch.device, sizes: Sequence[int], window: int) -> tuple[Tensor, list[int]]:
    """Which row and window each program takes; and how many programs the first 0, 1, 2 … rows have."""
    counts = np.array([-(-size // window) for size in sizes], dtype=np.int64)
    ends = np.concatenate([[0], counts.cumsum()])
    row = np.repeat(np.arange(len(counts)), counts)
    pairs = np.stack([row, np.arange(ends[-1]) - ends[row]], axis=1).astype(np.int32)
    return torch.from_numpy(pairs).to(device), ends.tolist()
