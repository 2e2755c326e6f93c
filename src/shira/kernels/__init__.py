"""What touches weights, behind one dispatch: `reference` says what is right, the others say it faster.

Switching works on a `Plan`, a flat list of writes over all tensors of a model, so that one launch does it all. On the CPU that
is native.c; on a GPU Triton, which is imported when the first tensor on one comes; torch's operators where these are missing.
`backend("reference")` forces a backend inside a `with`; the tests run every backend on the same cases.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..adapter import fingerprint
from . import native, opaque, reference, torch_ops, triton_ops
from .pattern import Pattern, find_pattern
from .plan import Change, Form, Fused, Overlap, Plan, Sum, WeightChanged, Write, same_bits
from .waiting import Waiting, arrived

__all__ = [
    "BACKENDS",
    "Change",
    "Form",
    "Fused",
    "Overlap",
    "Pattern",
    "Plan",
    "Sum",
    "Waiting",
    "WeightChanged",
    "Write",
    "arrived",
    "backend",
    "change_",
    "find_pattern",
    "fingerprints",
    "fuse_",
    "fused",
    "fuses",
    "gather",
    "gradient_of_rows",
    "merge",
    "overwrite_",
    "prepare",
    "restore_",
    "same_bits",
    "sampled_gradient",
    "swap_",
    "takes_gaps",
    "write_",
]

BACKENDS: dict[str, Any] = {"reference": reference, "torch": torch_ops}
if native.available():
    BACKENDS["native"] = native
_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend by name: "reference", "torch", "native" (tensors on the CPU only) where it was built, or "triton"
    (tensors on a GPU only; on any device in its interpreter)."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _for(*tensors: Tensor) -> Any:
    forced = _forced.get()
    if forced:
        return triton_ops if forced == "triton" else BACKENDS[forced]
    return native if native.available(*tensors) else triton_ops if triton_ops.available(*tensors) else torch_ops


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight` at `indices` [k], as a new tensor [k]."""
    if torch.compiler.is_compiling():
        gathered: Tensor = opaque.gather(weight, indices)
        return gathered
    values: Tensor = _for(weight, indices).gather(weight, indices)
    return values


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of `weight` at `indices` [k] to `values` [k] of its dtype, bit for bit, in place."""
    _for(weight, indices, values).overwrite_(weight, indices, values)


def write_(plan: Plan, over: Plan) -> None:
    """Write a plan's values over those of another that is active at the very same positions, bit for bit, in place; its stash
    stays as it is. Raises WeightChanged, before anything is written, if a weight is not what it was, or holds other values."""
    plan.check()
    _of(plan).write_(plan, over)


def swap_(plan: Plan) -> None:
    """Keep what lies under a plan in its stash, and write it. Raises WeightChanged, before that, if a weight is not what it was
    when the plan was made."""
    plan.check()
    _of(plan).swap_(plan)


def restore_(plan: Plan, *, look: bool = True) -> None:
    """Put back what a plan's stash holds, as far as it was begun. Raises WeightChanged, before anything is written, if a weight
    is not what it was, or, with `look`, no longer holds the plan's values (Triton does not look)."""
    plan.check()
    _of(plan).restore_(plan, look=look)


def change_(leaving: Plan, coming: Plan) -> None:
    """`restore_` a plan that is active, then `swap_` another; in one launch where the backend can. Whatever happens half way,
    `restore_` of the coming plan, then of the leaving one, is the base."""
    leaving.check()
    coming.check()
    if leaving.begun[0] and coming.parts and _launches(leaving) and _launches(coming):
        return triton_ops.change_(leaving, coming)
    _put_back(leaving)
    if coming.parts:
        _of(coming).swap_(coming)


def _of(plan: Plan) -> Any:
    """The backend of a plan."""
    if _forced.get() is None and plan.on_cpu and native.available():
        return native
    return _for(*(part.weight for part in plan.parts))


def _launches(plan: Plan) -> bool:
    """Whether a plan is Triton's."""
    return _of(plan) is triton_ops


