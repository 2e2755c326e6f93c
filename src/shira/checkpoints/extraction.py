"""Extract a sparse adapter from a full fine-tune: the entries of ΔW = tuned − base that matter, and how much they keep."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import masks
from ..adapter import Adapter
from ..errors import AdapterError, CheckpointError, MaskError, TargetError, did_you_mean
from ..files.metadata import base_facts
from ..files.paths import path_of
from ..files.writing import saving
from ..sparse.positions import index_dtype
from ..sparse.tensor import Kind, SparseTensor, bytes_of, dtype_name, fingerprint
from ..texts import as_share, described, plain_number, shown
from ..weights.targets import KEYWORDS
from .differences import Cut, ProgressCount, Survey, TensorPair, chunks, cut, enough, largest, paired, square_of, survey
from .sources import Checkpoint, CheckpointSource, base_tensors, identity, tensors_of

__all__ = ["Scope", "check_options", "extract", "extract_to", "summary"]

Scope = Literal["tensor", "model"]
CURVE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # densities that a summary tries
ENOUGH = 0.9  # share of ‖ΔW‖; a summary suggests the smallest of these densities that keeps this share
SPARSE = 0.1  # share of all entries that an exact adapter may hold at most


def extract(
    base: CheckpointSource,
    tuned: CheckpointSource,
    *,
    density: float | None = None,
    keep: float | None = None,
    scope: Scope = "tensor",
    kind: Kind = "overwrite",
    targets: str | Iterable[str] | None = None,
    name: str | None = None,
    license: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Adapter:
    """An adapter that turns `base` into `tuned` as far as a budget allows: the entries with the largest |ΔW|.

    base, tuned: checkpoint folders, safetensors files, models, or mappings of tensors, with the same names, shapes and
        dtypes. Either checkpoint may hold only one of several tied tensors. A model that is the base must have no adapter
        active and no tuner attached. Of `tuned` the weights are taken as they are.
    density: the share of entries to take: of each tensor that differs (scope "tensor"), or of all of these together (scope
        "model"). Among equal |ΔW| (in float32) the first positions win; over a model, the alphabetically first tensors.
        None takes every entry whose bits differ, if these are at most 10 % of the checkpoint's entries.
    keep: instead, the share of ‖ΔW‖ to keep, of each tensor or of the whole model, with as few entries as that takes.
    kind: "overwrite" holds the tuned values, bit for bit; "delta" holds the differences, in float32 (float64 for float64).
    targets: the tensors to take entries from, all by default: names of tensors or modules, or suffixes of them; "attention",
        "mlp"; or a regular expression on whole names. Differences in other tensors count as lost.
    on_progress: called with the share of the work that is done, 0 to 1.

    Checkpoints on disk are read piece by piece. The adapter is held in memory; `extract_to` writes it to a file instead.
    `summary(adapter)` says how much of ΔW is kept, and what other densities would keep.

    Raises CheckpointError if the checkpoints cannot be read, do not match, do not differ, or differ too much for `density`
    None; MaskError for another density or keep, or for both; TargetError for targets that match nothing; AdapterError for
    another scope or kind.

        shira.extract("SmolLM2-135M", "SmolLM2-135M-Instruct", density=0.05).save("instruct.safetensors")
    """
    tensors: dict[str, SparseTensor] = {}
    metadata = _extract(
        base,
        tuned,
        tensors.__setitem__,
        density=density,
        keep=keep,
        scope=scope,
        kind=kind,
        targets=targets,
        name=name,
        license=license,
        on_progress=on_progress,
    )
    return Adapter(tensors, metadata)


def extract_to(path: str | os.PathLike[str], base: CheckpointSource, tuned: CheckpointSource, **options: Any) -> None:
    """Write the file that `extract(base, tuned, **options).save(path)` would write, byte for byte, one tensor at a time.

    Only the entries taken from one tensor are in memory.
    Raises what `extract` raises, or OSError. Then a file that already has this name is unchanged.

        shira.checkpoints.extraction.extract_to("instruct.safetensors", "SmolLM2-135M", "SmolLM2-135M-Instruct", density=0.05)
    """
    path = path_of(path, "extract_to('instruct.safetensors', base, tuned)", AdapterError)
    for source in (base, tuned) if os.path.exists(path) else ():
        if isinstance(source, str | os.PathLike) and any(file.samefile(path) for file in Checkpoint(source).shards):
            raise CheckpointError(f"{path} is a file of {identity(source)}, which is read; name another one")
    metadata: dict[str, Any] = {}
    with saving(path, metadata) as add:
        metadata |= _extract(base, tuned, add, **options)


def _extract(
    base: CheckpointSource,
    tuned: CheckpointSource,
    receive: Callable[[str, SparseTensor], None],
    *,
    density: float | None = None,
    keep: float | None = None,
    scope: Scope = "tensor",
    kind: Kind = "overwrite",
    targets: str | Iterable[str] | None = None,
    name: str | None = None,
    license: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Call `receive` with the adapter's tensors, one by one. Returns the adapter's metadata."""
    density, keep = plain_number(density), plain_number(keep)
    check_options(density, keep, scope, kind, name, license)
    before, after = base_tensors(base), tensors_of(tuned)
    chosen = _chosen(targets, sorted(set(before) | set(after)))
    pairs, not_compared = paired(before, after, chosen)
    watch = ProgressCount(3 * sum(pair.numel for pair in pairs), on_progress)
    surveys = []
    for pair in pairs:
        try:
            found = survey(pair, watch)
        except CheckpointError:
            if pair.name in chosen:
                raise
            not_compared.append(pair.name)  # integers that differ, or a NaN: no error if it is no target
            continue
        if found.changed:
            surveys.append(found)
    in_reach = [found for found in surveys if found.pair.name in chosen]
    if not in_reach:
        raise CheckpointError(
            f"{identity(tuned) or 'tuned'} differs nowhere from {identity(base) or 'base'}; nothing to extract"
        )
    watch.total = watch.done + 2 * sum(found.pair.numel for found in in_reach)
    groups = [in_reach] if scope == "model" else [[found] for found in in_reach]  # each group has one budget
    facts = {"tuned": identity(tuned), "scope": scope} | _facts(pairs, surveys, groups)
    if density is None and keep is None:
        _check_sparse(facts, sum(found.changed for found in in_reach))
    taken: dict[str, _Taken] = {}
    for group in groups:
        level = cut(group, enough(group, keep) if keep else _budget(group, density or 1.0), watch)
        for found in group:
            sparse, part = _take(found.pair, level, kind, watch)
            if sparse.nnz:
                receive(found.pair.name, sparse)
                taken[found.pair.name] = part
            del sparse
    facts |= _facts_taken(surveys, taken) | {"not_compared": sorted(not_compared)}
    dtypes = [dtype_name(found.pair.dtype) for found in in_reach]
    metadata = {
        "name": name or identity(tuned),
        "mask": {"name": "extracted", **({"keep": keep} if keep else {"density": density or "exact"}), "scope": scope},
        "base": base_facts(identity(base), dtypes),
        "extraction": facts,
        "license": license,
        "fingerprints": {tensor: part.fingerprint for tensor, part in taken.items()},
    }
    return {key: value for key, value in metadata.items() if value}


