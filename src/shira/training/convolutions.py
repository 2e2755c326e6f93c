"""The backward pass of a two-dimensional convolution while entries of its weight train.

The weight is a matrix [out, in · kernel], and each place of the output has a row of as many inputs. Where few entries train,
their gradient is sampled from these rows, a part of the places at a time. Elsewhere the whole gradient is computed by the
operator that autograd uses, so its bits are the same.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.backends import backend_for
from ..kernels.cpu import native
from .masters import Masters

__all__ = ["SparseConv2d", "is_plain"]

PART_BYTES = 2**24  # of rows that exist at a time
SLOWER, COPY_NS = 1.7, 0.94  # sampling from rows of an image beside rows that are there already (docs/notebook.md)


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
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (input, weight), module = ctx.saved_tensors, ctx.module
        needs_input, _, needs_bias, needs_values = ctx.needs_input_grad[:4]
        samples = needs_values and _sampling_wins(ctx.masters, grad_output, input)
        grad_input, whole, grad_bias = torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight.to(grad_output.dtype),
            [weight.shape[0]] if needs_bias else None,
            module.stride,
            module.padding,
            module.dilation,
            False,  # not transposed
            (0, 0),
            1,  # one group
            (needs_input, needs_values and not samples, needs_bias),
        )
        grad_values = None
        if samples:
            grad_values = sum(ctx.masters.gradient(*part) for part in _parts(module, grad_output, input))
        elif needs_values:
            grad_values = ctx.masters.sample(whole)
        return None if grad_input is None else grad_input.to(ctx.input_dtype), None, grad_bias, grad_values, None, None


def _sampling_wins(masters: Masters, grad_output: Tensor, input: Tensor) -> bool:
    """Whether sampling is faster than the whole gradient. It was measured in C on the CPU in float32; else the answer is no.

    The choice depends on sizes and dtypes only, so that a run repeats to the bit.
    """
    if torch.compiler.is_compiling() or masters.whole_lines is not None or grad_output.dtype != torch.float32:
        return False
    if input.dtype != torch.float32 or backend_for(grad_output, input) is not native:
        return False
    (rows, columns), positions = masters.matrix_shape, masters.indices.numel()
    sampled = SLOWER * (native.SAMPLED_NS * positions + native.PACK_NS * (rows + columns)) + COPY_NS * columns
    return sampled < native.DENSE_NS[torch.float32] * rows * columns


def _parts(module: nn.Conv2d, grad_output: Tensor, input: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some places of the output at a time: their gradients [places, out] and inputs [places, in · kernel]."""
    (down, across), (kernel_down, kernel_across), (far_down, far_across) = module.stride, module.kernel_size, module.dilation
    padded = nn.functional.pad(input, (module.padding[1], module.padding[1], module.padding[0], module.padding[0]))  # type: ignore[arg-type]
    (images, channels), (lines, width) = input.shape[:2], grad_output.shape[2:]
    by_image, by_channel, by_line, by_column = padded.stride()
    columns = channels * kernel_down * kernel_across
    some_lines = max(1, PART_BYTES // (width * columns * input.itemsize))  # of the output, in one part
    some_images = max(1, some_lines // lines)
    for image in range(0, images, some_images):
        for line in range(0, lines, some_lines):
            gradients = grad_output[image : image + some_images, :, line : line + some_lines]
            rows = padded.as_strided(
                (gradients.shape[0], gradients.shape[2], width, channels, kernel_down, kernel_across),
                (by_image, by_line * down, by_column * across, by_channel, by_line * far_down, by_column * far_across),
                padded.storage_offset() + image * by_image + line * down * by_line,
            )
            yield gradients.permute(0, 2, 3, 1).reshape(-1, grad_output.shape[1]), rows.reshape(-1, columns)
