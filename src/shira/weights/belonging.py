"""Does an adapter belong to a model? Its names, its shapes and the fingerprints of its base values must agree."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import AdapterError, BaseMismatch, did_you_mean
from ..files.metadata import check_metadata
from ..sparse.tensor import SparseTensor, fingerprint
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

    A tensor that is overwritten whole, such as the head of a classifier, which is random whenever it is made, is compared only
    if all of them are: then nothing else tells the base.
    label: what to call the adapter in the message. base_at(weight, indices): the base values there.
    """
    check_described(label, adapter)
    in_part = known_in_part(adapter)
    for name in adapter.tensors:
        check_tensor(label, name, adapter, tensors, base_at, in_part)


def check_described(label: str, adapter: Adapter) -> None:
    """`check_metadata` of an adapter. Raises AdapterError with the label."""
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
    """`check_base` of one tensor; either side may be in a file, and is given back here. in_part: `known_in_part(adapter)`."""
    sparse = adapter.tensors[name]
    weight = weight_of(label, name, sparse, tensors, to_overwrite=True)
    if tells_base(name, sparse, adapter, in_part):
        check_fingerprint(label, name, adapter, base_at(weight, sparse.indices), weight.dtype)


def known_in_part(adapter: Adapter) -> Callable[[], bool]:
    """Whether the base is known by a tensor that is overwritten in part; looked for when it is asked, once."""
    return functools.cache(
        lambda: any(
            sparse.kind == "overwrite" and sparse.nnz < sparse.numel and name in adapter.fingerprints
            for name, sparse in adapter.tensors.items()
        )
    )


def tells_base(name: str, sparse: SparseTensor, adapter: Adapter, in_part: Callable[[], bool]) -> bool:
    """Whether the values under a tensor say if the base is the adapter's. A delta may be added to another base."""
    if sparse.kind == "delta" or name not in adapter.fingerprints:
        return False
    return sparse.nnz < sparse.numel or not in_part()


def weight_of(
    label: str, name: str, sparse: SparseTensor, tensors: Mapping[str, Tensor], *, to_overwrite: bool = False
) -> Tensor:
    """The model's tensor of this name, if it has the sparse tensor's shape.

    to_overwrite: its entries must be plain, so that they can be overwritten. Raises BaseMismatch.
    """
    weight = tensors.get(name)  # read once: it may lie in a file
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
    """Compare base values with the fingerprint that an adapter says they have. dtype: the weight's, for the message."""
    expected = adapter.fingerprints[name]
    found = fingerprint(values, like=expected)
    if found != expected:
        recorded = adapter.metadata.get("base") or {}
        raise BaseMismatch(
            f"{label} does not belong to this model: the base values under '{name}' have fingerprint {found}, the "
            f"adapter says {expected} (base: {recorded.get('id', 'unknown')}, {recorded.get('dtype', 'unknown')}; this "
            f"tensor: {str(dtype).removeprefix('torch.')}). Load that base, in that dtype"
        )
