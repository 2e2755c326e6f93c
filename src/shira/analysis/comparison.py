"""Compare adapters: where they overlap, how orthogonal they are, how far apart they are, and the rank of their changes.

ΔW is what an adapter changes: value − base for an overwrite, the value itself for a delta. It is computed in float64. Tensors
are read one by one, so only one tensor of a base in a folder is in memory at a time.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter import Adapter, load
from ..checkpoints.sources import CheckpointSource, base_tensors
from ..errors import AdapterError, BaseMismatch
from ..files.paths import AnyPath
from ..sparse.tensor import SparseTensor, all_finite
from ..texts import described
from ..weights.belonging import check_adapter, check_tensor, identifying, values_at
from .spectra import as_matrix, gram, spectrum

__all__ = ["BINS", "AdapterPair", "Change", "Comparison", "TensorComparison", "compare", "deltas", "named"]

BINS = tuple(round(-10 + 0.2 * step, 1) for step in range(66))  # edges of the histogram, log10 |ΔW|

LINES, LINES_AN_ENTRY = 2**24, 64  # without a base, rows + columns may be LINES + LINES_AN_ENTRY · entries


@dataclasses.dataclass(frozen=True)
class Change:
    """What one adapter changes in one tensor; or in all tensors: then counts and norms are of all, and ranks are means.

    entries: the number of positions it holds. changed: the number of these where ΔW is not zero.
    l2: ‖ΔW‖, the distance to the base (Table 13).
    lora_rank: entries / (rows + columns): the rank of a LoRA with as many parameters. The rank of that LoRA's ΔW is at
        most this (Lemma 4.2).
    rank, stable_rank, effective_rank: of ΔW (`spectra.Spectrum`). effective_rank_error: of an estimated effective_rank,
        see docs/analysis.md; 0 where it is computed.
    lora_energy: the largest share of ‖ΔW‖² that a LoRA of rank lora_rank can hold.
    The last five are None without spectra. rank and lora_energy are also None where singular values were estimated.
    """

    entries: int
    changed: int
    l2: float
    lora_rank: float
    rank: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    effective_rank_error: float | None = None
    lora_energy: float | None = None


@dataclasses.dataclass(frozen=True)
class AdapterPair:
    """How two adapters relate, in one tensor or in all. An adapter does not change a tensor that it lacks.

    shared: the number of positions that both hold. overlap: shared as a share of the smaller adapter's positions.
    jaccard: shared as a share of the union of positions.
    awom: ‖A₁ᵀA₂‖ (§4.2), the Frobenius norm. awom_relative: awom / (‖A₁‖ · ‖A₂‖), at most 1.
    awor: 1 − ‖A₁ᵀA₂‖₀ / n² (§4.2): the share of entries (i, j) of A₁ᵀA₂ to which no row contributes: no row is changed both by
        the first adapter in column i and by the second in column j. It is exact.
    cancelled: the share of entries that have terms, but whose terms add up to 0.0 in float64. awor does not count them, because
        the order of a sum decides whether floats cancel.
    cosine: that of ΔW₁ and ΔW₂; None where one is zero. distance: ‖ΔW₁ − ΔW₂‖ (Table 13).
    conflicts: the number of shared positions where the changes differ in sign.
    shared_mass, conflict_mass: the shares of Σ (|ΔW₁| + |ΔW₂|) that are at shared positions, and at conflicts.
    """

    first: str
    second: str
    shared: int
    overlap: float
    jaccard: float
    awom: float
    awom_relative: float
    awor: float
    cancelled: float
    cosine: float | None
    distance: float
    conflicts: int
    shared_mass: float
    conflict_mass: float


@dataclasses.dataclass(frozen=True)
class TensorComparison:
    """One tensor, or all (shape None): a Change for each adapter that holds it, an AdapterPair for each two adapters."""

    shape: tuple[int, ...] | None
    changes: dict[str, Change]
    pairs: list[AdapterPair]

    def pair(self, first: str, second: str) -> AdapterPair:
        """The pair of two adapters, in either order. Raises KeyError if there is none."""
        for pair in self.pairs:
            if {pair.first, pair.second} == {first, second}:
                return pair
        raise KeyError((first, second))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found: for each tensor, in total, and a histogram of each adapter's changes.

    histograms: adapter -> counts of (negative, positive) ΔW by log10 |ΔW| between the edges BINS. Values beyond the edges are
        counted in the outermost bins. Zeros are not counted.
    """

    adapters: list[str]
    tensors: dict[str, TensorComparison]
    total: TensorComparison
    histograms: dict[str, tuple[list[int], list[int]]]

    def as_dict(self) -> dict[str, Any]:
        """All fields and the bins, as values that JSON can hold."""
        return {**dataclasses.asdict(self), "bins": list(BINS)}


