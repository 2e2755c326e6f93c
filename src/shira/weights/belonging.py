"""Check that an adapter belongs to a model: names, shapes and the fingerprints of base values must agree."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import AdapterError, BaseMismatch, did_you_mean
from ..files.metadata import check_metadata
from ..sparse.tensor import SparseTensor, dtype_name, fingerprint
from ..texts import described
from .quantized import is_quantized, shape_of

__all__ = [
    "check_base",
    "check_described",
    "check_fingerprint",
    "check_tensor",
    "known_in_part",
    "tells_base",
    "weight_of",
]


def check_base(
    label: str, adapter: Adapter, tensors: Mapping[str, Tensor], base_at: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Raise BaseMismatch unless each tensor exists with the adapter's shape and, for overwrites, the recorded base values.

    A tensor that is overwritten whole may be a classifier's head, which is random at each load. So its base values are compared
    only if all tensors are overwritten whole, since then nothing else identifies the base.
    label: the adapter's name in messages. base_at(weight, indices): the base values at indices.
    Raises AdapterError if the metadata are not well formed.
    """
    check_described(label, adapter)
    in_part = known_in_part(adapter)
    for name in adapter.tensors:
        check_tensor(label, name, adapter, tensors, base_at, in_part)


def check_described(label: str, adapter: Adapter) -> None:
    """Check an adapter's metadata. Raises AdapterError, whose message starts with the label."""
    try:
        check_metadata(adapter.metadata)
    except AdapterError as error:
        raise AdapterError(f"{label}: {error}") from None


def check_tensor(
    label: str,
    name: str,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    base_at: Callable[[Tensor, Tensor], Tensor],
    in_part: Callable[[], bool],
) -> None:
    """`check_base` for one tensor. Adapter and model may be files: one tensor at a time is read and freed.

    in_part: `known_in_part(adapter)`.
    """
    sparse = adapter.tensors[name]
    weight = weight_of(label, name, sparse, tensors, to_overwrite=True)
    if tells_base(name, sparse, adapter, in_part):
        check_fingerprint(label, name, adapter, base_at(weight, sparse.indices), weight.dtype)


def known_in_part(adapter: Adapter) -> Callable[[], bool]:
    """A function: does any tensor that is overwritten in part identify the base? It looks only once, at its first call."""
    return functools.cache(
        lambda: any(
            sparse.kind == "overwrite" and sparse.nnz < sparse.numel and name in adapter.fingerprints
            for name, sparse in adapter.tensors.items()
        )
    )


def tells_base(name: str, sparse: SparseTensor, adapter: Adapter, in_part: Callable[[], bool]) -> bool:
    """Whether the base values of a tensor can tell if the base is the adapter's. A delta may be added to another base."""
    if sparse.kind == "delta" or name not in adapter.fingerprints:
        return False
    return sparse.nnz < sparse.numel or not in_part()


def weight_of(
    label: str, name: str, sparse: SparseTensor, tensors: Mapping[str, Tensor], *, to_overwrite: bool = False
) -> Tensor:
    """The model's tensor of this name. Raises BaseMismatch unless it has the sparse tensor's shape.

    to_overwrite: it must also be possible to overwrite its entries: a contiguous floating-point tensor, not quantized.
    """
    weight = tensors.get(name)  # read once: it may be in a file
    if weight is None:
        raise BaseMismatch(f"{label} does not belong to this model: it has no tensor '{name}'; {did_you_mean(name, tensors)}")
    if not isinstance(weight, Tensor):
        raise BaseMismatch(f"{label}: '{name}' must be a tensor of the base, found {described(weight)}")
    if to_overwrite and is_quantized(weight):
        raise BaseMismatch(f"{label}: '{name}' is quantized in this model; give a plain base, or fuse deltas without one")
    if shape_of(weight) != sparse.shape:
        raise BaseMismatch(
            f"{label} does not belong to this model: '{name}' has shape {list(shape_of(weight))}, the adapter expects "
            f"{list(sparse.shape)}"
        )
    if to_overwrite and (not weight.is_floating_point() or weight.is_meta or not weight.is_contiguous()):
        raise BaseMismatch(f"{label}: '{name}' must be a contiguous floating-point tensor with data, found {weight.dtype}")
    return weight


def check_fingerprint(label: str, name: str, adapter: Adapter, values: Tensor, dtype: torch.dtype) -> None:
    """Raise BaseMismatch unless base values have the fingerprint that the adapter records. dtype: of the weight."""
    expected = adapter.fingerprints[name]
    found = fingerprint(values, like=expected)
    if found != expected:
        recorded = adapter.metadata.get("base") or {}
        raise BaseMismatch(
            f"{label} does not belong to this model: the base values under '{name}' have fingerprint {found}, the "
            f"adapter says {expected} (base: {recorded.get('id', 'unknown')}, {recorded.get('dtype', 'unknown')}; this "
            f"tensor: {dtype_name(dtype)}). Load that base, in that dtype; "
            "a model of the same name may have other values"
        )
