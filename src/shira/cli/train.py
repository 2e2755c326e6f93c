"""shira train: train one adapter from a model and examples."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from ..runs.recipes import Recipe, check_run, load_recipe, name_of, save_recipe, train_adapter, with_targets
from .options import Force, avoid_cudnn_attention, given, recipe_options
from .output import IS_FIRST, bytes_text, cell, console, progress, waiting

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..runs.outputs import Output as Place
    from ..runs.shared_options import Masked

__all__ = ["Output", "SaveEvery", "checkpoints", "stem_of", "tell", "train"]

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="The adapter's file, poet.safetensors, or a folder, poet.",
        show_default="a new file after --config or the data",
    ),
]
SaveEvery = Annotated[
    int,
    typer.Option(
        help="Saves a checkpoint every so many steps (0: never). After a stop the same command goes on from it.",
        min=0,
    ),
]


@recipe_options()
def train(
    output: Output = None,
    force: Force = False,
    save_every: SaveEvery = 0,
    like: Annotated[Path | None, typer.Option(help="An adapter of the same mask beside it: share its positions.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML recipe; the options given beside it win.")] = None,
    **options: Any,
) -> None:
    """Train one adapter with Transformers' Trainer. A recipe that repeats the run and a model card are saved beside it.

    All three together can be pushed to the hub: `shira push`.

    torchrun starts the command on several processes (docs/distributed.md).

    Example: shira train SmolLM2-135M-Instruct-Q4_1 --data spam --steps 40 --density 0.02 -o spam.safetensors
    """
    from ..runs.outputs import named, output_for

    asked = given(options)
    recipe = named(load_recipe(config, asked), output)
    stem = stem_of(config) or name_of(recipe)
    place = output_for(output, stem, force=force, config=config, repeats=not asked, model=recipe.model)
    if like is not None:
        from ..files.reading import neighbour

        neighbour(place.adapter, like)  # raises its errors before training
    if save_every and (recipe.refresh_every or recipe.method == "hook"):
        raise DataError("--save-every is not possible with --refresh-every or --method hook, whose runs cannot go on exactly")
    check_run(recipe)
    read = (recipe.data, recipe.eval_data, recipe.stay_near, recipe.start)
    with checkpoints(save_every, output, place, recipe, read, force) as folder:
        _run(recipe, place, like, save_every, folder)


def _run(recipe: Recipe, place: "Place", like: Path | None, save_every: int, save_folder: Path | None) -> None:
    """Load the model, train, and write the output."""
    from ..integrations.card import base_of
    from ..integrations.transformers import causal_skeleton, load_model, load_tokenizer
    from ..runs.announcing import what_trains
    from ..runs.live import warn_if_slow
    from ..runs.outputs import save_run

    avoid_cudnn_attention()
    skeleton, tokenizer = causal_skeleton(recipe.model), load_tokenizer(recipe.model)
    console.print(f"trains {what_trains(recipe, skeleton)}", highlight=False, soft_wrap=True)
    recipe = with_targets(recipe, skeleton)  # the saved recipe names them
    with waiting("loading the model"):
        loaded = load_model(recipe.model, recipe.dtype)
    warn_if_slow(loaded, recipe.dtype)
    with progress("reading the data", None) as update:
        adapter = train_adapter(
            recipe,
            loaded,
            tokenizer,
            on_read=lambda done: update(done, "examples"),
            on_calibration=lambda done, total: update(done, "", "calibrating", total),
            on_step=lambda step, loss, speed: update(step, f"loss {loss:.3f}  {speed:,.0f} tokens/s", "training", recipe.steps),
            on_evaluation=lambda done, total: update(done, "", "measuring held-out data", total),
            save_every=save_every,
            save_folder=save_folder,
        )
    if not IS_FIRST:
        return
    base = base_of(recipe.model, adapter.metadata["base"]["dtype"], "AutoModelForCausalLM")
    goes_on = save_folder is not None
    place = save_run(place, adapter, base, partial(save_recipe, recipe), like=like, data=recipe.data, goes_on=goes_on)
    summary = adapter.metadata["training"]
    for key, what in {"shortened": "lost their beginning (--max-length)", "dropped": "have nothing to learn: left out"}.items():
        if key in summary:
            console.print(f"{summary[key]:,} examples {what}", highlight=False)
    if held_out := summary.get("held_out"):
        before, after = held_out["loss_before"], held_out["loss"]
        console.print(f"mean loss of a token, held-out data: {before} before training, {after} after")
    tell(place, adapter)


@contextlib.contextmanager
def checkpoints(
    every: int, output: Path | None, place: "Place", recipe: "Masked", read: tuple[str | None, ...], force: bool
) -> Iterator[Path | None]:
    """The folder for a run's checkpoints, None if it saves none. Says if the run goes on from one, or will do so after a stop.

    read: names of the data. Raises DataError without an output, or for a folder of another run.
    """
    from ..runs.going_on import checkpoints_of, folder_of, last_step

    if every and output is None:
        raise DataError("--save-every needs --output, by which the same command finds the checkpoints: -o poet")
    if not every:
        if folder_of(place).exists():
            console.print(
                f"{cell(folder_of(place))} is of a run that was stopped; --save-every goes on with it", highlight=False
            )
        try:
            yield None
        except KeyboardInterrupt:
            console.print("stopped, and nothing was saved; --save-every 100 saves a checkpoint each 100 steps", highlight=False)
            raise
        return
    if not IS_FIRST:
        yield folder_of(place)
        return
    with checkpoints_of(place, recipe, read, replace=force) as folder:
        if (step := last_step(folder)) is not None:
            console.print(f"goes on after step {step:,}, from {cell(folder)}", highlight=False)
        try:
            yield folder
        except BaseException:
            if (step := last_step(folder)) is not None:
                told = f"stopped; the same command goes on after step {step:,}, from {cell(folder)}"
                console.print(f"{told}; remove that folder to begin anew", highlight=False, soft_wrap=True)
            raise


def stem_of(config: Path | None) -> str:
    """The name that a run has of its recipe's file, or of its folder if all folders have such a file."""
    from ..runs.outputs import RECIPE

    return "" if config is None else config.absolute().parent.name if config.name == RECIPE else config.stem


def tell(place: "Place", adapter: "Adapter") -> None:
    """Print what a run has written."""
    console.print(
        f"{cell(place.adapter)}: {adapter.nnz:,} entries, {bytes_text(place.adapter.stat().st_size)}; "
        f"the recipe is {cell(place.recipe)}, the model card {cell(place.card)}",
        highlight=False,
        soft_wrap=True,
    )