def compare(
    *adapters: Adapter | AnyPath,
    base: CheckpointSource | None = None,
    spectra: bool = True,
    on_progress: Callable[[int, str], None] = lambda done, name: None,
) -> Comparison:
    """Overlap, AWOM, AWOR (SHiRA §4.2, arXiv 2406.13175), distance, cosine, sign conflicts and rank, by tensor and in total.

    adapters: one or more Adapters or files. They are called by their names, or their files' names.
    base: the model, with no adapter active and no tuner attached; its tensors by name, or a checkpoint folder. It is needed
        unless all are deltas. It is checked that the adapters belong to it.
    spectra: whether to compute singular values, which takes most of the time.
    on_progress(tensors done, tensor's name) is called after each tensor.

    Raises AdapterError, BaseMismatch or CheckpointError; FormatError, HubError or OSError for a file.

        found = shira.compare("spam.safetensors", "questions.safetensors", base=model)
        found.total.pairs[0].awor, found.tensors["model.layers.0.mlp.up_proj.weight"].changes["spam"].effective_rank
    """
    loaded = named(adapters)
    names = list(loaded)
    parts: dict[str, TensorComparison] = {}
    pair_sums = {pair: _Sums() for pair in itertools.combinations(names, 2)}
    histograms = {name: torch.zeros(2, len(BINS) - 1, dtype=torch.int64, device="cpu") for name in names}
    for tensor_name, shape, changes in deltas(loaded, base):
        matrices = {name: as_matrix(shape, tensor.indices, tensor.values) for name, tensor in changes.items()}
        found: dict[str, Change] = {}
        for name, tensor in changes.items():
            found[name] = _change(tensor, matrices[name], spectra)
            histograms[name] += _histogram(tensor.values)
        no_values = torch.empty(0, dtype=torch.float64, device="cpu")
        nothing = SparseTensor(shape, no_values.long(), no_values, "delta")
        empty = as_matrix(shape, nothing.indices, nothing.values)
        pairs = []
        for (first, second), before in pair_sums.items():
            if first in changes or second in changes:
                both = matrices.get(first, empty), matrices.get(second, empty)
                sums = _sums_of(changes.get(first, nothing), changes.get(second, nothing), both)
                pair_sums[first, second] = before.plus(sums)
                pairs.append(sums.pair(first, second))
        parts[tensor_name] = TensorComparison(shape, found, pairs)
        on_progress(len(parts), tensor_name)
    total = TensorComparison(
        None,
        {name: _in_all([part.changes[name] for part in parts.values() if name in part.changes]) for name in names},
        [sums.pair(first, second) for (first, second), sums in pair_sums.items()],
    )
    counts = {name: (counts[0].tolist(), counts[1].tolist()) for name, counts in histograms.items()}
    return Comparison(names, parts, total, counts)


def named(adapters: Sequence[Adapter | AnyPath]) -> dict[str, Adapter]:
    """Adapters by their names, or their files' names. Files are read. An adapter whose name is taken is renamed with a number.

    Raises AdapterError if there are none, or FormatError.
    """
    if not adapters:
        raise AdapterError("nothing to compare: give at least one adapter")
    found: dict[str, Adapter] = {}
    for number, given in enumerate(adapters, start=1):
        if not isinstance(given, Adapter | str | os.PathLike):
            raise AdapterError(
                f"adapters are given one by one, as in shira.compare('poet.safetensors', coder); found {described(given)}"
            )
        adapter = given if isinstance(given, Adapter) else load(given)
        label = adapter.name or (str(number) if isinstance(given, Adapter) else Path(given).stem)
        check_adapter(label, adapter)
        label = next(each for each in _numbered(label) if each not in found)
        found[label] = Adapter(adapter.tensors, {**adapter.metadata, "name": label})
    return found


