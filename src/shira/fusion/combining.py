"""Combine the changes of several adapters in one tensor. `kernels.combine` does the same faster for the usual methods."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..errors import AdapterError
from ..kernels import UnitedPositions
from ..sparse.tensor import SparseTensor
from .methods import AdapterChange, Method

__all__ = ["combine", "combine_deltas", "overflow"]


def combine(
    name: str,
    terms: Sequence[tuple[SparseTensor, float]],
    union: UnitedPositions,
    base: Tensor,
    method: Method,
    *,
    deltas: bool = False,
    check: Callable[[int, Tensor], None] = lambda number, base: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """base + the change that the method computes from all α · (value − base), for one tensor.

    name: the tensor's name.
    terms: (SparseTensor, α), in the order of summation.
    union: the union of their positions, n of them. base: [n], the base values there.
    deltas: the terms are deltas, the base is zeros, and the result is a delta.
    check: called for each overwrite with its number and the base values under it, in float32 (float64 for float64).
    Returns indices [at most n], values and base values there, both in the base's dtype.
    """
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    parts, exact = [], []
    for number, ((tensor, strength), place) in enumerate(zip(terms, union.places, strict=True)):
        values = tensor.values if tensor.kind == "delta" else tensor.values.to(base.dtype)
        change = values.to(wide.dtype)
        if tensor.kind == "overwrite":
            under = wide.index_select(0, place)
            check(number, under)
            change = torch.sub(change, under, out=under)
        if strength != 1:
            change = strength * change
        part, factor = method.thin(AdapterChange(name, tensor.indices, values, change, place))
        parts.append(part)
        exact.append(strength * factor == 1 and (deltas or tensor.kind == "overwrite"))
    if method.thins:
        left = kernels.unite([part.places for part in parts])
        union = UnitedPositions(union.indices[left.indices], left.places, left.counts)
        base, wide = base[left.indices], wide[left.indices]
    result = (wide + method.combine([part.change for part in parts], union)).to(base.dtype)
    alone = torch.empty_like(result) if all(exact) else result.clone()
    for part, place, is_exact in zip(parts, union.places, exact, strict=True):
        if is_exact:
            kernels.overwrite_(alone, place, part.values.to(base.dtype))
    return union.indices, torch.where(union.counts == 1, alone, result), base


def combine_deltas(
    name: str, terms: Sequence[tuple[SparseTensor, float]], dtype: torch.dtype, method: Method
) -> tuple[Tensor, Tensor]:
    """The change that the method computes from all α · delta: indices [n], and values [n] of `dtype`."""
    union = kernels.unite([tensor.indices for tensor, _ in terms])
    zeros = torch.zeros(union.indices.numel(), dtype=dtype, device=union.indices.device)
    indices, values, _ = combine(name, terms, union, zeros, method, deltas=True)
    return indices, values


def overflow(name: str, dtype: torch.dtype) -> AdapterError:
    """The error for a tensor whose combined values are not finite."""
    return AdapterError(f"'{name}' would overflow {dtype} at these strengths; use smaller ones")
