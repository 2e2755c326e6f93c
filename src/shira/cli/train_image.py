"""shira train-image: train one adapter from a Diffusers pipeline and pictures."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from ..runs.image_recipes import DENSITY, ImageRecipe, check_image_run, load_image_recipe, name_of, save_image_recipe
from ..runs.image_recipes import train_image as trained
from .options import Force, avoid_cudnn_attention, given, recipe_options
from .output import IS_FIRST, cell, console, progress, waiting
from .train import Output, SaveEvery, checkpoints, stem_of, tell

if TYPE_CHECKING:
    from ..runs.outputs import Output as Place

__all__ = ["train_image"]


@recipe_options(of=ImageRecipe)
def train_image(
    output: Output = None,
    force: Force = False,
    save_every: SaveEvery = 0,
    config: Annotated[Path | None, typer.Option(help="A YAML recipe; the options given beside it win.")] = None,
    **options: Any,
) -> None:
    """Train one adapter on a Diffusers pipeline. A recipe that repeats the run, samples and a model card are saved beside it.

    All of it together can be pushed to the hub: `shira push`.

    Example: shira train-image stable-diffusion-v1-5/stable-diffusion-v1-5 --data dog --prompt "a sks dog" -o dog.safetensors
    """
    from ..runs.outputs import named, output_for

    asked = given(options, ImageRecipe)
    recipe = named(load_image_recipe(config, asked), output)
    stem = stem_of(config) or name_of(recipe)
    place = output_for(output, stem, force=force, config=config, repeats=not asked, model=recipe.pipeline)
    check_image_run(recipe)
    for data in (recipe.data, recipe.class_data):
        if data is not None and place.samples.resolve().parent == Path(data).resolve():
            raise DataError(
                f"the samples would be saved in {data}, and the next run would train on them; give an --output elsewhere"
            )
    with checkpoints(save_every, output, place, recipe, (recipe.data, recipe.start), force) as folder:
        _run(recipe, place, save_every, folder)


def _run(recipe: ImageRecipe, place: "Place", save_every: int, save_folder: Path | None) -> None:
    """Load the pipeline, train, and write the output."""
    from ..data.grids import grid
    from ..integrations.card import base_of
    from ..integrations.diffusers_sampling import load_pipeline
    from ..integrations.diffusion_losses import TrainedComponents
    from ..runs.announcing import what_trains
    from ..runs.outputs import save_run

    avoid_cudnn_attention()
    with waiting("loading the pipeline"):
        pipe = load_pipeline(recipe.pipeline, recipe.dtype)
    parts = TrainedComponents(pipe, text_encoders=recipe.train_text_encoder)
    console.print(f"trains {what_trains(recipe, parts, DENSITY)}", highlight=False, soft_wrap=True)
    samples: dict[str, list[Any]] = {}
    shown = place.samples if save_folder is None else save_folder / place.samples.name  # at the end it moves to its place

    def on_sample(title: str, prompts: list[str], images: list[Any]) -> None:
        samples[title] = images
        shown.parent.mkdir(exist_ok=True)
        grid(list(zip(*samples.values(), strict=True)), prompts, list(samples)).save(shown)

    with _removed_if_stopped(shown), progress("reading the pictures", None) as update:
        adapter = trained(
            recipe,
            pipe,
            on_class=lambda done, total: update(done, "", "making pictures of the class", total),
            on_picture=lambda done, total: update(done, "", "reading the pictures", total),
            on_calibration=lambda done, total: update(done, "", "calibrating", total),
            on_step=lambda step, loss, speed: update(
                step, f"loss {loss:.3f}  {speed:.3g} pictures/s", "training", recipe.steps
            ),
            on_sample=on_sample,
            save_every=save_every,
            save_folder=save_folder,
        )
    if not IS_FIRST:
        return
    base = base_of(recipe.pipeline, adapter.metadata["base"]["dtype"], "DiffusionPipeline", "diffusers")
    asked = place.samples
    if shown != asked:
        asked.parent.mkdir(exist_ok=True)
        shown.replace(asked)
    try:
        place = save_run(place, adapter, base, partial(save_image_recipe, recipe), goes_on=save_folder is not None)
    except BaseException:
        if shown != asked:
            asked.replace(shown)
        raise
    tell(place, adapter)
    console.print(f"the samples are {cell(place.samples)}", highlight=False)


@contextlib.contextmanager
def _removed_if_stopped(samples: Path) -> Iterator[None]:
    """If the run ends without an adapter, its samples do not stay, so that the same command can be given again."""
    is_new, is_new_folder = not samples.exists(), not samples.parent.exists()
    try:
        yield
    except BaseException:
        if is_new:
            samples.unlink(missing_ok=True)
        if is_new_folder:
            with contextlib.suppress(OSError):
                samples.parent.rmdir()
        raise
