"""shira train: train one adapter from a model and examples."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runs.recipes import check_run, load_recipe, name_of, save_recipe, train_adapter
from .options import Force, avoid_cudnn_attention, given, recipe_options
from .output import IS_FIRST, bytes_text, cell, console, progress, waiting

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..runs.outputs import Output as Place

__all__ = ["Output", "stem_of", "tell", "train"]

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="The adapter's file, poet.safetensors, or a folder, poet.",
        show_default="a new file after --config or the data",
    ),
]


@recipe_options()
def train(
    output: Output = None,
    force: Force = False,
    like: Annotated[Path | None, typer.Option(help="An adapter of the same mask beside it: share its positions.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML recipe; the options given beside it win.")] = None,
    **options: Any,
) -> None:
    """Train one adapter with Transformers' Trainer. A recipe that repeats the run and a model card are saved beside it.

    All three together can be pushed to the hub: `shira push`.

    torchrun starts the command on several processes (docs/distributed.md).

    Example: shira train SmolLM2-135M-Instruct-Q4_1 --data spam --steps 40 --density 0.02 -o spam.safetensors
    """
    from ..runs.outputs import named, output_for, save_run

    asked = given(options)
    recipe = named(load_recipe(config, asked), output)
    place = output_for(output, stem_of(config) or name_of(recipe), force=force, config=config, repeats=not asked)
    if like is not None:
        from ..files.reading import neighbour

        neighbour(place.adapter, like)  # raises its errors before training
    check_run(recipe)
    from ..integrations.card import base_of
    from ..integrations.transformers import causal_skeleton, load_model, load_tokenizer
    from ..runs.announcing import what_trains
    from ..runs.live import warn_if_slow

    avoid_cudnn_attention()
    console.print(f"trains {what_trains(recipe, causal_skeleton(recipe.model))}", highlight=False, soft_wrap=True)
    with waiting("loading the model"):
        loaded, tokenizer = load_model(recipe.model, recipe.dtype), load_tokenizer(recipe.model)
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
        )
    if not IS_FIRST:
        return
    base = base_of(recipe.model, adapter.metadata["base"]["dtype"], "AutoModelForCausalLM")
    place = save_run(place, adapter, base, partial(save_recipe, recipe), like=like, data=recipe.data)
    summary = adapter.metadata["training"]
    for key, what in {"shortened": "lost their beginning (--max-length)", "dropped": "have nothing to learn: left out"}.items():
        if key in summary:
            console.print(f"{summary[key]:,} examples {what}", highlight=False)
    if held_out := summary.get("held_out"):
        before, after = held_out["loss_before"], held_out["loss"]
        console.print(f"mean loss of a token, held-out data: {before} before training, {after} after")
    tell(place, adapter)


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
