"""DreamBooth on the emoji model of 24 concepts: it learns one fox under the name "sks dog", from four pictures of it.

python -m experiments.image.dreambooth        trains, draws dreambooth.png, and prints a table

LoRA and two masks, of equally many parameters: without prior preservation; with pictures that the base draws of "dog"; and with
pictures that it draws of all 24 names. Each is trained with three seeds; the picture shows the first.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from shira.cli.demo import digest
from shira.cli.output import console, progress
from shira.data import pictures
from shira.data.emoji import FEW, named, picture
from shira.data.grids import grid
from shira.integrations.diffusers_sampling import modules_of

from ..intervals import half_width
from . import emoji
from .parts import load
from .style_adapters import adapted, trained

SUBJECT, NAME, CLASS = "fox face", "sks dog", "dog"
OTHERS = [name for name in FEW if name != CLASS]
METHODS: dict[str, tuple[dict[str, Any], float]] = {  # and learning rates
    "LoRA": ({"lora": 3}, 0.002),
    "WM": ({"mask": "wm", "rank": 3}, 0.01),
    "Rand": ({"mask": "rand", "rank": 3}, 0.01),
}
PRIORS = {"none": (), "dog": (CLASS,), "all": FEW}  # what the base draws of
SIDE, STEPS, BATCH = 32, 150, 4
OF_BASE = 24  # pictures that the base draws of them
SHOTS = 4  # pictures of each name that are measured
SEEDS = 3  # of the training: its noise, its order, and the mask's or LoRA's random numbers
GUIDANCE, SAMPLING = 2.0, 20
SHOWN = (NAME, CLASS, "cat", "pizza")
VARIANTS = ("as it is", "mirrored", "smaller", "turned")  # pictures of the subject


def of_subject(side: int = SIDE) -> list[Image.Image]:
    """Four pictures of the subject: as it is, mirrored, smaller, and turned."""
    plain = Image.fromarray(picture(named([SUBJECT])[0], 3 * side))
    small = Image.new("RGB", plain.size, "white")
    small.paste(plain.resize((2 * side, 2 * side), Image.Resampling.LANCZOS), (side // 2, side // 2))
    turned = plain.rotate(15, Image.Resampling.BICUBIC, fillcolor="white")
    variants = (plain, plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT), small, turned)
    return [each.resize((side, side), Image.Resampling.LANCZOS) for each in variants]


def drawn(pipe: Any) -> dict[str, np.ndarray]:
    """SHOTS pictures of each name, the subject's first: [shots, side, side, 3] from 0 to 255."""
    names = (NAME, CLASS, *OTHERS)
    made = emoji.generate(pipe, [name for name in names for _ in range(SHOTS)], GUIDANCE, SAMPLING)
    parts = np.stack(made).astype(float).reshape(len(names), SHOTS, *made[0].shape)
    return dict(zip(names, parts, strict=True))


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """How far pictures are apart: the mean difference of a channel, from 0 to 255."""
    return float(np.abs(one - other).mean())


def over_seeds(values: Sequence[float]) -> str:
    """The mean, with its 95 % interval if there are several."""
    return f"{statistics.fmean(values):.1f}" + (f" ± {half_width(values):.1f}" if len(values) > 1 else "")


def sheet(subject: Sequence[Image.Image], cells: Sequence[Sequence[Image.Image]], columns: Sequence[str]) -> Image.Image:
    """A strip of the pictures that were learned from, with its own titles, above the grid of what is drawn."""
    strip = grid([subject], ["learned from"], VARIANTS, smallest=96)
    results = grid(cells, SHOWN, columns, smallest=96)
    made = Image.new("RGB", (max(strip.width, results.width), strip.height + 33 + results.height), "white")
    made.paste(strip, (0, 0))
    made.paste("#A0A0A0", (0, strip.height + 16, made.width, strip.height + 17))
    made.paste(results, (made.width - results.width, strip.height + 33))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dreambooth.png"))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"trainings of each adapter ({SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps of each adapter ({STEPS})")
    options = parser.parse_args(arguments)
    emoji.hide_library_output()
    emoji.facts_of(emoji.folder(len(FEW)))
    pipe = load(emoji.folder(len(FEW)) / "pipeline")
    before = digest(modules_of(pipe))
    base = drawn(pipe)
    subject = np.stack([np.asarray(each, float) for each in of_subject()[:1]])
    images = [pictures.Picture(image, NAME) for image in of_subject()]
    priors = {}
    for prior, names in PRIORS.items():
        captions = list(itertools.islice(itertools.cycle(names), OF_BASE))
        made = emoji.generate(pipe, captions, GUIDANCE, SAMPLING, seed=1)
        priors[prior] = [pictures.Picture(Image.fromarray(each), name) for each, name in zip(made, captions, strict=True)]
    columns = {"base": base}
    table = Table("adapter", "prior", f"{NAME} to the fox", f"{CLASS} to the base's", "others to the base's")
    table.add_row("base", "", f"{apart(base[NAME], subject):.1f}", "0", "0")
    runs = list(itertools.product(METHODS, PRIORS, range(options.seeds)))
    measured: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    with progress("training and drawing", len(runs)) as update:
        for number, (method, prior, seed) in enumerate(runs):
            title = f"{method}, {prior}"
            update(number, f"{title}, seed {seed}")
            chosen, rate = METHODS[method]
            with tempfile.TemporaryDirectory() as folder:
                shape = {"side": SIDE, "steps": options.steps, "batch": BATCH, "rate": rate, "seed": seed}
                trained(chosen, pipe, images, images[:1], Path(folder), priors=priors[prior], **shape)
                with adapted(pipe, [Path(folder)], [1.0]):
                    found = drawn(pipe)
            columns.setdefault(title, found)
            others = statistics.fmean(apart(found[name], base[name]) for name in OTHERS)
            measured.setdefault((method, prior), []).append(
                (apart(found[NAME], subject), apart(found[CLASS], base[CLASS]), others)
            )
        update(len(runs), "done")
    for row, of_seeds in measured.items():
        table.add_row(*row, *map(over_seeds, zip(*of_seeds, strict=True)))
    cells = [[Image.fromarray(column[name][0].astype(np.uint8)) for column in columns.values()] for name in SHOWN]
    sheet(of_subject(), cells, list(columns)).save(options.out, optimize=True)
    console.print(table)
    same = digest(modules_of(pipe)) == before
    console.print(f"the base is as it was: {'yes' if same else 'NO'}; look at {options.out}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
