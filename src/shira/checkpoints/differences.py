"""ΔW, the difference between two checkpoints, one piece of a tensor at a time; and where its largest entries are.

The k largest |ΔW| are found by counting, not by sorting. The bits of float32 numbers without a sign have the same order as the
numbers. A histogram of the upper bits says in which bin the k-th largest number is. A histogram of the lower bits within that
bin gives the number itself. Only counts are held of the entries that are not taken, so a budget for a whole model takes no more
memory than one for a tensor.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.tensorfiles import Form
from ..sparse.tensor import FLOAT_DTYPES, dtype_name
from .sources import form_of, pieces_of

__all__ = [
    "Cut",
    "ProgressCount",
    "Survey",
    "TensorPair",
    "chunks",
    "cut",
    "enough",
    "largest",
    "paired",
    "square_of",
    "survey",
]

CHUNK = 2**16  # entries processed together; they fit the processor's cache
LOW = 15  # number of lower bits of a rank; the 16 bits above them are its bin
BINS = 2**16
FINITE = 0x7F7FFFFF  # the bits of the largest float32
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an entry -> the dtype that shows its bits


class TensorPair(NamedTuple):
    """A tensor in both checkpoints."""

    name: str
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    name_after: str  # differs from `name` if the tensor is tied in one checkpoint
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of entries."""
        return torch.Size(self.shape).numel()


class Chunk(NamedTuple):
    """Some consecutive entries of a pair, and a rank for each. A larger |ΔW| has a higher rank."""

    start: int
    before: Tensor  # [n], a copy: a view would keep the whole tensor in memory
    after: Tensor  # [n], likewise
    change: Tensor  # [n], after - before, float32 (float64 for float64 tensors); 0 where the bits agree
    rank: Tensor  # int32 [n], 1 + the bits of |change| as float32; 0 where the bits agree


class Survey(NamedTuple):
    """What is known about ΔW of one tensor: how many entries differ, Σ ΔW², and how many ranks are in each bin."""

    pair: TensorPair
    changed: int
    square: float
    bins: Tensor  # int64 [b], rising, without the empty ones
    counts: Tensor  # int64 [b]


@dataclass
class Cut:
    """Which entries to take: all with a rank above `rank`, and the first `ties` entries with exactly this rank."""

    rank: int
    ties: int


@dataclass
class ProgressCount:
    """Counts the entries that were processed, and reports their share of all."""

    total: int
    on_progress: Callable[[float], None] | None
    done: int = 0

    def passed(self, entries: int) -> None:
        """Count further entries that were processed, or that need not be."""
        self.done += entries
        if self.on_progress is not None:
            self.on_progress(min(1.0, self.done / max(1, self.total)))


def paired(before: Mapping[str, Tensor], after: Mapping[str, Tensor], chosen: set[str]) -> tuple[list[TensorPair], list[str]]:
    """The tensors to compare, sorted by name; and the names of those that are not chosen and cannot be compared.

    One checkpoint may lack a tensor because it is tied there to another one. Then the tensor is compared with that other one:
    its twin, which has the same bits in the checkpoint that holds both.
    Raises CheckpointError if a chosen tensor is missing, or has another shape or dtype.
    """
    pairs, aside, faults = [], [], []
    for name in sorted(set(before) | set(after)):
        if name not in before and _twin(name, after, before):
            continue  # the base holds it once, under another name
        pair = _pair(name, before, after)
        if isinstance(pair, TensorPair):
            pairs.append(pair)
        elif name in chosen:
            faults.append(f"'{name}' {pair}")
        else:
            aside.append(name)
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"the checkpoints do not match: {'; '.join(faults[:3])}{more}. Give a base and its own fine-tune, saved in one "
            "dtype, or leave these tensors out of targets"
        )
    return pairs, aside


def chunks(pair: TensorPair, watch: ProgressCount) -> Iterator[Chunk]:
    """The pieces of a tensor in which anything differs. Raises CheckpointError where ΔW is not a finite number.

    It also raises CheckpointError if a tensor differs that is not floating point.
    """
    before, after = pieces_of(pair.before, pair.name, CHUNK), pieces_of(pair.after, pair.name_after, CHUNK)
    for start, one, other in zip(range(0, pair.numel, CHUNK), before, after, strict=False):  # an empty tensor has one piece
        if not torch.equal(_bits(one), _bits(other)):
            yield _chunk(pair, start, one.clone(), other.clone())
        watch.passed(one.numel())


def _chunk(pair: TensorPair, start: int, before: Tensor, after: Tensor) -> Chunk:
    if pair.dtype not in FLOAT_DTYPES:
        form = _plain(Form(pair.shape, pair.dtype))
        raise CheckpointError(
            f"'{pair.name}' differs and is {form}: expected float32, bfloat16, float16 or float64; leave it out of targets"
        )
    same = _bits(before) == _bits(after)
    wide = torch.promote_types(pair.dtype, torch.float32)
    change = after.to(wide) - before.to(wide)
    rank = change.float().abs().view(torch.int32)
    if int(rank.max()) > FINITE:
        change.masked_fill_(same, 0)  # inf - inf and NaN - NaN are NaN
        rank = change.float().abs().view(torch.int32)
    if int(rank.max()) > FINITE:
        where = int(rank.argmax())
        raise CheckpointError(
            f"'{pair.name}' goes from {float(before[where])} to {float(after[where])} at position {start + where}; expected "
            "finite numbers whose difference float32 holds, check the fine-tune"
        )
    return Chunk(start, before, after, change, (rank + 1).masked_fill_(same, 0))


