"""Several adapters into one: on sorted positions, never dense, one tensor at a time."""

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import kernels
from .adapter import Adapter, Kind, SparseTensor, check_metadata, fingerprint
from .distributed import is_sharded
from .errors import AdapterError, BaseMismatch, did_you_mean
from .format import Gaps, as_stored, opened
from .kernels import Change, Fused, Overlap
from .methods import Method, Part, resolve
from .model_tensors import named_tensors
from .quantized import is_quantized, shape_of
from .strengths import Fixed, Strength, as_given, check_strengths, given_strengths, strengths_of
from .texts import described

__all__ = ["check_base", "check_described", "check_tensor", "combine", "fuse", "known_in_part"]

Base = nn.Module | Mapping[str, Tensor]
Item = TypeVar("Item")


def fuse(
    adapters: Mapping[str | os.PathLike[str], Strength] | Mapping[str, tuple[Adapter, Strength]],
    base: Base | None = None,
    method: str = "sum",
    **options: float,
) -> Adapter:
    """One adapter with the effect of several: base + what `method` makes of their changes α · (values − base).

    adapters: file -> strength α, or name -> (Adapter, strength). A strength is a number, below 0 to negate; or pattern ->
        number, of which the last that fits a tensor's name counts, as in {"*": 1.0, "*.mlp.*": 0.5}.
    base: the model, or its tensors by name; needed unless all adapters are deltas, which make a delta again.
    method: "sum", "mean", "max", "ties" (density=0.2) or "dare" (drop=0.5, seed=0): docs/fusion.md.

    All is computed in float32, in the order of the names, and rounded once; an entry that one adapter alone touches at
    strength 1 gets its value bit for bit. Files are read a tensor at a time.

    SHiRA §3.2 and Appendix I, arXiv 2406.13175. Raises AdapterError, FormatError or BaseMismatch.

        both = shira.fuse({"poet.safetensors": 1.0, "coder.safetensors": 0.5}, base=model, method="ties", density=0.5)
    """
    chosen = resolve(method, options)
    given = given_strengths("shira.fuse", adapters)
    strengths = check_strengths({label: strength for label, (_, strength) in given.items()})
    if base is not None and not isinstance(base, nn.Module | Mapping):
        raise AdapterError(f"base must be a model, loaded, or its tensors by name; found {described(base)}")
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
            check_described(label, part)
        if weights is None:
            _check_recorded_bases(parts)
        in_part = {label: known_in_part(part) for label, part in parts.items()}
        scales = {label: strengths_of(label, strengths[label], part.tensors) for label, part in parts.items()}
        wanted: dict[str, dict[str, float]] = {}
        for label, scale in scales.items():
            for name, strength in scale.items():
                if strength != 0:
                    wanted.setdefault(name, {})[label] = strength

        def fuse_one(name: str) -> tuple[SparseTensor, str | None]:
            held = {label: as_stored(parts[label], name) for label in wanted[name]}
            if weights is None:
                return _fused_deltas(name, held, wanted[name], chosen), None
            return _fused_over(name, held, wanted[name], parts, weights, chosen, in_part)

        fused = dict(zip(sorted(wanted), _side_by_side(fuse_one, sorted(wanted)), strict=True))
        metadata = _metadata(parts, strengths, chosen, {name: found for name, (_, found) in fused.items() if found})
        return Adapter({name: tensor for name, (tensor, _) in fused.items()}, metadata)


