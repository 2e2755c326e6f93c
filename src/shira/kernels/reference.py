"""The specification of every kernel, in plain torch: the faster kernels must do the same.

Positions are flat, C order, sorted and unique, int32 or int64. Weights may have any shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .plan import Sum, UnitedPositions, WeightChanged, WritePlan, same_bits
from .rows import Group
from .sliding import Sliding

__all__ = [
    "add_products_",
    "check_values",
    "gather",
    "overwrite_",
    "restore_",
    "sampled_gradient",
    "sampled_images",
    "swap_",
    "unite",
    "write_",
    "write_sums_",
]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight` at `indices` [k], as a new tensor [k] of the weight's dtype."""
    return weight.detach().reshape(-1)[indices.long()]


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of `weight` at `indices` [k] to `values` [k] of the weight's dtype, bit for bit, in place."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.view(-1)[indices.long()] = values


def write_(plan: WritePlan, over: WritePlan) -> None:
    """Write the plan's values at its positions, bit for bit, in place. The stash does not change.

    over: the active plan, which has the same positions.
    Raises WeightChanged, before anything is written, unless the weights hold the values of `over`.
    """
    check_values(over)
    for write in plan.writes:
        overwrite_(*write)


def check_values(plan: WritePlan) -> None:
    """Raise WeightChanged unless the weights hold the plan's values, for the writes that were begun."""
    for write in plan.writes[: int(plan.begun[0])]:
        if not same_bits(gather(write.weight, write.indices), write.values):
            raise WeightChanged(f"a weight {list(write.weight.shape)} no longer holds what was written")


def swap_(plan: WritePlan) -> None:
    """For each write: copy the old values of its entries to the plan's stash, then write the new ones."""
    for number, (write, stash) in enumerate(zip(plan.writes, plan.stash, strict=True), start=1):
        stash.copy_(gather(write.weight, write.indices))
        plan.begun[0] = number
        overwrite_(*write)


def restore_(plan: WritePlan, *, check: bool) -> None:
    """Write the stash back to the weights, for the writes that were begun.

    check: raise WeightChanged, before anything is written, unless the weights hold the plan's values.
    """
    if check:
        check_values(plan)
    for write, stash in list(zip(plan.writes, plan.stash, strict=True))[: int(plan.begun[0])]:
        overwrite_(write.weight, write.indices, stash)


def write_sums_(plan: WritePlan) -> bool:
    """`swap_` of a plan with sums, which are computed from the old values of the entries. Returns whether all are finite."""
    finite = True
    for number, (write, stash, terms) in enumerate(zip(plan.writes, plan.stash, plan.sums, strict=True), start=1):
        stash.copy_(gather(write.weight, write.indices))
        if terms is not None:
            write.values.copy_(_summed(stash, terms))
            finite = finite and bool(write.values.isfinite().all())
        plan.begun[0] = number
        overwrite_(*write)
    plan.sums = ()
    return finite


def _summed(base: Tensor, terms: Sum) -> Tensor:
    """base + Σ α · (value − base), in order, in float32 (float64 for a float64 base), rounded once.

    Where only one adapter has an entry, with strength 1, the result has the bits of its value.
    """
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    total, alone = torch.zeros_like(wide), base
    count = torch.zeros_like(base, dtype=torch.int32)
    exact = torch.zeros_like(base, dtype=torch.bool)
    for values, places, strength in zip(*terms, strict=True):
        holds = places >= 0
        if not values.numel():
            continue
        value = values[places.clamp(min=0).long()]
        total = torch.where(holds, total + strength * (value.to(wide.dtype) - wide), total)
        alone = torch.where(holds, value, alone)
        exact = torch.where(holds, strength == 1, exact)
        count += holds
    return torch.where((count == 1) & exact, alone, (wide + total).to(base.dtype))


def unite(runs: Sequence[Tensor]) -> UnitedPositions:
    """The union of the positions of several tensors. runs: one or more, each [k], sorted and unique."""
    indices, counts = torch.unique(torch.cat(list(runs)), return_counts=True)
    return UnitedPositions(indices, [torch.searchsorted(indices, run, out_int32=True) for run in runs], counts.int())


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """The weight gradient of a linear layer at some positions: (grad_outputᵀ · input) at `indices`.

    grad_output: [tokens, out]; input: [tokens, in]; indices: [k], flat in [out, in].
    Returns float32 [k].
    """
    return (grad_output.T.float() @ input.float()).reshape(-1)[indices.long()]


def sampled_images(grad_output: Tensor, input: Tensor, indices: Tensor, sliding: Sliding) -> Tensor:
    """The weight gradient of a two-dimensional convolution at `indices`, computed in float32.

    grad_output: [images, out, lines, columns]; input: [images, in, lines, columns]; indices: [k], sorted, flat in
    [out, in, *sliding.kernel]. Returns float32 [k].
    """
    shape, (_, *steps) = (grad_output.shape[1], input.shape[1], *sliding.kernel), sliding
    whole: Tensor = conv2d_weight(input.float(), shape, grad_output.float(), *steps)
    return whole.reshape(-1)[indices.long()]


def add_products_(output: Tensor, input: Tensor, groups: Sequence[Group]) -> None:
    """Add `input · changeᵀ` to the rows of each group, in place: summed and added in float32, then rounded once.

    output: [rows, out]; input: [rows, in]. In float64 for a float64 output.
    Only the entries of a change are multiplied. So an infinite input counts where the change has an entry, and nowhere else.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    with torch.inference_mode(output.is_inference()), torch.no_grad():
        for first, end, change in groups:
            of_entry = torch.repeat_interleave(torch.arange(change.shape[0], device=output.device), change.starts.diff())
            terms = input[first:end].to(wide)[:, change.columns.long()] * change.changes.to(wide)  # [rows, k]
            sums = torch.zeros_like(output[first:end], dtype=wide).index_add_(1, of_entry, terms)
            output[first:end] = output[first:end] + sums
