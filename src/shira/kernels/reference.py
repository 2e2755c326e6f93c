"""The specification of every kernel, in plain torch: read this to know what the faster ones must do.

Positions are flat, C order, sorted and unique, int32 or int64. Weights may have any shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Overlap, Plan

__all__ = ["gather", "merge", "overwrite_", "restore_", "sampled_gradient", "swap_", "write_"]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight` at `indices` [k], as a new tensor [k] of the weight's dtype."""
    return weight.detach().reshape(-1)[indices.long()]


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of `weight` at `indices` [k] to `values` [k] of the weight's dtype, bit for bit, in place."""
    with torch.no_grad():
        weight.view(-1)[indices.long()] = values


def write_(plan: Plan) -> None:
    """Write the plan's values at its positions, bit for bit, in place; its stash stays as it is."""
    for part in plan.parts:
        overwrite_(*part)


def swap_(plan: Plan) -> None:
    """Keep what lies under each part in the plan's stash, then write the part."""
    for number, (part, stash) in enumerate(zip(plan.parts, plan.stash, strict=True), start=1):
        stash.copy_(gather(part.weight, part.indices))
        plan.begun[0] = number
        overwrite_(*part)


def restore_(plan: Plan) -> None:
    """Put back what the stash holds of the parts that were begun."""
    for part, stash in list(zip(plan.parts, plan.stash, strict=True))[: int(plan.begun[0])]:
        overwrite_(part.weight, part.indices, stash)


def merge(runs: Sequence[Tensor]) -> Overlap:
    """The union of several tensors' positions, one or more runs [k] each sorted and unique."""
    indices, counts = torch.unique(torch.cat(list(runs)), return_counts=True)
    return Overlap(indices, [torch.searchsorted(indices, run, out_int32=True) for run in runs], counts.int())


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """The weight gradient of a linear layer at a few positions: (grad_outputᵀ · input) at `indices`.

    grad_output: [tokens, out]; input: [tokens, in]; indices: [k], flat in [out, in].
    Returns float32 [k].
    """
    return (grad_output.T.float() @ input.float()).reshape(-1)[indices.long()]
