"""Styles of the emoji: two that filters make, two of other artists, and which concepts an adapter sees of them."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image

from shira.data.emoji import FEW, Emoji, named, picture
from shira.data.pictures import Picture

from . import filters
from .emoji import concepts
from .grids import Picture as Pixels

FILTERS: dict[str, Callable[[Pixels, int], Pixels]] = {"bluefire": filters.bluefire, "paintings": filters.paintings}
STYLES = (*FILTERS, "flat", "3-D")  # flat: Twitter's pictures; 3-D: Microsoft's
SEEN = ("dog", "panda face", "octopus", "butterfly", "apple", "pizza", "grinning", "heart eyes")
UNSEEN = tuple(name for name in FEW if name not in SEEN)
VALIDATED, MANY = 32, 300


def styled(concept: Emoji, style: str, side: int, seed: int = 0) -> Pixels | None:
    """The picture of a concept in a style: uint8 [side, side, 3]; None if the artist has not drawn it. seed: of the filters.

    Filters see Google's picture at 64 by 64. style "base" is that picture itself.
    """
    if style == "flat":
        return picture(concept, side, "twitter")
    if style == "3-D":
        return picture(concept, side, "fluent")
    if style == "base":
        return picture(concept, side)
    large = picture(concept, 64)
    if large is None:
        return None
    return np.asarray(Image.fromarray(FILTERS[style](large, seed)).resize((side, side), Image.Resampling.LANCZOS))


@cache
def seen(size: str) -> tuple[Emoji, ...]:
    """The concepts that an adapter is trained on. "few": 8; "many": 300, those 8 among them. UNSEEN is in neither."""
    few = named(SEEN)
    if size == "few":
        return tuple(few)
    others = [e for e in concepts(None) if e.name not in FEW]
    return (*few, *others[: MANY - len(few)])


@cache
def validated() -> tuple[Emoji, ...]:
    """Concepts that no adapter is trained on. Learning rates are chosen by the loss on their pictures."""
    return tuple(concepts(None)[-VALIDATED:])


def training_pictures(style: str, size: str, side: int) -> list[Picture]:
    """What an adapter of a style is trained on, with the names as captions.

    few: 8 pictures of each of 8 concepts, as many as in the paper's Appendix G (the filters' random numbers differ). many: one
    picture of each of 300.
    """
    repeats = 8 if size == "few" and style in FILTERS else 1
    found = [(e.name, styled(e, style, side, seed)) for seed in range(repeats) for e in seen(size)]
    return [Picture(Image.fromarray(pixels), name) for name, pixels in found if pixels is not None]


def validation_pictures(style: str, side: int) -> list[Picture]:
    """Pictures of concepts that the adapter has not seen, in its style."""
    return _as_pictures(validated(), style, side)


def general_pictures(side: int) -> list[Picture]:
    """The base's own pictures of 64 concepts that are in no other list, for `Tuner.stay_near`."""
    return _as_pictures(concepts(None)[MANY + len(FEW) : MANY + len(FEW) + 64], "base", side)


def _as_pictures(chosen: Sequence[Emoji], style: str, side: int) -> list[Picture]:
    found = [(e.name, styled(e, style, side)) for e in chosen]
    return [Picture(Image.fromarray(pixels), name) for name, pixels in found if pixels is not None]