def _side_by_side(work: Callable[[str], Item], names: Sequence[str]) -> Iterator[Item]:
    """`work` on each name, in as many threads as torch has. A tensor to a thread needs no more from torch's operators than
    that thread: so much of this is reading, hashing and copying that they would mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            contexts = [contextvars.copy_context() for _ in names]  # which backend is forced
            yield from pool.map(lambda context, name: context.run(work, name), contexts, names)
    finally:
        torch.set_num_threads(threads)


def combine(
    name: str,
    parts: Sequence[tuple[SparseTensor, float]],
    overlap: Overlap,
    base: Tensor,
    method: Method,
    *,
    deltas: bool = False,
    check: Callable[[int, Tensor], None] = lambda number, base: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """base + what the method makes of the changes α · (value − base), for the tensor of this name.

    parts: (SparseTensor, α) in the order of summation. overlap: where their positions meet, n of them. base: [n], the values
    there. deltas: the parts are deltas, the result is to be one, and the base is zeros. check: called with the number of each
    overwrite and the base values under it, widened.
    Returns indices [at most n], values and base values there, both in the base's dtype.
    """
    wide = base.to(torch.promote_types(base.dtype, torch.float32))
    pieces, exact = [], []
    for number, ((tensor, strength), place) in enumerate(zip(parts, overlap.places, strict=True)):
        values = tensor.values if tensor.kind == "delta" else tensor.values.to(base.dtype)
        change = values.to(wide.dtype)
        if tensor.kind == "overwrite":
            under = wide.index_select(0, place)
            check(number, under)
            change = torch.sub(change, under, out=under)
        if strength != 1:
            change = strength * change
        piece, factor = method.thin(Part(name, tensor.indices, values, change, place))
        pieces.append(piece)
        exact.append(strength * factor == 1 and (deltas or tensor.kind == "overwrite"))
    if method.thins:
        left = kernels.merge([piece.places for piece in pieces])
        overlap = Overlap(overlap.indices[left.indices], left.places, left.counts)
        base, wide = base[left.indices], wide[left.indices]
    result = (wide + method.combine([piece.change for piece in pieces], overlap)).to(base.dtype)
    alone = torch.empty_like(result) if all(exact) else result.clone()
    for piece, place, is_exact in zip(pieces, overlap.places, exact, strict=True):
        if is_exact:
            kernels.overwrite_(alone, place, piece.values.to(base.dtype))
    return overlap.indices, torch.where(overlap.counts == 1, alone, result), base


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
    weight = _check_form(label, name, sparse, tensors)
    if _tells(name, sparse, adapter, in_part):
        _check_print(label, name, adapter, fingerprint(base_at(weight, sparse.indices)), weight.dtype)


def known_in_part(adapter: Adapter) -> Callable[[], bool]:
    """Whether the base is known by a tensor that is overwritten in part; looked for when it is asked, once."""
    return functools.cache(
        lambda: any(
            sparse.kind == "overwrite" and sparse.nnz < sparse.numel and name in adapter.fingerprints
            for name, sparse in adapter.tensors.items()
        )
    )


def _tells(name: str, sparse: SparseTensor, adapter: Adapter, in_part: Callable[[], bool]) -> bool:
    """Whether the values under a tensor say if the base is the adapter's. A delta may be added to another base."""
    if sparse.kind == "delta" or name not in adapter.fingerprints:
        return False
    return sparse.nnz < sparse.numel or not in_part()


