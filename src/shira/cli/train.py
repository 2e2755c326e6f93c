"""shira train: train one adapter from a model and examples."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runs.recipes import check_run, load_recipe, save_recipe, train_adapter
from .options import given, recipe_options
from .output import IS_FIRST, bytes_text, cell, console, progress, waiting

__all__ = ["train"]


@recipe_options()
def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter's file.")] = Path("adapter.safetensors"),
    like: Annotated[Path | None, typer.Option(help="An adapter of the same mask beside it: share its positions.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML recipe; the options given beside it win.")] = None,
    **options: Any,
) -> None:
    """Train one adapter with Transformers' Trainer. A recipe that repeats the run is saved beside the adapter.

    torchrun starts the command on several processes (docs/distributed.md).

    Example: shira train SmolLM2-135M-Instruct --data spam --steps 40 --density 0.02 -o spam.safetensors
    """
    recipe = load_recipe(config, given(options))
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to save the adapter in; make it first")
    if like is not None:
        from ..files.reading import neighbour

        neighbour(output, like)  # raises its errors before training
    from ..integrations.transformers import load_model, load_tokenizer

    with waiting("loading the model"):
        check_run(recipe)
        loaded, tokenizer = load_model(recipe.model, recipe.dtype), load_tokenizer(recipe.model)
    with progress("reading the data", None) as update:
        adapter = train_adapter(
            recipe,
            loaded,
            tokenizer,
            on_read=lambda done: update(done, "examples"),
            on_calibration=lambda done, total: update(done, "", "calibrating", total),
            on_step=lambda step, loss, speed: update(step, f"loss {loss:.3f}  {speed:,.0f} tokens/s", "training", recipe.steps),
            on_evaluation=lambda done, total: update(done, "", "what is held out", total),
        )
    if not IS_FIRST:
        return
    adapter.save(output, like=like)
    recipe_file = output.with_suffix(".yaml")
    save_recipe(recipe, recipe_file)
    summary = adapter.metadata["training"]
    for key, what in {"shortened": "lost their beginning (--max-length)", "dropped": "have nothing to learn: left out"}.items():
        if key in summary:
            console.print(f"{summary[key]:,} examples {what}", highlight=False)
    if held_out := summary.get("held_out"):
        console.print(f"loss of what was held out: {held_out['loss_before']}, now {held_out['loss']}", highlight=False)
    console.print(
        f"{cell(output)}: {adapter.nnz:,} entries, {bytes_text(output.stat().st_size)}; the recipe is {cell(recipe_file)}"
    )
