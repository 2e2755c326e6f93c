"""Tensors whose entries lie in memory in another order than C's, such as convolutions' weights in torch's `channels_last`.

Positions count in C order, and kernels write in the order of the memory. `MemoryOrder` maps one to the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MemoryOrder", "in_memory", "is_in_order", "memory_order"]


class MemoryOrder(NamedTuple):
    """The order of a tensor's dimensions in its memory: `tensor.permute(dims)` is contiguous. shape: the tensor's own."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor's memory as a contiguous tensor."""
        return tensor.detach().permute(self.dims)

    def places(self, positions: Tensor) -> Tensor:
        """Where positions of the tensor [k] are in `view`: in the same dtype, not sorted."""
        return _moved(positions, self.shape, self.dims)

    def sorted_places(self, positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`places` of positions [k], sorted, and their values [k] in the same order."""
        places, sorting = self.places(positions).sort()
        return places, values[sorting]

    def positions(self, places: Tensor) -> Tensor:
        """Where places in `view` [k] are in the tensor: in the same dtype, not sorted."""
        back = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return _moved(places, [self.shape[dim] for dim in self.dims], back)


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> MemoryOrder | None:
    """The order of the entries in memory. None if it is C's order; also if entries have gaps between them, or share memory."""
    dims = sorted(range(len(shape)), key=lambda dim: -strides[dim])
    step = 1
    for dim in reversed(dims):
        if shape[dim] != 1 and strides[dim] != step:
            return None
        step *= shape[dim]
    longer = [dim for dim in dims if shape[dim] != 1]  # the stride of a single entry means nothing
    return None if longer == sorted(longer) else MemoryOrder(tuple(shape), tuple(dims))


def is_in_order(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous, or is so after a permutation of its dimensions."""
    return tensor.is_contiguous() or memory_order(tensor.shape, tensor.stride()) is not None


def in_memory(tensor: Tensor, positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments for a kernel that writes to contiguous tensors: `view`, and `sorted_places` of positions [k] and values."""
    order = None if tensor.is_contiguous() else memory_order(tensor.shape, tensor.stride())
    return (tensor, positions, values) if order is None else (order.view(tensor), *order.sorted_places(positions, values))


def _moved(indices: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Flat positions [k] in a tensor of this shape -> in the tensor with permuted dimensions."""
    coordinates = torch.unravel_index(indices.long(), tuple(shape))
    moved = torch.zeros_like(coordinates[0])
    for dim in dims:
        moved.mul_(shape[dim]).add_(coordinates[dim])
    return moved.to(indices.dtype)
