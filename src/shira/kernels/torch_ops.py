"""The kernels as torch operators, for any device without a faster backend.

They use `index_copy_` and `index_select`, not `scatter_` (the paper's operator, §4.1). In bfloat16 on the CPU, `scatter_` runs
a scalar loop and takes about 100 times as long for the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .compressed_rows import accept_sparse, times
from .plan import WritePlan
from .reference import check_values, unite
from .rows import Group

__all__ = [
    "add_products_",
    "gather",
    "gradient_of_rows",
    "overwrite_",
    "restore_",
    "sampled_gradient",
    "swap_",
    "unite",
    "write_",
]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """See `reference.gather`."""
    return weight.detach().view(-1).index_select(0, indices)


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """See `reference.overwrite_`."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.view(-1).index_copy_(0, indices.long(), values)


def write_(plan: WritePlan, over: WritePlan) -> None:
    """See `reference.write_`."""
    check_values(over)
    for write in plan.writes:
        overwrite_(*write)


def swap_(plan: WritePlan) -> None:
    """See `reference.swap_`."""
    for number, (write, stash) in enumerate(zip(plan.writes, plan.stash, strict=True), start=1):
        torch.index_select(write.weight.detach().view(-1), 0, write.indices, out=stash)
        plan.begun[0] = number
        overwrite_(*write)


def restore_(plan: WritePlan, *, check: bool) -> None:
    """See `reference.restore_`."""
    if check:
        check_values(plan)
    for number in range(int(plan.begun[0])):
        overwrite_(plan.writes[number].weight, plan.writes[number].indices, plan.stash[number])


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `reference.sampled_gradient`: the whole dense product in the inputs' own dtype, then a gather."""
    return (grad_output.T @ input).view(-1).index_select(0, indices).float()


def gradient_of_rows(rows: Tensor, gradients: Tensor, indices: Tensor) -> Tensor:
    """See `kernels.gradient_of_rows`."""
    if not rows.numel():
        return gradients.new_zeros(indices.numel())
    found, place = rows.unique(return_inverse=True)
    sums = gradients.new_zeros(found.numel(), gradients.shape[1]).index_add_(0, place, gradients)
    row = indices.long() // gradients.shape[1]
    where = torch.searchsorted(found, row).clamp_(max=found.numel() - 1)
    return sums[where, indices.long() % gradients.shape[1]].where(found[where] == row, 0)


def add_products_(output: Tensor, input: Tensor, groups: Sequence[Group]) -> None:
    """See `reference.add_products_`: a product in compressed rows for each group."""
    accept_sparse()
    wide = torch.promote_types(output.dtype, torch.float32)
    with (
        torch.inference_mode(output.is_inference()),
        torch.no_grad(),
        torch.autocast(output.device.type, enabled=False),
    ):
        for first, end, change in groups:
            if first < end and change.columns.numel():
                sums = times(change.starts, change.columns, change.changes.to(wide), change.shape, input[first:end])
                output[first:end] = output[first:end] + sums
