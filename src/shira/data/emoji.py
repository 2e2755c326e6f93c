"""1,026 named emoji: faces, animals, food, places, activities and objects, without people, flags and symbols. In three styles.

The pictures are 64 by 64 in Google's and Twitter's style, larger in Microsoft's. Their licences, by the packages' own files:
google (Noto Emoji) Apache-2.0; twitter (Twemoji) CC-BY-4.0, which asks for attribution; fluent (Microsoft, 3-D) MIT.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import DataError, did_you_mean
from .packages import Package, fetch
from .pictures import Picture, check_pillow, image_of

__all__ = ["FEW", "STYLES", "Emoji", "emoji", "named", "picture"]

Style = Literal["google", "twitter", "fluent"]
LEFT_OUT = {"People & Body", "Flags", "Symbols", "Component"}
STYLES: dict[Style, Package] = {
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ("package/emoji.json", "package/img/google/64/"),
        "Apache-2.0 (the pictures), MIT (the names)",
        "npm",
    ),
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        ("package/img/twitter/64/",),
        "CC-BY-4.0 (the pictures: Twemoji, Twitter and contributors)",
        "npm",
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ("package/assets/",),
        "MIT (the pictures: Fluent Emoji, Microsoft)",
        "npm",
    ),
}
# a small set of plain, different things, for tests and quick runs
# fmt: off
FEW = (
    "dog", "cat", "tiger", "pig", "panda face", "frog", "penguin", "octopus", "apple", "banana", "strawberry", "watermelon",
    "pizza", "hamburger", "egg", "carrot", "grinning", "heart eyes", "sunglasses", "cry", "rage", "fish", "butterfly", "cookie",
)
# fmt: on


@dataclass(frozen=True)
class Emoji:
    """A concept: its name in plain words, which is unique, its code points in hexadecimal, and its category."""

    name: str
    code: str
    category: str


@cache
def emoji() -> tuple[Emoji, ...]:
    """All concepts, in the order of Unicode's charts.

    The name is the short name of emoji.json. A name with a number in it, such as "clock330", gives way to Unicode's name. Where
    that is taken by a face (cat and cat2), the one that shows the whole animal is "whole cat".
    """
    rows = json.loads((fetch(STYLES["google"]) / "package/emoji.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["category"] not in LEFT_OUT and row["has_img_google"]]
    rows.sort(key=lambda row: row["sort_order"])
    taken = {_words(row["short_name"]) for row in rows}
    found = []
    for row in rows:
        name = _words(row["short_name"])
        if any(letter.isdigit() for letter in name):
            name = _words(row["name"].lower())
            name = f"whole {name}" if name in taken else name
        found.append(Emoji(name, row["unified"].lower(), row["category"]))
    return tuple(found)


def named(names: Iterable[str]) -> list[Emoji]:
    """The concepts of these names. Raises DataError for an unknown name."""
    by_name = {e.name: e for e in emoji()}
    found = []
    for name in names:
        if name not in by_name:
            raise DataError(f"there is no emoji {name!r}; {did_you_mean(name, by_name)}")
        found.append(by_name[name])
    return found


def picture(concept: Emoji, size: int, style: Style = "google") -> npt.NDArray[np.uint8] | None:
    """The picture of a concept on white: uint8 [size, size, 3], RGB. None if the style has no picture of it."""
    check_pillow()
    from PIL import Image

    folder = fetch(STYLES[style]) / STYLES[style].members[-1]
    codes = [concept.code, concept.code.removesuffix("-fe0f")]
    path = next((p for code in codes if (p := folder / f"{code}.{'webp' if style == 'fluent' else 'png'}").exists()), None)
    if path is None:
        return None
    return np.asarray(image_of(Picture(path, concept.name)).resize((size, size), Image.Resampling.LANCZOS))


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
