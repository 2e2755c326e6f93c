"""A comparison in sentences. Each word follows from a number by a `Scale`, which the page shows."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from .comparison import AdapterPair, Change, Comparison

__all__ = ["SCALES", "about_pair", "chance_awor", "chance_shared", "in_words"]


class Scale(NamedTuple):
    """Words for a number. steps: (end, word): a word holds up to and with its end, the last one for all above."""

    of: str
    steps: tuple[tuple[float, str], ...]

    def word(self, value: float) -> str:
        """The word for a value."""
        return next((word for end, word in self.steps if value <= end), self.steps[-1][1])

    def as_text(self) -> str:
        """The whole scale, for readers: "cosine: up to −0.5 opposed, …, above 0.5 much the same"."""
        *lower, (_, last) = self.steps
        below = ", ".join(f"up to {end:g} “{word}”" for end, word in lower)
        return f"{self.of}: {below}, above {lower[-1][0]:g} “{last}”".replace("-", "−")


DIRECTION = Scale(
    "cosine of the two changes",
    (
        (-0.5, "opposed"),
        (-0.1, "partly opposed"),
        (0.1, "nearly orthogonal"),
        (0.5, "partly the same"),
        (1.0, "much the same"),
    ),
)
POSITIONS = Scale(
    "shared positions, divided by those that random positions would share",
    ((0.5, "fewer than"), (2.0, "about as many as"), (math.inf, "more than")),
)
SIGNS = Scale(
    "shared positions where the signs differ, as a share of all shared ones",
    ((0.25, "they mostly agree"), (0.6, "much as by chance"), (1.0, "they mostly differ")),
)
FITS = Scale(
    "the largest share of ‖ΔW‖² that a LoRA with as many parameters can hold",
    ((0.25, "little"), (0.75, "a part"), (1.0, "most")),
)
SCALES = (DIRECTION, POSITIONS, SIGNS, FITS)


def in_words(found: Comparison) -> list[str]:
    """A paragraph for each two adapters, then one for each adapter."""
    pairs = [" ".join(about_pair(found, pair)) for pair in found.total.pairs]
    return pairs + [" ".join(about_adapter(name, change)) for name, change in found.total.changes.items()]


def about_pair(found: Comparison, pair: AdapterPair) -> Iterator[str]:
    """Sentences about two adapters: their direction, their positions, and what adding them does."""
    one, other = pair.first, pair.second
    first, second = found.total.changes[one], found.total.changes[other]
    if pair.cosine is None:
        yield f"{one} or {other} changes nothing, so they have no direction to compare."
        return
    yield f"{one} and {other}: {DIRECTION.word(pair.cosine)} (cosine {pair.cosine:.2g})."
    chance = chance_shared(found, one, other)
    if chance:
        yield (
            f"They share {pair.shared:,} positions, {_percent(pair.overlap)} of the smaller one's, "
            f"{POSITIONS.word(pair.shared / chance)} random ones would ({chance:,.0f})."
        )
    if pair.shared:
        share = pair.conflicts / pair.shared
        yield f"At {_percent(share)} of these the signs differ: {SIGNS.word(share)}."
    union = first.entries + second.entries - pair.shared
    kept = [1 + pair.cosine * b.l2 / a.l2 for a, b in ((first, second), (second, first))]
    yield (
        f"Adding them changes {union:,} entries and leaves {100 * kept[0]:.1f} % of the change of {one}, and "
        f"{100 * kept[1]:.1f} % of that of {other}."
    )
    random = chance_awor(found, one, other)
    yield f"{_percent(pair.awor)} of A₁ᵀA₂ is zero (AWOR); changes at random positions would leave {_percent(random)} zero."


def about_adapter(name: str, change: Change) -> Iterator[str]:
    """Sentences about one adapter: how much of what it holds is changed, and how it compares with a LoRA."""
    yield f"{name} changes {change.changed:,} of the {change.entries:,} entries that it holds."
    if change.effective_rank is not None and change.lora_energy is not None:
        yield (
            f"Its effective rank is {change.effective_rank:.3g}. A LoRA with as many parameters has rank "
            f"{change.lora_rank:.3g} and can hold {FITS.word(change.lora_energy)} of this change: at most "
            f"{_percent(change.lora_energy)} of ‖ΔW‖²."
        )


def chance_shared(found: Comparison, one: str, other: str) -> float:
    """The number of positions that the two would share if each drew as many at random in each tensor: Σ k₁ · k₂ / entries."""
    return sum(first * second * entries for first, second, entries, _, _ in _densities(found, one, other, "entries"))


def chance_awor(found: Comparison, one: str, other: str) -> float:
    """The AWOR of as many changes at random positions in each tensor: over all columns², the mean of (1 − d₁ · d₂) ^ rows."""
    tensors = list(_densities(found, one, other, "changed"))
    size = sum(columns**2 for *_, columns in tensors)
    return sum(columns**2 * (1 - first * second) ** rows for first, second, _, rows, columns in tensors) / max(1, size)


def _densities(found: Comparison, one: str, other: str, what: str) -> Iterator[tuple[float, float, int, int, int]]:
    """For each tensor that one of them holds: both densities, the entries, and the rows and columns of its matrix.

    what: what is counted, the "entries" that an adapter holds or those "changed".
    """
    for part in found.tensors.values():
        shape = part.shape or ()
        entries = math.prod(shape)
        held = [getattr(part.changes[name], what) if name in part.changes else 0 for name in (one, other)]
        if entries and any(held):
            yield held[0] / entries, held[1] / entries, entries, shape[0] if shape else 1, math.prod(shape[1:])


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
