"""The backward pass of a two-dimensional convolution while entries of its weight train.

Where few entries train, their gradient is computed straight from the images (`kernels.sampled_images`). Elsewhere the whole
gradient is computed by the operator that autograd uses, so its bits are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from .derivatives import first_only
from .masters import Masters

__all__ = ["SparseConv2d", "is_plain"]


def is_plain(module: nn.Conv2d) -> bool:
    """Whether the convolution is one product of its weight with rows of the input, padded with zeros."""
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class SparseConv2d(torch.autograd.Function):
    """A convolution whose weight has a gradient at the trained positions only (Appendix E)."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, masters: Masters, module: nn.Conv2d
    ) -> Tensor:
        output: Tensor = module._conv_forward(input, weight, bias)
        ctx.save_for_backward(input.to(output.dtype), weight)  # under autocast the two dtypes differ
        ctx.masters, ctx.module, ctx.input_dtype = masters, module, input.dtype
        return output

    @staticmethod
    @first_only
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (input, weight), module = ctx.saved_tensors, ctx.module
        needs_input, _, needs_bias, needs_values = ctx.needs_input_grad[:4]
        sliding = kernels.Sliding(*map(_both, (module.kernel_size, module.stride, module.padding, module.dilation)))
        positions = ctx.masters.indices.numel()
        samples = needs_values and kernels.samples_images(grad_output, input, positions, sliding)
        grad_input, whole, grad_bias = torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight.to(grad_output.dtype),
            [weight.shape[0]] if needs_bias else None,
            sliding.stride,
            sliding.padding,
            sliding.dilation,
            False,  # not transposed
            (0, 0),
            1,  # one group
            (needs_input, needs_values and not samples, needs_bias),
        )
        grad_values = None
        if samples:
            grad_values = ctx.masters.gradient_of_images(grad_output, input, sliding)
        elif needs_values:
            grad_values = ctx.masters.sample(whole)
        return None if grad_input is None else grad_input.to(ctx.input_dtype), None, grad_bias, grad_values, None, None


def _both(setting: Any) -> tuple[int, int]:
    """A setting of both sides; one number is for both, as in torch's operator."""
    return setting[0], setting[-1]
