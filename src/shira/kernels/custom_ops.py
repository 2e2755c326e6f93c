"""Kernels of the backward pass as custom operators of torch: torch.compile calls them and does not trace into them."""

import torch
from torch import Tensor

from . import torch_ops
from .backends import backend_for

__all__ = ["gather", "gradient_of_rows", "sampled_gradient"]


@torch.library.custom_op("shira::gather", mutates_args=())
def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """See `kernels.gather`."""
    values: Tensor = backend_for(weight, indices).gather(weight, indices)
    return values


@gather.register_fake
def _(weight: Tensor, indices: Tensor) -> Tensor:
    return weight.new_empty(indices.shape)


@torch.library.custom_op("shira::sampled_gradient", mutates_args=())
def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """See `kernels.sampled_gradient`."""
    gradient: Tensor = backend_for(grad_output, input, indices).sampled_gradient(grad_output, input, indices)
    return gradient


@sampled_gradient.register_fake
def _(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    return input.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op("shira::gradient_of_rows", mutates_args=())
def gradient_of_rows(rows: Tensor, gradients: Tensor, indices: Tensor) -> Tensor:
    """See `kernels.gradient_of_rows`."""
    return torch_ops.gradient_of_rows(rows, gradients, indices)


@gradient_of_rows.register_fake
def _(rows: Tensor, gradients: Tensor, indices: Tensor) -> Tensor:
    return gradients.new_empty(indices.shape)
