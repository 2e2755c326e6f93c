"""Combine the changes of several adapters in one tensor. `kernels.combine` does the same faster for the usual methods."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..kernels import UnitedPositions
from ..sparse.tensor import SparseTensor
from .methods import AdapterChange, Method

__all__ = ["combine"]


def combine(
    name: str,
    terms: Sequence[tuple[SparseTensor, float]],
    overlap: UnitedPositions,
    base: Tensor,
    method: Method,
    *,
    deltas: bool = False,
    check: Callable[[int, Tensor], None] = lambda number, base: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """base + the change that the method computes from all α · (value − base), for one tensor.

    name: the tensor's name.
    terms: (SparseTensor, α), in the order of summation.
    overlap: the union of their positions, n of them. base: [n], the base values there.
    deltas: the terms are deltas, the base is zeros, and the result is a delta.
    check: called for each overwrite with its number and the base values under it, in float32 (float64 for float64).
    Returns indices [at most n], values and base values there, both in the base's dtype.
    """
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    pieces, exact = [], []
    for number, ((tensor, strength), place) in enumerate(zip(terms, overlap.places, strict=True)):
        values = tensor.values if tensor.kind == "delta" else tensor.values.to(base.dtype)
        change = values.to(wide.dtype)
        if tensor.kind == "overwrite":
            under = wide.index_select(0, place)
            check(number, under)
            change = torch.sub(change, under, out=under)
        if strength != 1:
            change = strength * change
        piece, factor = method.thin(AdapterChange(name, tensor.indices, values, change, place))
        pieces.append(piece)
        exact.append(strength * factor == 1 and (deltas or tensor.kind == "overwrite"))
    if method.thins:
        left = kernels.unite([piece.places for piece in pieces])
        overlap = UnitedPositions(overlap.indices[left.indices], left.places, left.counts)
        base, wide = base[left.indices], wide[left.indices]
    result = (wide + method.combine([piece.change for piece in pieces], overlap)).to(base.dtype)
    alone = torch.empty_like(result) if all(exact) else result.clone()
    for piece, place, is_exact in zip(pieces, overlap.places, exact, strict=True):
        if is_exact:
            kernels.overwrite_(alone, place, piece.values.to(base.dtype))
    return overlap.indices, torch.where(overlap.counts == 1, alone, result), base
