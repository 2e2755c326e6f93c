"""Fuse several adapters into one: on sorted positions, never dense, one tensor at a time."""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import kernels
from ..adapter import Adapter, as_stored, opened
from ..errors import AdapterError, BaseMismatch
from ..sparse.tensor import Kind, SparseTensor, fingerprint
from ..texts import described
from ..weights.belonging import Identifies, check_adapter, check_fingerprint, identifying, weight_of
from ..weights.distributed import is_sharded
from ..weights.model_tensors import named_tensors
from ..weights.owners import claim
from .combining import combination, combine, combine_deltas
from .methods import Method, resolve
from .strengths import CheckedStrength, File, Strength, as_given, check_strengths, given_strengths, strengths_of

__all__ = ["fuse"]

Base = nn.Module | Mapping[str, Tensor]
Item = TypeVar("Item")


def fuse(
    adapters: Mapping[File, Strength] | Mapping[str, tuple[Adapter, Strength]],
    base: Base | None = None,
    method: str = "sum",
    **options: float,
) -> Adapter:
    """One adapter with the effect of several: base + the change that `method` computes from all α · (values − base).

    adapters: file -> strength α, or name -> (Adapter, strength). A strength is a number, below 0 to negate; or a mapping from
        patterns to numbers, such as `{"*": 1.0, "*.mlp.*": 0.5}`. The last pattern that matches a tensor's name counts.
    base: the model, with no adapter active and no tuner attached; or its tensors by name, which are taken as they are. It is
        not needed if all adapters are deltas; then the result is a delta, too.
    method: "sum", "mean", "max", "ties" (density=0.2) or "dare" (drop=0.5, seed=0). See docs/fusion.md.

    Everything is computed in float32 (float64 for float64), in the order of the names, and rounded once. An entry that only one
    adapter changes, at strength 1, gets that adapter's value bit for bit. Files are read one tensor at a time.

    SHiRA §3.2 and Appendix I, arXiv 2406.13175. Raises AdapterError or BaseMismatch; FormatError, HubError or
    OSError for a file.

        both = shira.fuse({"poet.safetensors": 1.0, "coder.safetensors": 0.5}, base=model, method="ties", density=0.5)
    """
    chosen = resolve(method, options)
    given = given_strengths("shira.fuse", adapters)
    strengths = check_strengths({label: strength for label, (_, strength) in given.items()})
    if base is not None and not isinstance(base, nn.Module | Mapping):
        raise AdapterError(f"base must be a model, loaded, or its tensors by name; found {described(base)}")
    if isinstance(base, nn.Module):
        claim(base, "", BaseMismatch)  # with an adapter in it, it is not the base
    weights = named_tensors(base) if isinstance(base, nn.Module) else base
    sharded = next((name for name, weight in (weights or {}).items() if is_sharded(weight)), None)
    if sharded is not None:
        raise BaseMismatch(f"'{sharded}' is sharded in this base; give a whole one, or let Switcher.use fuse on the model")
    with contextlib.ExitStack() as stack:
        parts = {
            label: content if isinstance(content, Adapter) else stack.enter_context(opened(content))
            for label, (content, _) in given.items()
        }
        for label, part in parts.items():
            check_adapter(label, part)
        if weights is None:
            _check_recorded_bases(parts)
        identifies = {label: identifying(part) for label, part in parts.items()}
        wanted: dict[str, dict[str, float]] = {}  # tensor name -> {label: strength}
        for label, part in parts.items():
            for name, strength in strengths_of(label, strengths[label], part.tensors).items():
                if strength != 0:
                    wanted.setdefault(name, {})[label] = strength

        def fuse_one(name: str) -> tuple[SparseTensor, str | None]:
            held = {label: as_stored(parts[label], name) for label in wanted[name]}
            if weights is None:
                return _fused_deltas(name, held, wanted[name], chosen), None
            return _fused_over(name, held, wanted[name], parts, weights, chosen, identifies)

        fused = dict(zip(sorted(wanted), _in_threads(fuse_one, sorted(wanted)), strict=True))
        metadata = _metadata(parts, strengths, chosen, {name: found for name, (_, found) in fused.items() if found})
        return Adapter({name: tensor for name, (tensor, _) in fused.items()}, metadata)


