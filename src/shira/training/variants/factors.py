"""A low-rank product upᵀ · down beside a weight. It is computed at a few positions or in blocks of rows, never as a whole."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ... import kernels

__all__ = ["Factors", "row_blocks"]

BLOCK = 2**22  # entries of a block: 16 MiB in float32


class Factors:
    """up [rank, rows] and down [rank, columns], float32: LoRA's Bᵀ and A (arXiv 2106.09685), with a scale of 1.

    `up` starts at zero. `down` is uniform in ±1/√columns, drawn from a seed on the CPU, so that it is the same on every device.
    """

    def __init__(self, shape: tuple[int, int], rank: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(shape[1])
        down = torch.empty(rank, shape[1], dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
        self.up = nn.Parameter(torch.zeros(rank, shape[0], dtype=torch.float32, device=device))
        self.down = nn.Parameter(down.to(device))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"_up": self.up, "_down": self.down}

    def inner_and_outer(self, output_dim: int) -> tuple[Tensor, Tensor]:
        """The factor that multiplies a layer's input [rank, in], and the other [rank, out]. output_dim: as in `Masters`."""
        return (self.up, self.down) if output_dim else (self.down, self.up)

    def at(self, indices: Tensor) -> Tensor:
        """The product at sorted flat positions, float32 [k]; differentiable."""
        product: Tensor = _ProductAt.apply(self.up, self.down, indices)  # type: ignore[no-untyped-call]
        return product

    def squares(self) -> float:
        """The sum of the product's squared entries."""
        up, down = self.up.detach().double(), self.down.detach().double()
        return float(((up @ up.T) * (down @ down.T)).sum())


class _ProductAt(torch.autograd.Function):
    """upᵀ · down at positions. The forward pass is a sampled product like a weight's gradient; the gradient is sparse."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(up, down, indices)
        with torch.autocast(up.device.type, enabled=False):
            return kernels.sampled_gradient(up, down, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        up, down, indices = ctx.saved_tensors
        rows, columns = up.shape[1], down.shape[1]
        where = torch.stack([indices.long() // columns, indices.long() % columns])
        device = gradient.device  # which torch's default device would replace
        sparse = torch.sparse_coo_tensor(
            where, gradient, (rows, columns), device=device, is_coalesced=True, check_invariants=False
        )
        with torch.autocast(up.device.type, enabled=False):
            grad_up = torch.sparse.mm(sparse, down.T).T.contiguous()
            grad_down = torch.sparse.mm(sparse.T, up.T).T.contiguous()
        return grad_up, grad_down, None


def row_blocks(shape: tuple[int, int], indices: Tensor) -> Iterator[tuple[slice, slice]]:
    """Split a matrix into blocks of rows. Yields the slice of rows, and the slice of the sorted flat positions in them."""
    rows, columns = shape
    step = max(1, BLOCK // columns)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        edges = torch.tensor([first * columns, last * columns], device=indices.device, dtype=indices.dtype)
        begin, end = torch.searchsorted(indices, edges).tolist()
        yield slice(first, last), slice(begin, end)
