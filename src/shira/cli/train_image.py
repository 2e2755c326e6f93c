"""shira train-image: train one adapter from a Diffusers pipeline and pictures."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.image_recipes import ImageRecipe, check_image_run, load_image_recipe, save_image_recipe
from ..runs.image_recipes import train_image as trained
from .options import given, recipe_options
from .output import IS_FIRST, bytes_text, cell, console, progress, waiting

__all__ = ["train_image"]


@recipe_options(of=ImageRecipe)
def train_image(
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter's file.")] = Path("adapter.safetensors"),
    config: Annotated[Path | None, typer.Option(help="A YAML recipe; the options given beside it win.")] = None,
    **options: Any,
) -> None:
    """Train one adapter on a Diffusers pipeline. A recipe that repeats the run and a grid of samples are saved beside it.

    Example: shira train-image stable-diffusion-v1-5/stable-diffusion-v1-5 --data dog --prompt "a sks dog" -o dog.safetensors
    """
    recipe = load_image_recipe(config, given(options, ImageRecipe))
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to save the adapter in; make it first")
    check_image_run(recipe)
    from ..data.grids import grid
    from ..integrations.diffusers_sampling import load_pipeline

    with waiting("loading the pipeline"):
        pipe = load_pipeline(recipe.pipeline, recipe.dtype)
    samples: dict[str, list[Any]] = {}
    picture = output.with_suffix(".png")

    def on_sample(title: str, prompts: list[str], images: list[Any]) -> None:
        samples[title] = images
        grid(list(zip(*samples.values(), strict=True)), prompts, list(samples)).save(picture)

    with progress("reading the pictures", None) as update:
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
        )
    if not IS_FIRST:
        return
    adapter.save(output)
    recipe_file = output.with_suffix(".yaml")
    save_image_recipe(recipe, recipe_file)
    console.print(
        f"{cell(output)}: {adapter.nnz:,} entries, {bytes_text(output.stat().st_size)}; "
        f"the recipe is {cell(recipe_file)}, the samples are {cell(picture)}",
        highlight=False,
    )
