"""shira train: one adapter from a model and examples."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..files.reading import neighbour
from ..runs.recipes import load_recipe, save_recipe, train_adapter
from .output import IS_FIRST, bytes_text, cell, console, progress, waiting
from .targets import parse_layers, parse_targets

__all__ = ["train"]

Text = Annotated[str | None, typer.Option(show_default=False)]


def train(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter's file.")] = Path("adapter.safetensors"),
    like: Annotated[
        Path | None, typer.Option(help="A file beside the output with an adapter of the same mask: share its positions.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML recipe; the options given beside it win.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSONL or Parquet (messages; prompt, completion; or text), a data set as in org/name:train, or a built-in "
            "task: spam, questions, film."
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="The same: its mean loss is taken before and after.", show_default=False)
    ] = None,
    eval_share: Annotated[float | None, typer.Option(help="Instead: hold out this share of the data (0).")] = None,
    name: Annotated[str | None, typer.Option(help="The adapter's name (the data's).")] = None,
    mask: Annotated[str | None, typer.Option(help="wm, snip, block:by=snip,size=8, …; `shira masks` lists them (wm).")] = None,
    density: Annotated[float | None, typer.Option(help="Share of each target's entries that train (0.01).")] = None,
    rank: Annotated[int | None, typer.Option(help="Instead: as many entries as a LoRA of this rank.")] = None,
    total: Annotated[int | None, typer.Option(help="Instead: so many entries in all targets together.")] = None,
    scope: Annotated[
        str | None, typer.Option(help="tensor, or model: rank the entries of all targets in one list (tensor).")
    ] = None,
    floor: Annotated[
        float | None, typer.Option(help="With --scope model: the share of its own budget that each target keeps (0).")
    ] = None,
    avoid: Annotated[
        list[str] | None, typer.Option(help="An adapter none of whose entries may train; may be given more than once.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Names with commas, all-linear, attention, mlp, or a regex (the paper's: q, k, v, up, down)."),
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Names, with commas, to leave out of the targets.")] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers of the layers to take: 3, or 4-11, or 0,2,4-7 (all).")] = None,
    method: Annotated[str | None, typer.Option(help="values, or hook: the slow way of the paper (values).")] = None,
    decompose: Annotated[
        int | None,
        typer.Option(help="Train the entries as those of a DoRA of this rank; 0: of a free one (SHiRA-WM-DoRA).", min=0),
    ] = None,
    calibration: Annotated[int | None, typer.Option(help="Examples for masks that need gradients or activations (64).")] = None,
    stay_near: Annotated[
        str | None,
        typer.Option(
            help="Data that the adapter shall not disturb, or own: text that the model writes itself (docs/masks/README.md)."
        ),
    ] = None,
    reach: Annotated[
        float | None, typer.Option(help="With --stay-near: how far weights may go, in their units (0.01).")
    ] = None,
    refresh_every: Annotated[int | None, typer.Option(help="Select the mask anew after so many steps (0: never).")] = None,
    refresh_cap: Annotated[
        float | None, typer.Option(help="Entries the adapter may hold then, in budgets; what leaves beyond is reset (1).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate (0.001).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps (100).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a batch, or rows with --pack (16).")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches a step (1).")] = None,
    schedule: Annotated[str | None, typer.Option(help="Learning rate schedule of Transformers (linear).")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps to warm up (0).")] = None,
    limit: Annotated[int | None, typer.Option(help="Train on this many examples at most (all).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens an example at most (512).")] = None,
    pack: Annotated[
        bool | None,
        typer.Option("--pack/--no-pack", help="Several examples in a row of --max-length (no).", show_default=False),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 (auto: the checkpoint's).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds the mask and the order of the examples (0).")] = None,
    license: Annotated[str | None, typer.Option(help="The adapter's licence, for its file.")] = None,
    report_to: Annotated[str | None, typer.Option(help="tensorboard, wandb, …, several with commas (none).")] = None,
    log_folder: Annotated[str | None, typer.Option(help="Where TensorBoard finds the runs (runs).")] = None,
) -> None:
    """Train one adapter with Transformers' Trainer; beside it, a recipe that repeats the run.

    torchrun starts it on several processes (docs/distributed.md).

    Example: shira train SmolLM2-135M-Instruct --data spam --steps 40 --density 0.02 -o spam.safetensors
    """
    given: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("output", "like", "config") and v not in (None, [])}
    if targets is not None:
        given["targets"] = parse_targets(targets)
    if exclude is not None:
        given["exclude"] = exclude.split(",")
    if layers is not None:
        given["layers"] = parse_layers(layers)
    recipe = load_recipe(config, given)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to save the adapter in; make it first")
    if like is not None:
        neighbour(output, like)  # what is wrong with it should be known before training
    from ..integrations.transformers import load_model, load_tokenizer

    with waiting("loading the model"):
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
