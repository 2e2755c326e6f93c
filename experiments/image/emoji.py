"""A text-to-image model of emoji, trained from nothing on a CPU: 32 by 32 pixels, a StableDiffusionPipeline.

python -m experiments.image.emoji train --concepts 24              under three minutes on two cores
python -m experiments.image.emoji train --minutes 30               all 1,026; the same command again goes on
python -m experiments.image.emoji sample "pizza" "heart eyes" --concepts 24 --guidance 2 --out pizza.png
python -m experiments.image.emoji score --concepts 24              what a classifier recognises, at guidance 1 to 4
python -m experiments.image.emoji release                          the weights as one file in bfloat16
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from shira.data.emoji import FEW, Emoji, emoji, named, picture
from shira.data.packages import cache_folder
from shira.errors import DataError, ShiraError
from shira.files.paths import temporary_folder

from . import scoring
from .classifier import kept, trained
from .grids import Picture, grid
from .parts import GUIDED, PixelShuffleVAE, encoded, guided_at_first, in_bfloat16, load, pipeline, text_parts
from .training import Settings, Training, train

RESULTS = Path(__file__).parent / "emoji.jsonl"
LICENCES = (
    "weights Apache-2.0; trained on Noto Emoji (Apache-2.0, Google) with names of emoji-data (MIT) and MiniLM (Apache-2.0)"
)


def concepts(count: int | None) -> list[Emoji]:
    """The first so many of a list that starts with the few plain ones and goes on in a shuffled order; None: all."""
    few = named(FEW)
    rest = [e for e in emoji() if e not in few]
    random.Random(0).shuffle(rest)
    return [*few, *rest][:count]


def pixels(pictures: Sequence[Picture]) -> Tensor:
    """uint8 pictures [side, side, 3] as float32 [n, 3, side, side] from -1 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def real_pictures(chosen: Sequence[Emoji], side: int = 32) -> Tensor:
    """Google's pictures of the concepts, as `pixels` gives them."""
    return pixels([picture(e, side) for e in chosen])


def folder(count: int) -> Path:
    """Where a model of so many concepts is kept: checkpoint.pt to go on with, pipeline/ to use, and progress pictures."""
    return cache_folder() / "images" / f"emoji-{count}"


def generate(
    pipe: StableDiffusionPipeline,
    names: Sequence[str],
    guidance: float,
    steps: int = 30,
    seed: int = 0,
    share: float = GUIDED,
    at_step_end: Callable[..., Any] | None = None,
) -> list[Picture]:
    """One picture for each name. The noise of a picture depends on the seed and its place in the list."""
    noise = torch.Generator().manual_seed(seed)
    made: list[Picture] = []
    for first in range(0, len(names), 64):
        part = list(names[first : first + 64])
        images = pipe(
            part,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
            output_type="np",
            **guided_at_first(share, at_step_end),
        ).images
        made += list((images * 255).round().astype(np.uint8))
    return made


def facts_of(place: Path) -> dict[str, Any]:
    """What was written down when a model was saved. Raises DataError if there is none."""
    path = place / "pipeline" / "training.json"
    if not path.exists():
        raise DataError(f"there is no trained model in {place}; first: python -m experiments.image.emoji train")
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def train_command(options: argparse.Namespace) -> None:
    chosen = concepts(options.concepts)
    few = len(chosen) < 100
    usual = {"batch": 24, "rate": 2e-3, "widths": (64, 128)} if few else {}
    asked = {"batch": options.batch} if options.batch else {}
    settings = Settings(len(chosen), options.passes, autocast=in_bfloat16(), **(usual | asked))
    names, parts = [e.name for e in chosen], text_parts()
    latents = PixelShuffleVAE().encode(real_pictures(chosen))
    training = Training(settings, latents, encoded(names, *parts), encoded([""], *parts))
    place = folder(len(chosen))
    if (place / "checkpoint.pt").exists() and not options.again:
        training.resume(place / "checkpoint.pt")
    weights = sum(p.numel() for p in training.model.parameters())
    print(f"{len(chosen)} concepts, {weights:,} weights, step {training.step} of {settings.steps}", flush=True)
    kept = training.seconds

    def keep() -> None:
        training.save(place / "checkpoint.pt")
        pipe = pipeline(training.averaged(), *parts)
        rows = [generate(pipe, names[:24], guidance, steps=10) for guidance in (2, 4)]
        grid([p for row in rows for p in row], 12).save(place / "progress.png")

    def on_look(step: int, loss: float, speed: float) -> None:
        nonlocal kept
        seen = step * settings.batch / len(chosen)
        print(
            f"step {step} of {settings.steps}, {seen:.0f} pictures a concept, {training.seconds:.0f} s, "
            f"loss {loss:.4f}, {speed:.0f} pictures a second",
            flush=True,
        )
        if training.seconds - kept > 60 * options.look:
            keep()
            kept = training.seconds

    finished = train(training, 60 * options.minutes, 15, on_look)
    keep()
    facts = {"step": training.step, "of": settings.steps, "seconds": round(training.seconds), "names": names}
    save_pipeline(pipeline(training.averaged().bfloat16(), *parts), place / "pipeline", facts)
    said = "finished" if finished else "stopped; the same command goes on"
    print(f"{said}: step {training.step} of {settings.steps}, {training.seconds:.0f} s; {place}")


