"""Combine the changes of several adapters in one tensor. `kernels.combine` computes it, if it can; otherwise torch does."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..errors import AdapterError
from ..files.reading import Gaps
from ..kernels import Combination, Contribution, UnitedPositions
from ..sparse.tensor import SparseTensor
from .methods import AdapterChange, Method

__all__ = ["combination", "combine", "combine_deltas", "overflow"]


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
    changes = [
        _contribution(place, tensor, strength, base.dtype, over_zeros=deltas)
        for (tensor, strength), place in zip(terms, union.places, strict=True)
    ]
    found = kernels.combine(None if deltas else base, changes, base.dtype, method.name, base.numel())
    if found is not None:  # each entry of the union is touched, so its numbers are 0 to n - 1
        for number, (tensor, _) in enumerate(terms):
            if tensor.kind == "overwrite":
                check(number, found.under[number])
        return union.indices, found.values, base
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    parts, exact = [], []
    for number, ((tensor, strength), (place, values, *_)) in enumerate(zip(terms, changes, strict=True)):
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


def combination(
    terms: Sequence[tuple[SparseTensor, float]],
    weight: Tensor | None,
    dtype: torch.dtype,
    method: Method,
    hidden: tuple[Tensor, Tensor] | None = None,
) -> Combination:
    """What `combine` computes over the base in `weight`, or over zeros, for `kernels.combine_all`."""
    in_files = any(isinstance(tensor, Gaps) for tensor, _ in terms)
    gaps = in_files and kernels.takes_gaps(weight, sum(tensor.nnz for tensor, _ in terms))
    changes = []
    for tensor, strength in terms:
        positions = tensor.units if gaps and isinstance(tensor, Gaps) else tensor.indices
        changes.append(_contribution(positions, tensor, strength, dtype, over_zeros=weight is None))
    return Combination(weight, changes, dtype, method.name, terms[0][0].numel, hidden)


def _contribution(
    indices: Tensor, tensor: SparseTensor, strength: float, dtype: torch.dtype, *, over_zeros: bool
) -> Contribution:
    """What an adapter's tensor changes in a base of this dtype; in zeros, if the terms are deltas and give a delta."""
    is_delta = tensor.kind == "delta"
    values = tensor.values if is_delta else tensor.values.to(dtype)
    return Contribution(indices, values, strength, is_delta, strength == 1 and (over_zeros or not is_delta))


def combine_deltas(
    name: str, terms: Sequence[tuple[SparseTensor, float]], dtype: torch.dtype, method: Method
) -> tuple[Tensor, Tensor]:
    """The change that the method computes from all α · delta: indices [n], and values [n] of `dtype`."""
    union = kernels.unite([tensor.indices for tensor, _ in terms])
    zeros = torch.zeros(union.indices.numel(), dtype=dtype, device=union.indices.device)
    indices, values, _ = combine(name, terms, union, zeros, method, deltas=True)
    return indices, values


def overflow(name: str, dtype: torch.dtype, base: Tensor | None = None) -> AdapterError:
    """The error for a tensor whose combined values are not finite. base: the base's values there, if there is one."""
    broken = 0 if base is None else int((~base.isfinite()).sum())
    if broken:
        return AdapterError(
            f"{broken} of the entries of '{name}' that the adapters change are infinite or NaN in the base; mend it, or "
            "give the tensor the strength 0"
        )
    return AdapterError(f"'{name}' would overflow {dtype} at these strengths; use smaller ones")
