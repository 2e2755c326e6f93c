"""What touches weights, behind one dispatch: `reference` says what is right, the others say it faster.

Switching works on a `WritePlan`: a flat list of writes over all tensors of a model, so that one launch does it all. On the CPU
that is native.c. On a GPU it is Triton, which is imported when the first tensor on one comes. Where these are missing, torch's
operators serve.
`backend("reference")` forces a backend inside a `with`; the tests run every backend on the same cases.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import opaque, reference, torch_ops
from .backends import BACKENDS, backend, backend_for, backend_of
from .cpu import native
from .gpu import ops as gpu
from .gpu.waiting import Waiting, arrived
from .pattern import Pattern, find_pattern
from .plan import Combined, Contribution, Overlap, Sum, WeightChanged, WeightMemory, Write, WritePlan, same_bits

__all__ = [
    "BACKENDS",
    "Combined",
    "Contribution",
    "Overlap",
    "Pattern",
    "Sum",
    "Waiting",
    "WeightChanged",
    "WeightMemory",
    "Write",
    "WritePlan",
    "arrived",
    "backend",
    "change_",
    "combine",
    "find_pattern",
    "gather",
    "gradient_of_rows",
    "overwrite_",
    "prepare",
    "restore_",
    "same_bits",
    "sampled_gradient",
    "swap_",
    "takes_gaps",
    "unite",
    "write_",
    "write_sums_",
    "writes_sums",
]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight` at `indices` [k], as a new tensor [k]."""
    if torch.compiler.is_compiling():
        gathered: Tensor = opaque.gather(weight, indices)
        return gathered
    values: Tensor = backend_for(weight, indices).gather(weight, indices)
    return values


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of `weight` at `indices` [k] to `values` [k] of its dtype, bit for bit, in place."""
    backend_for(weight, indices, values).overwrite_(weight, indices, values)


def write_(plan: WritePlan, over: WritePlan) -> None:
    """Write a plan's values over those of another that is active at the very same positions, bit for bit, in place; its stash
    stays as it is. Raises WeightChanged, before anything is written, if a weight is not what it was, or holds other values."""
    plan.check()
    backend_of(plan).write_(plan, over)


def swap_(plan: WritePlan) -> None:
    """Keep what lies under a plan in its stash, and write it. Raises WeightChanged, before that, if a weight is not what it was
    when the plan was made."""
    plan.check()
    backend_of(plan).swap_(plan)


def restore_(plan: WritePlan, *, look: bool = True) -> None:
    """Put back what a plan's stash holds, as far as it was begun. Raises WeightChanged, before anything is written, if a weight
    is not what it was, or, with `look`, no longer holds the plan's values (Triton does not look)."""
    plan.check()
    backend_of(plan).restore_(plan, look=look)


def change_(leaving: WritePlan, coming: WritePlan) -> None:
    """`restore_` a plan that is active, then `swap_` another; in one launch where the backend can. Whatever happens half way,
    `restore_` of the coming plan, then of the leaving one, is the base."""
    leaving.check()
    coming.check()
    if leaving.begun[0] and coming.parts and _launches(leaving) and _launches(coming):
        return gpu.change_(leaving, coming)
    _put_back(leaving)
    if coming.parts:
        backend_of(coming).swap_(coming)


def _launches(plan: WritePlan) -> bool:
    """Whether a plan is Triton's."""
    return backend_of(plan) is gpu


def _put_back(plan: WritePlan) -> None:
    if plan.begun[0]:
        backend_of(plan).restore_(plan, look=True)
        plan.begun[0] = 0


def writes_sums(*weights: Tensor) -> bool:
    """Whether these weights can have sums computed as they are written, in the launch that writes them: see `write_sums_`."""
    return backend_for(*weights) is gpu and all(weight.dtype in gpu.KINDS for weight in weights)


def write_sums_(plan: WritePlan, leaving: WritePlan | None = None) -> bool:
    """`swap_` a plan with sums, or `change_` to it from an active one; they become its values. Whether all of them are finite:
    if not, restore it."""
    plan.check()
    if leaving is not None:
        leaving.check()
    fusing = writes_sums(*(part.weight for part in plan.parts))
    together = fusing and leaving is not None and bool(leaving.begun[0]) and _launches(leaving)
    if leaving is not None and not together:
        _put_back(leaving)
    return gpu.write_sums_(plan, leaving if together else None) if fusing else reference.write_sums_(plan)


def prepare(plan: WritePlan) -> None:
    """Make now what the first use of a plan would make of its addresses."""
    if plan.parts and _launches(plan):
        gpu.prepare(plan)


def unite(runs: Sequence[Tensor]) -> Overlap:
    """The union of several tensors' positions: `runs`, one or more, each [k], sorted and unique, int32 or int64."""
    overlap: Overlap = backend_for(*runs).unite(runs)
    return overlap


def combine(
    weight: Tensor | None, changes: Sequence[Contribution], dtype: torch.dtype, method: str, numel: int
) -> Combined | None:
    """The base and what a method makes of the changes to it: in float32, in their order, rounded once to `dtype`.

    weight: the base, of that dtype and `numel` entries; None for zeros, and neither `base` nor `under` then hold anything.
    Returns None where no kernel does this, or gaps do not lead to positions as they should: it is up to `fusion.combine` then,
    which says what is right.
    """
    tensors = [tensor for change in changes for tensor in change[:2]] + ([] if weight is None else [weight])
    return native.combine(weight, changes, dtype, method, numel) if backend_for(*tensors) is native else None


def takes_gaps(weight: Tensor | None, entries: int) -> bool:
    """Whether `combine` is to be given gaps rather than positions, for changes of so many entries in all."""
    return backend_for(*(() if weight is None else (weight,))) is native and native.takes_gaps(weight, entries)


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """(grad_outputᵀ · input) at flat positions; grad_output [tokens, out], input [tokens, in]; float32 [k]."""
    if torch.compiler.is_compiling():
        sampled: Tensor = opaque.sampled_gradient(grad_output, input, indices)
        return sampled
    gradient: Tensor = backend_for(grad_output, input, indices).sampled_gradient(grad_output, input, indices)
    return gradient


def gradient_of_rows(rows: Tensor, gradients: Tensor, indices: Tensor) -> Tensor:
    """The gradient at flat positions of a matrix [..., columns] of which row rows[i] has gradients[i], an embedding's:
    rows int64 [tokens], any number of times each; gradients float32 [tokens, columns]; float32 [k]. Rows that do not come up
    have none, and no memory is taken for them."""
    if torch.compiler.is_compiling():
        compiled: Tensor = opaque.gradient_of_rows(rows, gradients, indices)
        return compiled
    return torch_ops.gradient_of_rows(rows, gradients, indices)