def _in_threads(work: Callable[[str], Item], names: Sequence[str]) -> Iterator[Item]:
    """Call `work` with each name, in as many threads as torch uses. Yields the results in order.

    Threads help, because much of the work is reading, hashing and copying, which release the interpreter's lock.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        contexts = [contextvars.copy_context() for _ in names]  # a context variable says which backend is forced
        yield from pool.map(lambda context, name: context.run(work, name), contexts, names)


def _check_recorded_bases(adapters: Mapping[str, Adapter]) -> None:
    """Raise BaseMismatch if the adapters record different bases. Without a base to compare with, nothing else detects that."""
    known = {label: str(base["id"]) for label, each in adapters.items() if (base := each.metadata.get("base") or {}).get("id")}
    if len({os.path.basename(base.rstrip("/")) for base in known.values()}) > 1:
        named = ", ".join(f"{label}: {base}" for label, base in known.items())
        raise BaseMismatch(f"the adapters were trained on different bases ({named}); pass the one to apply them to as base=")


def _fused_over(
    name: str,
    held: Mapping[str, SparseTensor],
    strengths: Mapping[str, float],
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, Tensor],
    method: Method,
    identifies: Mapping[str, Identifies],
) -> tuple[SparseTensor, str]:
    """One fused tensor over a base, and the fingerprint of the base values there. The adapters are checked first."""
    for label, tensor in held.items():
        weight_of(label, name, tensor, weights, to_overwrite=True)
    weight = weights[name].detach()
    labels = list(held)

    def check(number: int, under: Tensor) -> None:
        label = labels[number]
        if identifies[label](name, held[label]):
            check_fingerprint(label, name, adapters[label], under, weight.dtype)

    terms = [(tensor, strengths[label]) for label, tensor in held.items()]
    in_place = [combination(terms, weight, weight.dtype, method)] if weight.is_contiguous() else []
    (fused,) = kernels.combine_all(in_place) or [None]
    if fused is not None:
        for number, under in enumerate(fused.under):
            check(number, under)
        whole = _sparse(name, tuple(weight.shape), fused.indices, fused.values, "overwrite", SparseTensor.of_kernel)
        return whole, fingerprint(fused.base)
    union = kernels.unite([tensor.indices for tensor, _ in terms])
    base = kernels.gather(weight, union.indices.to(weight.device)).to(union.indices.device)
    indices, values, base = combine(name, terms, union, base, method, check=check)
    return _sparse(name, tuple(weight.shape), indices, values, "overwrite"), fingerprint(base)


def _fused_deltas(name: str, held: Mapping[str, SparseTensor], strengths: Mapping[str, float], method: Method) -> SparseTensor:
    """A fused delta from deltas, in the dtype to which all of theirs promote."""
    terms = [(tensor, strengths[label]) for label, tensor in held.items()]
    shapes = {tensor.shape for tensor in held.values()}
    if len(shapes) > 1:
        raise AdapterError(f"'{name}' has different shapes in the adapters: {sorted(map(list, shapes))}")
    if any(tensor.kind == "overwrite" for tensor in held.values()):
        raise AdapterError(f"'{name}' holds overwritten values: fusing them needs the base they were trained on, pass base=")
    dtype = terms[0][0].values.dtype
    for tensor, _ in terms:
        dtype = torch.promote_types(dtype, tensor.values.dtype)
    (fused,) = kernels.combine_all([combination(terms, None, dtype, method)])
    if fused is not None:
        return _sparse(name, terms[0][0].shape, fused.indices, fused.values, "delta", SparseTensor.of_kernel)
    indices, values = combine_deltas(name, terms, dtype, method)
    return _sparse(name, terms[0][0].shape, indices, values, "delta")


def _sparse(
    name: str,
    shape: tuple[int, ...],
    indices: Tensor,
    values: Tensor,
    kind: Kind,
    make: Callable[[tuple[int, ...], Tensor, Tensor, Kind], SparseTensor] = SparseTensor,
) -> SparseTensor:
    """A fused tensor. Raises AdapterError if its values are not finite."""
    try:
        return make(shape, indices.cpu(), values.cpu(), kind)
    except AdapterError as error:
        raise AdapterError(f"'{name}' as {values.dtype}: {error}; use smaller strengths, or check the base") from error


def _metadata(
    adapters: Mapping[str, Adapter], strengths: Mapping[str, CheckedStrength], method: Method, prints: dict[str, str]
) -> dict[str, Any]:
    """The fused adapter's metadata, with everything that is needed to fuse again."""
    files = {label: os.path.basename(label) for label in adapters}
    if len(set(files.values())) < len(files):
        files = {label: label for label in adapters}
    first = next(iter(adapters.values())).metadata
    metadata = {
        "name": "+".join(each.name or os.path.basename(label) for label, each in adapters.items()),
        "base": first.get("base"),
        "fused": method.described() | {"strengths": {files[label]: as_given(value) for label, value in strengths.items()}},
        "license": first.get("license"),
        "fingerprints": prints,
    }
    return {key: value for key, value in metadata.items() if value}
