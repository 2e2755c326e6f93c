"""The kernels as torch operators chosen by measurement on the CPU; they serve any device until it has its own.

`index_copy_` and `index_select` and not `scatter_` (the paper's operator, §4.1): in bfloat16 on the CPU `scatter_` runs
a scalar loop and takes about a hundred times as long for the same bits.
"""

import torch
from torch import Tensor

__all__ = ["gather", "overwrite_", "sampled_gradient"]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """See `reference.gather`."""
    return weight.detach().view(-1).index_select(0, indices)


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """See `reference.overwrite_`."""
    with torch.no_grad():
        weight.view(-1).index_copy_(0, indices.long(), values)


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `reference.sampled_gradient`: a dense product in the inputs' own dtype, of which only the sample survives."""
    return (grad_output.T @ input).view(-1).index_select(0, indices).float()
