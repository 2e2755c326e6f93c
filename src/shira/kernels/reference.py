"""The specification of every kernel, in plain torch: read this to know what the faster ones must do.

Positions are flat, C order, sorted and unique, int32 or int64. Weights may have any shape.
"""

import torch
from torch import Tensor

__all__ = ["gather", "overwrite_", "sampled_gradient"]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight` at `indices` [k], as a new tensor [k] of the weight's dtype."""
    return weight.detach().reshape(-1)[indices.long()]


def overwrite_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of `weight` at `indices` [k] to `values` [k] of the weight's dtype, bit for bit, in place."""
    with torch.no_grad():
        weight.view(-1)[indices.long()] = values


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """The weight gradient of a linear layer at a few positions: (grad_outputᵀ · input) at `indices`.

    grad_output: [tokens, out]; input: [tokens, in]; indices: [k], flat in [out, in].
    Returns float32 [k].
    """
    return (grad_output.T.float() @ input.float()).reshape(-1)[indices.long()]