def _put_back(plan: Plan) -> None:
    if plan.begun[0]:
        _of(plan).restore_(plan, look=True)
        plan.begun[0] = 0


def fuses(*weights: Tensor) -> bool:
    """Whether these weights can have sums computed as they are written, in the launch that writes them: see `fuse_`."""
    return _for(*weights) is triton_ops and all(weight.dtype in triton_ops.KINDS for weight in weights)


def fuse_(plan: Plan, leaving: Plan | None = None) -> bool:
    """`swap_` a plan with sums, or `change_` to it from an active one; they become its values. Whether all of them are finite:
    if not, restore it."""
    plan.check()
    if leaving is not None:
        leaving.check()
    fusing = fuses(*(part.weight for part in plan.parts))
    together = fusing and leaving is not None and bool(leaving.begun[0]) and _launches(leaving)
    if leaving is not None and not together:
        _put_back(leaving)
    return triton_ops.fuse_(plan, leaving if together else None) if fusing else reference.fuse_(plan)


def prepare(plan: Plan) -> None:
    """Make now what the first use of a plan would make of its addresses."""
    if plan.parts and _launches(plan):
        triton_ops.prepare(plan)


def merge(runs: Sequence[Tensor]) -> Overlap:
    """The union of several tensors' positions: `runs`, one or more, each [k], sorted and unique, int32 or int64."""
    overlap: Overlap = _for(*runs).merge(runs)
    return overlap


def fused(weight: Tensor | None, changes: Sequence[Change], dtype: torch.dtype, method: str, numel: int) -> Fused | None:
    """The base and what a method makes of the changes to it: in float32, in their order, rounded once to `dtype`.

    weight: the base, of that dtype and `numel` entries; None for zeros, and neither `base` nor `under` then hold anything.
    Returns None where no kernel does this, or gaps do not lead to positions as they should: it is up to `fusion.combine` then,
    which says what is right.
    """
    tensors = [tensor for change in changes for tensor in change[:2]] + ([] if weight is None else [weight])
    return native.fused(weight, changes, dtype, method, numel) if _for(*tensors) is native else None


def takes_gaps(weight: Tensor | None, entries: int) -> bool:
    """Whether `fused` is to be given gaps rather than positions, for changes of so many entries in all."""
    return _for(*(() if weight is None else (weight,))) is native and native.takes_gaps(weight, entries)


def fingerprints(values: Sequence[Tensor]) -> list[str]:
    """`adapter.fingerprint` of each."""
    found = native.fingerprints(values) if _for(*values) is native else None
    return [fingerprint(tensor) for tensor in values] if found is None else found


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """(grad_outputᵀ · input) at flat positions; grad_output [tokens, out], input [tokens, in]; float32 [k]."""
    if torch.compiler.is_compiling():
        sampled: Tensor = opaque.sampled_gradient(grad_output, input, indices)
        return sampled
    gradient: Tensor = _for(grad_output, input, indices).sampled_gradient(grad_output, input, indices)
    return gradient


def gradient_of_rows(rows: Tensor, gradients: Tensor, indices: Tensor) -> Tensor:
    """The gradient at flat positions of a matrix [..., columns] of which row rows[i] has gradients[i], an embedding's:
    rows int64 [tokens], any number of times each; gradients float32 [tokens, columns]; float32 [k]. Rows that do not come up
    have none, and no memory is taken for them."""
    if torch.compiler.is_compiling():
        compiled: Tensor = opaque.gradient_of_rows(rows, gradients, indices)
        return compiled
    found, place = rows.unique(return_inverse=True)
    sums = gradients.new_zeros(found.numel(), gradients.shape[1]).index_add_(0, place, gradients)
    row = indices.long() // gradients.shape[1]
    where = torch.searchsorted(found, row).clamp_(max=found.numel() - 1)
    return sums[where, indices.long() % gradients.shape[1]].where(found[where] == row, 0)