def _numbered(label: str) -> Iterator[str]:
    yield label
    yield from (f"{label} ({number})" for number in itertools.count(2))


def deltas(
    adapters: Mapping[str, Adapter], base: CheckpointSource | None, only: str | None = None
) -> Iterator[tuple[str, tuple[int, ...], dict[str, SparseTensor]]]:
    """For each tensor its name, its shape, and ΔW of each adapter that holds it: a float64 delta at its positions, on the CPU.

    only: the one tensor that is wanted. Raises what `compare` raises.
    """
    tensors = base_tensors(base) if base is not None else None
    names = sorted({name for adapter in adapters.values() for name in adapter.tensors})
    identifies = {name: identifying(adapter) for name, adapter in adapters.items()}
    for tensor_name in names if only is None else [only]:
        held = {name: adapter.tensors[tensor_name] for name, adapter in adapters.items() if tensor_name in adapter.tensors}
        shapes = {tensor.shape for tensor in held.values()}
        if tensors is None and len(shapes) > 1:
            raise AdapterError(f"'{tensor_name}' has different shapes in the adapters: {sorted(map(list, shapes))}")
        for name, tensor in held.items() if tensors is None else ():
            sides = (tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.shape else (1, 1)
            if sum(sides) > LINES + LINES_AN_ENTRY * tensor.nnz:
                raise AdapterError(
                    f"{name}: '{tensor_name}' states the shape {list(tensor.shape)} for {tensor.nnz} entries; comparing takes "
                    "memory for every row and column, which is only taken if a base has them too: pass base="
                )
        changes = {}
        for name, tensor in held.items():
            values = tensor.values.cpu().double()
            if tensors is not None:
                check_tensor(name, tensor_name, adapters[name], tensors, values_at, identifies[name])
            if tensor.kind == "overwrite":
                if tensors is None:
                    raise AdapterError(
                        f"{name}: '{tensor_name}' holds overwritten values: comparing them needs the base they were trained "
                        "on, pass base="
                    )
                values = values - values_at(tensors[tensor_name], tensor.indices).cpu().double()
                if not all_finite(values):
                    raise BaseMismatch(f"{name}: the base holds NaN or infinite values under '{tensor_name}'; repair it first")
            changes[name] = SparseTensor(tensor.shape, tensor.indices.cpu(), values, "delta")
        yield tensor_name, next(iter(shapes)), changes


def _change(tensor: SparseTensor, matrix: Tensor, spectra: bool) -> Change:
    lora_rank = tensor.nnz / max(1, sum(matrix.shape))
    plain = Change(tensor.nnz, matrix.values().numel(), float(tensor.values.norm()), lora_rank)
    if not spectra:
        return plain
    found = spectrum(matrix)
    return dataclasses.replace(
        plain,
        rank=found.rank,
        stable_rank=found.stable_rank,
        effective_rank=found.effective_rank,
        effective_rank_error=found.error or 0.0,
        lora_energy=found.energy(lora_rank),
    )


def _in_all(changes: Sequence[Change]) -> Change:
    """The Change of all tensors together: counts are added, ranks are averaged; the norm and the energy are those of all."""

    def mean(field: str) -> float | None:
        known = [value for change in changes if (value := getattr(change, field)) is not None]
        return sum(known) / len(known) if known else None

    errors = [change.effective_rank_error for change in changes if change.effective_rank_error is not None]
    energies = [(change.l2**2, change.lora_energy) for change in changes if change.lora_energy is not None]
    whole = sum(square for square, _ in energies)
    return Change(
        sum(change.entries for change in changes),
        sum(change.changed for change in changes),
        math.hypot(*(change.l2 for change in changes)),
        mean("lora_rank") or 0.0,
        mean("rank"),
        mean("stable_rank"),
        mean("effective_rank"),
        math.hypot(*errors) / len(errors) if errors else None,
        sum(square * share for square, share in energies) / whole if whole else None,
    )


class _Sums(NamedTuple):
    """Quantities that add up over tensors."""

    first_entries: int = 0
    second_entries: int = 0
    shared: int = 0
    conflicts: int = 0
    first_squares: float = 0.0  # Σ ΔW₁²
    second_squares: float = 0.0
    dot: float = 0.0  # Σ ΔW₁ · ΔW₂
    distance: float = 0.0  # Σ (ΔW₁ − ΔW₂)²
    mass: float = 0.0  # Σ (|ΔW₁| + |ΔW₂|)
    shared_mass: float = 0.0
    conflict_mass: float = 0.0
    size: int = 0  # entries of A₁ᵀA₂
    nonzero: int = 0
    cancelled: int = 0
    product_squares: float = 0.0

    def plus(self, other: "_Sums") -> "_Sums":
        """The two sums added."""
        return _Sums._make(one + another for one, another in zip(self, other, strict=True))

    def pair(self, first: str, second: str) -> AdapterPair:
        """The AdapterPair that follows from the sums."""
        norms = math.sqrt(self.first_squares) * math.sqrt(self.second_squares)
        awom = math.sqrt(self.product_squares)
        return AdapterPair(
            first,
            second,
            shared=self.shared,
            overlap=self.shared / max(1, min(self.first_entries, self.second_entries)),
            jaccard=self.shared / max(1, self.first_entries + self.second_entries - self.shared),
            awom=awom,
            awom_relative=awom / norms if norms else 0.0,
            awor=1 - self.nonzero / max(1, self.size),
            cancelled=self.cancelled / max(1, self.size),
            cosine=self.dot / norms if norms else None,
            distance=math.sqrt(self.distance),
            conflicts=self.conflicts,
            shared_mass=self.shared_mass / self.mass if self.mass else 0.0,
            conflict_mass=self.conflict_mass / self.mass if self.mass else 0.0,
        )


def _sums_of(one: SparseTensor, other: SparseTensor, matrices: tuple[Tensor, Tensor]) -> _Sums:
    """The sums of two adapters in one tensor."""
    product = gram(*matrices)
    shared_one = torch.isin(one.indices, other.indices, assume_unique=True)
    shared_other = torch.isin(other.indices, one.indices, assume_unique=True)
    a, b = one.values[shared_one], other.values[shared_other]  # sorted by position, so they match
    opposed = torch.signbit(a).ne(torch.signbit(b)) & (a != 0) & (b != 0)
    magnitude = a.abs() + b.abs()
    alone = one.values[~shared_one].square().sum() + other.values[~shared_other].square().sum()
    return _Sums(
        first_entries=one.nnz,
        second_entries=other.nnz,
        shared=a.numel(),
        conflicts=int(opposed.sum()),
        first_squares=float(one.values.square().sum()),
        second_squares=float(other.values.square().sum()),
        dot=float(a @ b),
        distance=float(alone + (a - b).square().sum()),
        mass=float(one.values.abs().sum() + other.values.abs().sum()),
        shared_mass=float(magnitude.sum()),
        conflict_mass=float(magnitude[opposed].sum()),
        size=matrices[0].shape[1] * matrices[1].shape[1],
        nonzero=product.nonzero,
        cancelled=product.cancelled,
        product_squares=product.squares,
    )


def _histogram(values: Tensor) -> Tensor:
    """Counts [2, bins] of the negative and of the positive values, by magnitude."""
    edges = torch.tensor(BINS[1:-1], dtype=torch.float64, device="cpu")
    signs = [values[values < 0].abs(), values[values > 0]]
    return torch.stack([torch.bincount(torch.bucketize(v.log10(), edges), minlength=len(BINS) - 1) for v in signs])