def check_options(
    density: float | None, keep: float | None, scope: Scope, kind: Kind, name: str | None, license: str | None, dense: str = ""
) -> None:
    """Raise AdapterError or MaskError for options that `extract` refuses, whatever the checkpoints are.

    dense: what changes every entry, such as "x.safetensors is a LoRA": then density or keep must be given.
    """
    if dense and density is None and keep is None:
        raise MaskError(
            f"{dense}, which changes every entry of its weights: say how many to take, by density=0.01, or which share of ‖ΔW‖ "
            "to keep, by keep=0.9"
        )
    for what, value, known in (("scope", scope, get_args(Scope)), ("kind", kind, get_args(Kind))):
        if not isinstance(value, str) or value not in known:
            raise AdapterError(f"unknown {what} {shown(value)}; {did_you_mean(str(value), known)}")
    for what, number in (("density", density), ("keep", keep)):
        if number is not None and (type(number) not in (int, float) or not 0 < number <= 1):
            raise MaskError(f"{what} must be above 0 and at most 1, found {described(number)}{as_share(number)}")
    if density is not None and keep is not None:
        raise MaskError(f"density={density} and keep={keep} both say how many entries to take; give one of them")
    for what, text in (("name", name), ("license", license)):
        if text is not None and not isinstance(text, str):
            raise AdapterError(f"{what} must be a text, found {described(text)}")


def summary(adapter: Adapter) -> dict[str, Any]:
    """What `extract` found, from the adapter's metadata. Shares are of the Frobenius norm ‖ΔW‖, not of its square.

    - `kept`: the share of ‖ΔW‖ that the adapter keeps. `norm`: ‖ΔW‖.
    - `entries`, `changed`: how many entries were compared, and how many of them differ.
    - `curve`: [density, kept] for several densities, accurate to half a percent.
    - `suggested_density`: the smallest of these densities that keeps 90 %; None if none does.
    - `tensors`: name -> entries, changed, norm, kept, for each tensor that differs.
    - `left_out`: the tensors that differ and from which nothing is taken.
    - `not_compared`: tensors that are no targets and are in one checkpoint only, have two forms, or differ in values that are
      not finite or not floating point.

    Raises AdapterError if the adapter was not extracted.
    """
    found = adapter.metadata.get("extraction") if isinstance(adapter, Adapter) else None
    if not isinstance(found, dict):
        raise AdapterError("the adapter's metadata has no 'extraction': it was not made by shira.extract")
    return found


class _Taken(NamedTuple):
    fingerprint: str  # of the base values at the entries that are taken
    square: float  # Σ ΔW² over these entries


def _budget(group: Sequence[Survey], density: float) -> int:
    return masks.budget((sum(found.pair.numel for found in group),), density=density)