def _check_form(label: str, name: str, sparse: SparseTensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight of this name, if a sparse tensor fits it."""
    weight = tensors.get(name)
    if weight is None:
        raise BaseMismatch(f"{label} does not belong to this model: it has no tensor '{name}'; {did_you_mean(name, tensors)}")
    if not isinstance(weight, Tensor):
        raise BaseMismatch(f"{label}: '{name}' must be a tensor of the base, found {described(weight)}")
    if is_quantized(weight):
        raise BaseMismatch(f"{label}: '{name}' is quantized in this model; give a plain base, or fuse deltas without one")
    if shape_of(weight) != sparse.shape:
        raise BaseMismatch(
            f"{label} does not belong to this model: '{name}' has shape {list(shape_of(weight))}, the adapter expects "
            f"{list(sparse.shape)}"
        )
    if not weight.is_floating_point() or weight.is_meta or not weight.is_contiguous():
        raise BaseMismatch(f"{label}: '{name}' must be a contiguous floating-point tensor with data, found {weight.dtype}")
    return weight


def _check_print(label: str, name: str, adapter: Adapter, found: str, dtype: torch.dtype) -> None:
    """Compare the fingerprint of base values with that of those which an adapter was trained over."""
    expected = adapter.fingerprints[name]
    if found != expected:
        recorded = adapter.metadata.get("base") or {}
        raise BaseMismatch(
            f"{label} does not belong to this model: the base values under '{name}' have fingerprint {found}, the "
            f"adapter says {expected} (base: {recorded.get('id', 'unknown')}, {recorded.get('dtype', 'unknown')}; this "
            f"tensor: {str(dtype).removeprefix('torch.')}). Load that base, in that dtype"
        )


def _check_recorded_bases(parts: Mapping[str, Adapter]) -> None:
    """Without a base to compare with: adapters that name different ones are not to be summed by mistake."""
    known = {label: str(base["id"]) for label, part in parts.items() if (base := part.metadata.get("base") or {}).get("id")}
    if len({os.path.basename(base.rstrip("/")) for base in known.values()}) > 1:
        named = ", ".join(f"{label}: {base}" for label, base in known.items())
        raise BaseMismatch(f"the adapters were trained on different bases ({named}); pass the one to apply them to as base=")


def _fused_over(
    name: str,
    held: Mapping[str, SparseTensor],
    scale: Mapping[str, float],
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, Tensor],
    method: Method,
    in_part: Mapping[str, Callable[[], bool]],
) -> tuple[SparseTensor, str]:
    """One tensor's new entries over a base, checked first; and the fingerprint of the base there."""
    for label, tensor in held.items():
        _check_form(label, name, tensor, weights)
    weight = weights[name].detach()
    telling = {
        number: label
        for number, (label, tensor) in enumerate(held.items())
        if _tells(name, tensor, adapters[label], in_part[label])
    }

    def check(number: int, found: str) -> None:
        _check_print(telling[number], name, adapters[telling[number]], found, weight.dtype)

    parts = [(tensor, scale[label]) for label, tensor in held.items()]
    fused = _in_one_pass(parts, weight, weight.dtype, method)
    if fused is not None:
        base_print, *prints = kernels.fingerprints([fused.base, *(fused.under[number] for number in telling)])
        for number, found in zip(telling, prints, strict=True):
            check(number, found)
        return _sparse(name, tuple(weight.shape), fused.indices, fused.values, "overwrite", SparseTensor.of_kernel), base_print

    def check_under(number: int, under: Tensor) -> None:
        if number in telling:
            check(number, fingerprint(under))

    overlap = kernels.merge([tensor.indices for tensor, _ in parts])
    base = kernels.gather(weight, overlap.indices.to(weight.device)).to(overlap.indices.device)
    indices, values, base = combine(name, parts, overlap, base, method, check=check_under)
    return _sparse(name, tuple(weight.shape), indices, values, "overwrite"), fingerprint(base)


def _fused_deltas(name: str, held: Mapping[str, SparseTensor], scale: Mapping[str, float], method: Method) -> SparseTensor:
    """A delta from deltas, in the dtype that holds all of them."""
    parts = [(tensor, scale[label]) for label, tensor in held.items()]
    shapes = {tensor.shape for tensor in held.values()}
    if len(shapes) > 1:
        raise AdapterError(f"'{name}' has different shapes in the adapters: {sorted(map(list, shapes))}")
    if any(tensor.kind == "overwrite" for tensor in held.values()):
        raise AdapterError(f"'{name}' holds overwritten values: fusing them needs the base they were trained on, pass base=")
    dtype = parts[0][0].values.dtype
    for tensor, _ in parts:
        dtype = torch.promote_types(dtype, tensor.values.dtype)
    fused = _in_one_pass(parts, None, dtype, method)
    if fused is not None:
        return _sparse(name, parts[0][0].shape, fused.indices, fused.values, "delta", SparseTensor.of_kernel)
    overlap = kernels.merge([tensor.indices for tensor, _ in parts])
    zeros = torch.zeros(overlap.indices.numel(), dtype=dtype, device=overlap.indices.device)
    indices, values, _ = combine(name, parts, overlap, zeros, method, deltas=True)
    return _sparse(name, parts[0][0].shape, indices, values, "delta")


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


def _in_one_pass(
    parts: Sequence[tuple[SparseTensor, float]], weight: Tensor | None, dtype: torch.dtype, method: Method
) -> Fused | None:
    """What `combine` would return over the base in `weight`, or over zeros, where a kernel does it all at once; else None."""
    gaps = kernels.takes_gaps(weight, sum(tensor.nnz for tensor, _ in parts))
    changes = [
        Change(
            tensor.units if gaps and isinstance(tensor, Gaps) else tensor.indices,
            tensor.values if tensor.kind == "delta" else tensor.values.to(dtype),
            strength,
            tensor.kind == "delta",
            strength == 1 and (weight is None or tensor.kind == "overwrite"),
        )
        for tensor, strength in parts
    ]
    return kernels.fused(weight, changes, dtype, method.name, parts[0][0].numel)


def _metadata(
    parts: Mapping[str, Adapter], strengths: Mapping[str, Fixed], method: Method, prints: dict[str, str]
) -> dict[str, Any]:
    """The fused adapter's, with all that it takes to fuse again."""
    files = {label: os.path.basename(label) for label in parts}
    if len(set(files.values())) < len(files):
        files = {label: label for label in parts}
    first = next(iter(parts.values())).metadata
    metadata = {
        "name": "+".join(part.name or os.path.basename(label) for label, part in parts.items()),
        "base": first.get("base"),
        "fused": method.described() | {"strengths": {files[label]: as_given(value) for label, value in strengths.items()}},
        "license": first.get("license"),
        "fingerprints": prints,
    }
    return {key: value for key, value in metadata.items() if value}
