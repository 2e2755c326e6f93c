"""Check that an adapter belongs to a model: names, shapes and the fingerprints of base values must agree."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import kernels
from ..adapter import Adapter
from ..errors import AdapterError, BaseMismatch, did_you_mean
from ..files.metadata import check_metadata
from ..sparse.memory_order import is_in_order
from ..sparse.tensor import FLOAT_DTYPES, SparseTensor, dtype_name, fingerprint, has_memory, is_dense
from ..texts import described
from .model_tensors import OFFLOADED
from .quantized import is_quantized, is_wrapper, shape_of

__all__ = [
    "Identifies",
    "check_adapter",
    "check_base",
    "check_fingerprint",
    "check_tensor",
    "identifying",
    "values_at",
    "weight_of",
]

Identifies = Callable[[str, SparseTensor], bool]  # name of a tensor, and the adapter's part of it


def values_at(weight: Tensor, indices: Tensor) -> Tensor:
    """A weight's values at flat positions [k], on the weight's device. An adapter's positions may be on another one."""
    return kernels.gather(weight.detach(), indices.to(weight.device))


def check_base(
    label: str, adapter: Adapter, tensors: Mapping[str, Tensor], base_at: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Raise BaseMismatch unless each tensor exists with the adapter's shape and, for overwrites, the recorded base values.

    A tensor that is overwritten whole may be a classifier's head, which is random at each load. So its base values are compared
    only if all tensors are overwritten whole, since then nothing else identifies the base.
    label: the adapter's name in messages. base_at(weight, indices): the base values at indices.
    Raises AdapterError if the metadata are not well formed.
    """
    check_adapter(label, adapter)
    identifies = identifying(adapter)
    for name in adapter.tensors:
        check_tensor(label, name, adapter, tensors, base_at, identifies)


def check_adapter(label: str, adapter: Adapter) -> None:
    """Check an adapter's metadata, and its tensors if they are in memory. Raises AdapterError, which starts with the label."""
    try:
        adapter.check()
        check_metadata(adapter.metadata)
    except AdapterError as error:
        raise AdapterError(f"{label}: {error}") from None


def check_tensor(
    label: str,
    name: str,
    adapter: Adapter,
    tensors: Mapping[str, Tensor],
    base_at: Callable[[Tensor, Tensor], Tensor],
    identifies: Identifies,
) -> None:
    """`check_base` for one tensor. Adapter and model may be files: one tensor at a time is read and freed.

    identifies: `identifying(adapter)`.
    """
    sparse = adapter.tensors[name]
    weight = weight_of(label, name, sparse, tensors, to_overwrite=True)
    if identifies(name, sparse):
        check_fingerprint(label, name, adapter, base_at(weight, sparse.indices), weight.dtype)


def identifying(adapter: Adapter) -> Identifies:
    """A function: do the base values under this tensor of the adapter show whether a base is the adapter's? See `check_base`.

    Those under a delta do not, because a delta may be added to another base.
    """

    @functools.cache  # the adapter may be a file, and is looked through once at the most
    def in_part() -> bool:
        return any(t.kind == "overwrite" and t.nnz < t.numel and n in adapter.fingerprints for n, t in adapter.tensors.items())

    def identifies(name: str, sparse: SparseTensor) -> bool:
        known = sparse.kind == "overwrite" and name in adapter.fingerprints
        return known and (sparse.nnz < sparse.numel or not in_part())

    return identifies


def weight_of(
    label: str, name: str, sparse: SparseTensor, tensors: Mapping[str, Tensor], *, to_overwrite: bool = False
) -> Tensor:
    """The model's tensor of this name. Raises BaseMismatch unless it is dense and has the sparse tensor's shape.

    to_overwrite: it must also be possible to overwrite its entries: a floating-point tensor, not quantized, whose entries lie
    in memory without gaps, in any order of its dimensions.
    """
    weight = tensors.get(name)  # read once: it may be in a file
    if weight is None:
        raise BaseMismatch(f"{label} does not belong to this model: it has no tensor '{name}'; {_instead(name, tensors)}")
    if not isinstance(weight, Tensor):
        raise BaseMismatch(f"{label}: '{name}' must be a tensor of the base, found {described(weight)}")
    if to_overwrite and is_quantized(weight):
        raise BaseMismatch(f"{label}: '{name}' is quantized in this model; give a plain base, or fuse deltas without one")
    if not is_dense(weight):
        raise BaseMismatch(
            f"{label}: '{name}' must be a dense tensor, not a sparse, nested or negated one, found {weight.layout}; replace it "
            "by a dense one"
        )
    if to_overwrite and is_wrapper(weight):
        raise BaseMismatch(
            f"{label}: '{name}' must be a plain tensor, found a {type(weight).__name__}, which consists of other tensors; load "
            "the base with plain weights"
        )
    if shape_of(weight) != sparse.shape:
        raise BaseMismatch(
            f"{label} does not belong to this model: '{name}' has shape {list(shape_of(weight))}, the adapter expects "
            f"{list(sparse.shape)}"
        )
    if to_overwrite and (weight.dtype not in FLOAT_DTYPES or weight.is_meta):
        found, do = dtype_name(weight.dtype), f"load the base as one of {', '.join(map(dtype_name, FLOAT_DTYPES))}"
        if weight.is_meta:
            found, do = "one without data, on the meta device", f"{do}; {OFFLOADED}"
        raise BaseMismatch(f"{label}: '{name}' must be a floating-point tensor with data, found {found}; {do}")
    if to_overwrite and not is_in_order(weight):
        raise BaseMismatch(
            f"{label}: '{name}' must be contiguous, or a contiguous tensor whose dimensions were permuted; found strides "
            f"{list(weight.stride())} for shape {list(weight.shape)}; replace it by its contiguous()"
        )
    if to_overwrite and not has_memory(weight):
        raise BaseMismatch(f"{label}: the memory of '{name}' was freed; load the model again")
    return weight


def _instead(name: str, tensors: Mapping[str, Tensor]) -> str:
    layer, _, own = name.rpartition(".")
    if f"{layer}.base_layer.{own}" in tensors:
        return "PEFT has wrapped this layer; unload its adapters first (unload(), or a pipeline's unload_lora_weights())"
    if f"module.{name}" in tensors:
        return "it is in a wrapper, as those of DistributedDataParallel and AveragedModel; give the model inside, model.module"
    return did_you_mean(name, tensors)


def check_fingerprint(label: str, name: str, adapter: Adapter, values: Tensor, dtype: torch.dtype) -> None:
    """Raise BaseMismatch unless base values have the fingerprint that the adapter records. dtype: of the weight."""
    expected = adapter.fingerprints[name]
    found = fingerprint(values, like=expected)
    if found != expected:
        recorded = adapter.metadata.get("base") or {}
        known = recorded.get("dtype")
        cast = ""
        if isinstance(known, str) and known != dtype_name(dtype):
            call = f"shira convert ADAPTER --base BASE --dtype {dtype_name(dtype)}"
            cast = f"; if this is that base in another dtype, cast the adapter, too: {call}"
        raise BaseMismatch(
            f"{label} does not belong to this model: the base values under '{name}' have fingerprint {found}, the "
            f"adapter says {expected} (base: {recorded.get('id', 'unknown')}, {recorded.get('dtype', 'unknown')}; this "
            f"tensor: {dtype_name(dtype)}). Load that base, in that dtype; "
            f"a model of the same name may have other values{cast}"
        )
