"""An adapter in another dtype: for a base that was cast, such as a model that trained in float32 and is served in bfloat16."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import kernels
from ..adapter import Adapter
from ..errors import AdapterError
from ..files.checkpoint import Checkpoint
from ..sparse.tensor import FLOAT_DTYPES, SparseTensor, dtype_name, fingerprint
from ..texts import described
from ..weights.belonging import check_base
from .renaming import names_in, renamed
from .sources import CheckpointSource, base_tensors

__all__ = ["cast"]


def cast(adapter: Adapter, base: CheckpointSource, dtype: torch.dtype) -> Adapter:
    """The adapter for its base in another dtype.

    With it, the cast base has the bits of the base with the adapter, cast. Every entry stays, also one whose value is the
    base's after the cast. Deltas stay as they are, and are added to the cast base.

    base: the adapter's base as it trained: a model, a checkpoint's folder or .safetensors file, or tensors by name.
    dtype: float32, bfloat16, float16 or float64.

    Raises BaseMismatch if the base is another one, AdapterError for another dtype, or for values that it does not hold.
    """
    if dtype not in FLOAT_DTYPES:
        found = dtype_name(dtype) if isinstance(dtype, torch.dtype) else described(dtype)
        raise AdapterError(f"dtype must be one of {', '.join(map(dtype_name, FLOAT_DTYPES))}; found {found}")
    label, weights = "the adapter", base_tensors(base)
    names = names_in(weights, {label: adapter}) if isinstance(weights, Checkpoint) else {}
    check_base(label, renamed(adapter, names), weights, kernels.gather)
    tensors, prints = {}, dict(adapter.fingerprints)
    for name, tensor in adapter.tensors.items():
        tensors[name] = tensor if tensor.kind == "delta" else _cast(name, tensor, dtype)
        if name in prints:
            base_values: Tensor = kernels.gather(weights[names.get(name, name)], tensor.indices)
            prints[name] = fingerprint(base_values.to(dtype), like=prints[name])
    metadata = dict(adapter.metadata)
    if isinstance(metadata.get("base"), Mapping):
        metadata["base"] = {**metadata["base"], "dtype": dtype_name(dtype)}
    return Adapter(tensors, metadata | ({"fingerprints": prints} if prints else {}))


def _cast(name: str, tensor: SparseTensor, dtype: torch.dtype) -> SparseTensor:
    try:
        return SparseTensor(tensor.shape, tensor.indices, tensor.values.to(dtype), tensor.kind)
    except AdapterError as error:
        raise AdapterError(f"'{name}' holds values that {dtype_name(dtype)} does not: {error}") from error
