"""The kernels as torch operators, for any device that has no better.

`index_copy_` and `index_select` and not `scatter_` (the paper's operator, §4.1): in bfloat16 on the CPU `scatter_` runs
a scalar loop and takes about a hundred times as long for the same bits.
"""

import torch
from torch import Tensor

from .plan import Plan
from .reference import look_at, merge

__all__ = ["gather", "merge", "overwrite_", "restore_", "sampled_gradient", "swap_", "write_"]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """See `reference.gather`."""
    return weight.detach().view(-1).index_select(0, indices)


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """See `reference.overwrite_`."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.view(-1).index_copy_(0, indices.long(), values)


def write_(plan: Plan, over: Plan) -> None:
    """See `reference.write_`."""
    look_at(over)
    for part in plan.parts:
        overwrite_(*part)


def swap_(plan: Plan) -> None:
    """See `reference.swap_`."""
    for number, (part, stash) in enumerate(zip(plan.parts, plan.stash, strict=True), start=1):
        torch.index_select(part.weight.detach().view(-1), 0, part.indices, out=stash)
        plan.begun[0] = number
        overwrite_(*part)


def restore_(plan: Plan, *, look: bool) -> None:
    """See `reference.restore_`."""
    if look:
        look_at(plan)
    for number in range(int(plan.begun[0])):
        overwrite_(plan.parts[number].weight, plan.parts[number].indices, plan.stash[number])


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `reference.sampled_gradient`: a dense product in the inputs' own dtype, of which only the sample survives."""
    return (grad_output.T @ input).view(-1).index_select(0, indices).float()
