"""The product of an input with a sparse matrix, and its gradients: for weights that cannot be overwritten."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from .compressed_rows import accept_sparse

__all__ = ["SparseLayout"]


class SparseLayout:
    """The positions of a sparse matrix S [out, in], prepared for products with S and with its transpose."""

    def __init__(self, indices: Tensor, shape: tuple[int, int]) -> None:
        """indices: sorted flat positions [k]. shape: (out, in)."""
        accept_sparse()
        self.indices, self.shape = indices, shape
        self.by_rows = kernels.row_positions(indices, shape)
        self.whole_lines = kernels.find_whole_lines(indices, *shape)
        # Sparse tensors are not traced. To say so imports torch's compiler, so it is said here and not on import.
        self.product = torch.compiler.disable(self._product)

    def __reduce__(self) -> Any:
        return SparseLayout, (self.indices, self.shape)

    @functools.cached_property
    def by_columns(self) -> tuple[kernels.RowPositions, Tensor]:
        """The transpose's positions in compressed rows, and each one's place in `indices`, int32 [k].

        Computed when the first backward pass needs it.
        """
        rows, columns = self.indices.long() // self.shape[1], self.indices.long() % self.shape[1]
        transposed = columns * self.shape[0] + rows
        order = transposed.argsort()
        return kernels.row_positions(transposed[order], (self.shape[1], self.shape[0])), order.int()

    def _product(self, input: Tensor, values: Tensor) -> Tensor:
        """input [..., in] · Sᵀ: [..., out] in the input's dtype, computed in float32. values: S's entries, float32 [k]."""
        output: Tensor = _SparseProduct.apply(input, values, self)  # type: ignore[no-untyped-call]
        return output

    def times(self, values: Tensor, input: Tensor) -> Tensor:
        """input [tokens, in] · Sᵀ, float32."""
        return kernels.row_products(input, self.by_rows, values)

    def times_transposed(self, values: Tensor, input: Tensor) -> Tensor:
        """input [tokens, out] · S, float32."""
        positions, order = self.by_columns
        return kernels.row_products(input, positions, values.index_select(0, order))

    def gradient(self, grad_output: Tensor, input: Tensor) -> Tensor:
        """The gradient of the values: (grad_outputᵀ · input) at the positions, float32 [k]."""
        if self.whole_lines is None:
            return kernels.sampled_gradient(grad_output, input, self.indices)
        return self.whole_lines.gradient(grad_output, self.whole_lines.keep(input))


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, values: Tensor, layout: SparseLayout) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, values)
        ctx.layout, ctx.dtype = layout, input.dtype
        with torch.autocast(input.device.type, enabled=False):
            output = layout.times(values, input.reshape(-1, input.shape[-1]))
        return output.to(input.dtype).view(*input.shape[:-1], layout.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, values = ctx.saved_tensors
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_values = None
        with torch.autocast(flat.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_input = (
                    ctx.layout.times_transposed(values, flat).to(ctx.dtype).view(*grad_output.shape[:-1], ctx.layout.shape[1])
                )
            if ctx.needs_input_grad[1]:
                grad_values = ctx.layout.gradient(flat, input.reshape(-1, input.shape[-1]).to(flat.dtype))
        return grad_input, grad_values, None