def save_pipeline(pipe: StableDiffusionPipeline, place: Path, facts: dict[str, Any]) -> None:
    """Replace a folder by a saved pipeline with training.json, the facts of its training."""
    with temporary_folder(place.parent) as temporary:
        pipe.save_pretrained(temporary / "new")
        (temporary / "new" / "training.json").write_text(json.dumps(facts))
        if place.exists():
            place.rename(temporary / "old")
        (temporary / "new").rename(place)


def sample_command(options: argparse.Namespace) -> None:
    chosen = concepts(options.concepts)
    names = options.names or [e.name for e in chosen[:48]]
    facts_of(folder(len(chosen)))
    pipe = load(folder(len(chosen)) / "pipeline")
    rows = [generate(pipe, names, guidance, options.steps, options.seed) for guidance in options.guidance]
    columns = options.columns or len(names)
    sheet(rows, columns, [f"guidance {g:g}" for g in options.guidance]).save(options.out, optimize=True)


def sheet(groups: Sequence[Sequence[Picture]], columns: int, titles: Sequence[str]) -> Image.Image:
    """Groups of pictures one under another, each from the start of a row, with its title at the left of its rows."""
    rows = -(-len(groups[0]) // columns)
    empty = [np.full_like(groups[0][0], 255)] * (rows * columns - len(groups[0]))
    return grid([p for group in groups for p in (*group, *empty)], columns, titles=[t for t in titles for _ in range(rows)])


def score_command(options: argparse.Namespace) -> None:
    """Prints a line of JSON for each guidance, and adds it to results.jsonl beside this file."""
    chosen = concepts(options.concepts)
    real = real_pictures(chosen)
    place = folder(len(chosen))
    steps = options.classifier_steps or max(300, 4 * len(chosen))

    def on_step(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"classifier: step {step} of {steps}, loss {loss:.3f}", flush=True)

    judge = kept(place / f"classifier-{steps}.pt", len(chosen), lambda: trained(real, steps, on_step=on_step))
    line = {"concepts": len(chosen), "classifier_steps": steps}
    line |= {f"classifier_{k}": v for k, v in scoring.on_real(judge, real).items()}
    print(json.dumps(line), flush=True)
    facts = facts_of(place)
    line |= {k: facts[k] for k in ("step", "of", "seconds")}
    shown = list(range(len(chosen)))[: options.first]
    pipe = load(place / "pipeline")
    for guidance in options.guidance:
        made = generate(pipe, [chosen[i].name for i in shown], guidance, options.steps, options.seed)
        result = scoring.measured(judge, pixels(made), real, shown)
        scoring.add(RESULTS, line | {"shown": len(shown), "guidance": guidance, "sampling_steps": options.steps} | result)
        print(json.dumps({"guidance": guidance} | result), flush=True)


def release_command(options: argparse.Namespace) -> None:
    """One file: the UNet in bfloat16, with its configuration and the names in the metadata."""
    place = folder(len(concepts(options.concepts))) / "pipeline"
    facts = facts_of(place.parent)
    model = load(place).unet
    metadata = {"config": json.dumps(dict(model.config)), "training": json.dumps(facts), "license": LICENCES}
    save_file({k: v.bfloat16().contiguous() for k, v in model.state_dict().items()}, options.out, metadata)
    digest = hashlib.sha256(options.out.read_bytes()).hexdigest()
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, sha256 {digest}")


def hide_library_output() -> None:
    """Hide the notes and progress bars of Diffusers and Transformers, so that ours are seen."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train, or go on, and save a pipeline in the cache")
    training.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; the same command goes on")
    training.add_argument("--passes", type=int, default=400, help="how often each concept is seen in all (400)")
    training.add_argument("--batch", type=int, help="pictures a step (24 below 100 concepts, otherwise 48)")
    training.add_argument("--look", type=float, default=5, help="minutes between checkpoints and progress pictures (5)")
    training.add_argument("--again", action="store_true", help="start anew")
    sampling = commands.add_parser("sample", help="draw emoji by name")
    sampling.add_argument("names", nargs="*", help="names (the first 48 concepts)")
    sampling.add_argument("--columns", type=int, help="pictures in a row (all names)")
    sampling.add_argument("--out", type=Path, default=Path("emoji.png"))
    scores = commands.add_parser("score", help="what a classifier recognises of the generated pictures")
    scores.add_argument("--first", type=int, help="draw only so many concepts (all)")
    scores.add_argument("--classifier-steps", type=int, help="of its training (4 a concept, at least 300)")
    releasing = commands.add_parser("release", help="write the weights as one file in bfloat16")
    releasing.add_argument("--out", type=Path, default=Path("emoji-unet.safetensors"))
    for command in (sampling, scores):
        command.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 3, 4], help="strengths (1 2 3 4)")
        command.add_argument("--steps", type=int, default=30, help="of sampling (30)")
        command.add_argument("--seed", type=int, default=0)
    for command in (training, sampling, scores, releasing):
        command.add_argument("--concepts", type=int, help="of how many concepts the model is (all 1,026)")
    options = parser.parse_args(arguments)
    hide_library_output()
    work = {"train": train_command, "sample": sample_command, "score": score_command, "release": release_command}
    try:
        work[options.command](options)
    except ShiraError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