def survey(pair: TensorPair, watch: ProgressCount) -> Survey:
    """Read one tensor in both checkpoints, and count what differs."""
    bins, square = torch.zeros(BINS, dtype=torch.int64, device="cpu"), 0.0
    for chunk in chunks(pair, watch):
        found = torch.bincount(chunk.rank >> LOW, minlength=BINS)
        found[0] -= (chunk.rank == 0).sum()
        bins += found
        square += square_of(chunk.change)
    filled = bins.nonzero().view(-1)
    return Survey(pair, int(bins.sum()), square, filled, bins[filled])


def cut(group: Sequence[Survey], k: int, watch: ProgressCount) -> Cut:
    """The cut that takes exactly k entries of a group of tensors, or all that differ if these are fewer."""
    if k >= sum(survey.changed for survey in group):
        watch.passed(sum(survey.pair.numel for survey in group))
        return Cut(0, 0)
    found, left = _kth(_upper(group), k)
    lower = torch.zeros(2**LOW, dtype=torch.int64, device="cpu")
    for survey in group:
        for chunk in chunks(survey.pair, watch):
            ranks = chunk.rank[(chunk.rank >> LOW == found) & (chunk.rank > 0)]
            lower += torch.bincount(ranks & (2**LOW - 1), minlength=2**LOW)
    rest, ties = _kth(lower, left)
    return Cut((found << LOW) + rest, ties)


def largest(group: Sequence[Survey], budgets: Sequence[int]) -> list[float]:
    """Σ ΔW² over the k largest entries of a group of tensors, for each budget k. Each entry counts as the middle of its bin."""
    counts = _upper(group)
    filled = counts.nonzero().view(-1).flip(0)  # the largest first
    middle = ((filled.int() << LOW) + 2 ** (LOW - 1)).view(torch.float32).double()
    within = counts[filled].double()
    squares = (within * middle.square()).cumsum(0)
    part = np.interp(budgets, [0.0, *within.cumsum(0).tolist()], [0.0, *squares.tolist()])
    return [float(p) / float(squares[-1]) * sum(survey.square for survey in group) for p in part]


def enough(group: Sequence[Survey], share: float) -> int:
    """How many of the largest entries of a group of tensors hold this share of its ‖ΔW‖: at least it, and hardly more.

    Each entry counts as the smallest number of its bin. So the share is reached for certain, with up to 0.4 % to spare.
    """
    counts = _upper(group)
    filled = counts.nonzero().view(-1).flip(0)  # the largest first
    least = (filled.int() << LOW).sub(1).clamp(min=0).view(torch.float32).double()  # a rank is 1 + the bits
    within = counts[filled]
    squares = (within * least.square()).cumsum(0)
    wanted = share**2 * sum(survey.square for survey in group)
    place = int(torch.searchsorted(squares, wanted))
    if place == len(squares) or not wanted:  # without a norm only signs of zeros differ
        return int(within.sum())
    above = float(squares[place - 1]) if place else 0.0
    return int(within[:place].sum()) + math.ceil((wanted - above) / float(least[place].square()))


def square_of(change: Tensor) -> float:
    """Σ change², in float64."""
    return float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2


def _upper(group: Sequence[Survey]) -> Tensor:
    """How many ranks of a group are in each bin, int64 [BINS]."""
    counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for survey in group:
        counts[survey.bins] += survey.counts
    return counts


def _kth(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th entry from the top, and how many of the top k are in this bin. counts: entries in each bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return counts.numel() - 1 - place, k - above


def _pair(name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> TensorPair | str:
    """A tensor in both checkpoints, or the reason why it cannot be compared."""
    partner = name if name in after or name not in before else _twin(name, before, after)
    one, other = form_of(before, name), form_of(after, partner or "")
    if one is None or other is None or partner is None:
        return f"is in the {'tuned checkpoint' if one is None else 'base'} only"
    if one != other:
        return f"is {_plain(one)} in the base, {_plain(other)} in the tuned checkpoint"
    if one.dtype.itemsize not in BITS:
        return f"is {_plain(one)}, a dtype that cannot be compared"
    return TensorPair(name, before, after, partner, *one)


def _twin(name: str, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str | None:
    """The name of another tensor with the same bits, if one exists that the other checkpoint has, too."""
    form = form_of(tensors, name)
    for candidate in tensors:
        if candidate != name and candidate in others and form_of(tensors, candidate) == form:
            pair = TensorPair(name, tensors, tensors, candidate, *form) if form and form.dtype.itemsize in BITS else None
            if pair and pair.numel and _same(pair):
                return candidate
    return None


def _same(pair: TensorPair) -> bool:
    one, other = pair.before[pair.name].reshape(-1), pair.after[pair.name_after].reshape(-1)
    return not one.is_meta and not other.is_meta and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(BITS[tensor.element_size()])


def _plain(form: Form) -> str:
    return f"{dtype_name(form.dtype)} {list(form.shape)}"
