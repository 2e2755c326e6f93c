"""Several adapters into one: on sorted positions, never dense."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import kernels
from .adapter import Adapter, SparseTensor, fingerprint
from .errors import AdapterError, BaseMismatch, did_you_mean
from .format import load

__all__ = ["METHODS", "check_base", "check_strengths", "fuse", "weighted_sum"]

Base = nn.Module | Mapping[str, Tensor]
Part = tuple[SparseTensor, float]
METHODS = ("sum",)


def fuse(
    adapters: Mapping[str | os.PathLike[str], float] | Mapping[str, tuple[Adapter, float]],
    base: Base | None = None,
    method: str = "sum",
) -> Adapter:
    """One adapter with the effect of several: base + Σ αᵢ · (valuesᵢ − base) (SHiRA §3.2 and Appendix I, arXiv 2406.13175).

    adapters: file -> strength α, or name -> (Adapter, strength).
    base: the model, or its tensors by name; needed unless all adapters are deltas, whose sum is a delta again.
    The sum is taken in float32 in the order of the names, and rounded once; an entry that one adapter alone touches at
    strength 1 gets its value bit for bit.

    Raises AdapterError, FormatError or BaseMismatch.

        both = shira.fuse({"poet.safetensors": 1.0, "coder.safetensors": 0.5}, base=model)
    """
    if method not in METHODS:
        raise AdapterError(f"unknown fusion method {method!r}; {did_you_mean(method, METHODS)}")
    if not adapters:
        raise AdapterError("nothing to fuse: give at least one adapter")
    loaded: dict[str, tuple[Adapter, float]] = {}
    for key, value in adapters.items():
        loaded[str(key)] = value if isinstance(value, tuple) else (load(key), value)
    strengths = check_strengths({name: strength for name, (_, strength) in loaded.items()})
    tensors = _tensors_of(base) if base is not None else {}
    if base is not None:
        for name, (adapter, _) in loaded.items():
            check_base(name, adapter, tensors, _gather_anywhere)
    fused: dict[str, SparseTensor] = {}
    prints: dict[str, str] = {}
    for tensor_name in sorted({n for adapter, _ in loaded.values() for n in adapter.tensors}):
        parts = [
            (loaded[name][0].tensors[tensor_name], strengths[name])
            for name in sorted(loaded)
            if tensor_name in loaded[name][0].tensors
        ]
        if base is not None:
            indices, values, below = weighted_sum(parts, functools.partial(_gather_anywhere, tensors[tensor_name]))
            fused[tensor_name] = SparseTensor(parts[0][0].shape, indices.cpu(), values.cpu())
            prints[tensor_name] = fingerprint(below)
        else:
            fused[tensor_name] = _sum_of_deltas(tensor_name, parts)
    first = loaded[min(loaded)][0].metadata
    metadata = {
        "name": "+".join(adapter.name or os.path.basename(name) for name, (adapter, _) in sorted(loaded.items())),
        "base": first.get("base"),
        "fused": {"method": method, "strengths": {os.path.basename(name): s for name, s in sorted(strengths.items())}},
        "license": first.get("license"),
        "fingerprints": prints,
    }
    return Adapter(fused, {key: value for key, value in metadata.items() if value})


def weighted_sum(parts: Sequence[Part], base_at: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """base + Σ α · (value − base) over the union of the positions, for one tensor.

    parts: (SparseTensor, α) in the order of summation. base_at: positions [n] -> base values [n].
    Returns indices int64 [n], values [n] and base values [n], both in the base's dtype.
    """
    device = parts[0][0].indices.device
    union = torch.unique(torch.cat([tensor.indices for tensor, _ in parts])).long()
    base = base_at(union).to(device)
    total = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    touched = torch.zeros(union.numel(), dtype=torch.int32, device=device)
    places = []
    for tensor, strength in parts:
        place = torch.searchsorted(union, tensor.indices.long())
        values = tensor.values.to(total.dtype)
        change = values - base[place].to(total.dtype) if tensor.kind == "overwrite" else values
        total[place] += strength * change
        touched[place] += 1
        places.append(place)
    result = total.to(base.dtype)
    for (tensor, strength), place in zip(parts, places, strict=True):
        if tensor.kind == "overwrite" and strength == 1:
            alone = touched[place] == 1
            result[place[alone]] = tensor.values[alone].to(base.dtype)
    return union, result, base


def check_base(
    label: str, adapter: Adapter, tensors: Mapping[str, Tensor], base_at: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Raise BaseMismatch unless each tensor exists with the adapter's shape and, for overwrites, the recorded base values.

    label: what to call the adapter in the message. base_at(weight, indices): the base values there.
    """
    for name, sparse in adapter.tensors.items():
        weight = tensors.get(name)
        if weight is None:
            raise BaseMismatch(
                f"{label} does not belong to this model: it has no tensor '{name}'; {did_you_mean(name, tensors)}"
            )
        if tuple(weight.shape) != sparse.shape:
            raise BaseMismatch(
                f"{label} does not belong to this model: '{name}' has shape {list(weight.shape)}, the adapter expects "
                f"{list(sparse.shape)}"
            )
        if not weight.is_floating_point() or weight.is_meta or not weight.is_contiguous():
            raise BaseMismatch(f"{label}: '{name}' must be a contiguous floating-point tensor with data, found {weight.dtype}")
        expected = adapter.fingerprints.get(name)
        if expected is None or sparse.kind == "delta":
            continue
        found = fingerprint(base_at(weight, sparse.indices))
        if found != expected:
            recorded = adapter.metadata.get("base") or {}
            raise BaseMismatch(
                f"{label} does not belong to this model: the base values under '{name}' have fingerprint {found}, the "
                f"adapter says {expected} (base: {recorded.get('id', 'unknown')}, {recorded.get('dtype', 'unknown')}; this "
                f"tensor: {str(weight.dtype).removeprefix('torch.')}). Load that base, in that dtype"
            )


def check_strengths(strengths: Mapping[str, float]) -> dict[str, float]:
    """The strengths as floats. Raises AdapterError for one that is no finite number."""
    for name, strength in strengths.items():
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not abs(strength) < float("inf"):
            raise AdapterError(f"the strength of {name!r} must be a finite number, found {strength!r}")
    return {name: float(strength) for name, strength in strengths.items()}


def _sum_of_deltas(name: str, parts: Sequence[Part]) -> SparseTensor:
    """Σ α · delta, in the dtype that holds all of them."""
    shapes = {tensor.shape for tensor, _ in parts}
    if len(shapes) > 1:
        raise AdapterError(f"'{name}' has different shapes in the adapters: {sorted(map(list, shapes))}")
    if any(tensor.kind == "overwrite" for tensor, _ in parts):
        raise AdapterError(f"'{name}' holds overwritten values: fusing them needs the base they were trained on, pass base=")
    dtype = parts[0][0].values.dtype
    for tensor, _ in parts:
        dtype = torch.promote_types(dtype, tensor.values.dtype)
    indices, values, _ = weighted_sum(parts, lambda where: torch.zeros(where.numel(), dtype=dtype))
    return SparseTensor(parts[0][0].shape, indices, values, "delta")


def _gather_anywhere(weight: Tensor, indices: Tensor) -> Tensor:
    return kernels.gather(weight, indices.to(weight.device))


def _tensors_of(base: Base) -> Mapping[str, Tensor]:
    return dict(base.named_parameters(remove_duplicate=False)) if isinstance(base, nn.Module) else base