def _take(pair: TensorPair, level: Cut, kind: Kind, watch: ProgressCount) -> tuple[SparseTensor, _Taken]:
    """The entries that a cut takes from one tensor. Subtracts the ties that it takes from `level.ties`."""
    held = pair.dtype if kind == "overwrite" else torch.promote_types(pair.dtype, torch.float32)
    indices, values, below, square = bytearray(), bytearray(), bytearray(), 0.0  # many small tensors would fragment the heap
    for chunk in chunks(pair, watch):
        take = chunk.rank > level.rank
        if level.ties:
            equal = (chunk.rank == level.rank).nonzero().view(-1)[: level.ties]
            level.ties -= equal.numel()
            take[equal] = True
        where = take.nonzero().view(-1)
        indices += _bytes((where + chunk.start).to(index_dtype(pair.numel)))
        values += _bytes((chunk.after if kind == "overwrite" else chunk.change)[where])
        below += _bytes(chunk.before[where])
        square += square_of(chunk.change[where])
    positions, held_values = _tensor(indices, index_dtype(pair.numel)), _tensor(values, held)
    return SparseTensor(pair.shape, positions, held_values, kind), _Taken(fingerprint(_tensor(below, pair.dtype)), square)


def _bytes(tensor: Tensor) -> memoryview:
    return bytes_of(tensor).numpy().data


def _tensor(content: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype, device="cpu")


def _facts(pairs: Sequence[TensorPair], surveys: Sequence[Survey], groups: Sequence[Sequence[Survey]]) -> dict[str, Any]:
    """The part of the summary that describes ΔW, independent of what is taken."""
    whole = sum(found.square for found in surveys)
    parts = [largest(group, [_budget(group, density) for density in CURVE]) for group in groups]
    curve = [[density, _share(sum(squares), whole)] for density, squares in zip(CURVE, zip(*parts, strict=True), strict=True)]
    return {
        "norm": whole**0.5,
        "entries": sum(pair.numel for pair in pairs),
        "changed": sum(found.changed for found in surveys),
        "curve": curve,
        "suggested_density": next((density for density, share in curve if share >= ENOUGH), None),
    }


def _facts_taken(surveys: Sequence[Survey], taken: Mapping[str, _Taken]) -> dict[str, Any]:
    """The part of the summary that describes what is taken, and what is not."""
    tensors = {}
    for found in surveys:
        name, part = found.pair.name, taken.get(found.pair.name)
        tensors[name] = {
            "entries": found.pair.numel,
            "changed": found.changed,
            "norm": found.square**0.5,
            "kept": _share(part.square, found.square) if part else 0.0,
        }
    return {
        "kept": _share(sum(part.square for part in taken.values()), sum(found.square for found in surveys)),
        "tensors": tensors,
        "left_out": [name for name in tensors if name not in taken],
    }


def _share(part: float, whole: float) -> float:
    """A share of a norm, from two sums of squares; 1 if the norm is 0."""
    return min(1.0, part / whole) ** 0.5 if whole else 1.0


def _check_sparse(facts: Mapping[str, Any], changed: int) -> None:
    """Raise CheckpointError, with densities to try, if an exact adapter would not be sparse."""
    entries, suggested = facts["entries"], facts["suggested_density"]
    if changed <= SPARSE * entries:
        return
    kept = ", ".join(f"{density:g} keeps {share:.0%}" for density, share in facts["curve"] if density in (0.01, 0.05, 0.2))
    raise CheckpointError(
        f"{changed:,} of {entries:,} entries differ ({changed / entries:.1%}), an exact adapter holds at most {SPARSE:.0%}. "
        f"Give the share to take, density=; of the difference's norm {kept}"
        + (f"; {suggested:g} is the least tried that keeps {ENOUGH:.0%}" if suggested else "")
    )


def _chosen(targets: str | Iterable[str] | None, names: Sequence[str]) -> set[str]:
    """The names of the tensors that `targets` means. Raises TargetError if any part of it matches nothing."""
    if targets is None:
        return set(names)
    if targets == "all-linear":
        raise TargetError("a checkpoint does not say which tensors are linear layers; give names, or leave targets out for all")
    if not isinstance(targets, str):
        wanted = list(targets) if isinstance(targets, Iterable) else [targets]
        for given in wanted:
            if not isinstance(given, str):
                raise TargetError(f"targets are names, as in ['q_proj', 'v_proj'], or a pattern; found {described(given)}")
        for given in wanted or [""]:
            if not given or not any(_matches(name, given) for name in names):
                raise TargetError(f"target {given!r} matches no tensor; {did_you_mean(given, _words(names))}")
        return {name for name in names if any(_matches(name, given) for given in wanted)}
    if targets in KEYWORDS:
        found = {name for name in names if any(KEYWORDS[targets].search(part) for part in name.split("."))}
    else:
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise TargetError(f"targets {targets!r} is not a regular expression: {error}") from error
        found = {name for name in names if pattern.fullmatch(name) or pattern.fullmatch(_module(name))}
    if not found:
        raise TargetError(f"targets {targets!r} match no tensor; {did_you_mean(targets, _words(names))}")
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _matches(name: str, given: str) -> bool:
    return any(word == given or word.endswith("." + given) for word in (name, _module(name)))


def _words(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_module(name).rpartition(".")[2] or name for name in names))
