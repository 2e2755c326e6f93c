"""The demo to look at: two styles on a small emoji model, in place on one pipeline. `make demo-image` runs it.

It trains the model of 24 emoji, if the cache has none, and one adapter for each of two styles. It draws one grid: the base,
each style, some strengths, both added and in turn, and the base again, whose bits are compared with those before.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from shira.cli.demo import digest, print_end, switch_milliseconds
from shira.cli.output import bytes_text, console, progress
from shira.data.emoji import FEW, named
from shira.data.grids import grid
from shira.errors import ShiraError
from shira.integrations.diffusers import PipelineAdapters
from shira.integrations.diffusers_sampling import modules_of
from shira.runs.image_recipes import ImageRecipe, save_image_recipe, train_image

from . import emoji
from .parts import in_bfloat16, load, mixed_precision
from .style_adapters import TARGETS
from .styles import FILTERS, styled

CONCEPTS = 24
SHOWN = ("panda face", "pizza", "octopus", "tiger", "frog", "heart eyes")
VARIANTS = 1  # pictures of each emoji in a style; they differ in the random numbers of the filters
STEPS, RATE = 200, 0.03
BOTH = 0.6  # strength of each when both are active; at 1 the shapes get lost (docs/styles.md)
GUIDANCE, SAMPLING = 2.0, 20  # and denoising steps


def training_folder(style: str, place: Path) -> Path:
    """A folder of pictures in a style, with captions, as `shira train-image` reads it."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "metadata.jsonl", "w", encoding="utf-8") as captions:
        for concept in named(FEW):
            for seed in range(VARIANTS):
                file = f"{concept.name.replace(' ', '-')}-{seed}.png"
                Image.fromarray(styled(concept, style, 32, seed)).save(place / file)
                captions.write(json.dumps({"file_name": file, "text": concept.name}) + "\n")
    return place


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-image"), help="a folder for what is made (demo-image)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps for each style ({STEPS})")
    options = parser.parse_args(arguments)
    emoji.hide_library_output()
    try:
        demo(options.out, options.steps)
    except ShiraError as error:
        raise SystemExit(f"error: {error}") from None


def demo(place: Path, steps: int) -> None:
    started = time.perf_counter()
    source = emoji.folder(CONCEPTS)
    if not _finished(source):
        emoji.main(["train", "--concepts", str(CONCEPTS)])
    pipe = load(source / "pipeline")
    weights = modules_of(pipe)
    before = digest(weights)
    base = {name: tensor.clone() for name, tensor in weights.state_dict().items()}
    files = {}
    for style in FILTERS:
        recipe = ImageRecipe(
            pipeline=str(source / "pipeline"),
            data=str(training_folder(style, place / style)),
            steps=steps,
            batch_size=16,
            lr=RATE,
            targets=TARGETS,
            mixed_precision=mixed_precision(),
            license=emoji.LICENCES,
        )
        with progress(f"training on {style}", steps) as update:
            adapter = train_image(recipe, pipe, on_step=lambda step, loss, _: update(step, f"loss {loss:.3f}"))  # noqa: B023
        files[style] = place / f"{style}.safetensors"
        adapter.save(files[style])
        save_image_recipe(recipe, files[style].with_suffix(".yaml"))

    adapters = PipelineAdapters(pipe)
    for style, file in files.items():
        adapters.load(file, style)
    one, other = files
    states: list[tuple[str, dict[str, float]]] = [("base", {})]
    states += [(f"{one} {strength:g}", {one: strength}) for strength in (0.25, 0.5, 0.75)]
    states += [(one, {one: 1.0}), (other, {other: 1.0}), (f"both at {BOTH:g}", {one: BOTH, other: BOTH})]
    states += [("both in turn", {one: 1.0, other: 1.0}), ("base again", {})]
    columns, rows = [], []

    def draw(**more: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16()):
            columns.append(emoji.generate(pipe, SHOWN, GUIDANCE, SAMPLING, **more))

    for title, wanted in states:
        if title == "both in turn":
            with adapters.in_turn(wanted) as at_step_end:
                draw(at_step_end=at_step_end)
            continue
        row = [title, f"{switch_milliseconds(adapters.set, wanted, {} if wanted else adapters.active):.2f}"]
        changed = sum(int((now != base[name]).sum()) for name, now in weights.state_dict().items())
        rows.append([*row, f"{changed:,}", bytes_text(files[title].stat().st_size) if title in files else ""])
        draw()
    same = digest(weights) == before
    cells = [[Image.fromarray(column[row]) for column in columns] for row in range(len(SHOWN))]
    grid(cells, SHOWN, [title for title, _ in states], smallest=96).save(place / "grid.png", optimize=True)
    table = Table(title="one live pipeline", title_justify="left")
    for column in ("active", "switch\nms", "weights\nchanged", "file\nsize"):
        table.add_column(column, justify="left" if column == "active" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"changed: weights that differ from the base, of {sum(map(Tensor.numel, base.values())):,}", highlight=False)
    print_end(same, time.perf_counter() - started)
    console.print(f"look at {place / 'grid.png'}", highlight=False)
    if not same:
        raise SystemExit(1)


def _finished(source: Path) -> bool:
    if not (source / "pipeline" / "training.json").exists():
        return False
    facts = emoji.facts_of(source)
    return bool(facts["step"] == facts["of"])


if __name__ == "__main__":
    main()
