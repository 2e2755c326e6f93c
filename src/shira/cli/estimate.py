"""shira estimate: predict the memory that training takes, part by part."""

import warnings
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import DataError
from ..runs.recipes import Recipe, with_targets
from ..runs.shared_options import check_mask
from .options import given, recipe_options
from .output import bytes_text, cell, console, print_json, waiting

__all__ = ["estimate"]

SHARED = ("mask", "density", "rank", "targets")  # options that `shira train` has, too


class Method(StrEnum):
    """How the model is trained."""

    shira = "shira"
    lora = "lora"
    full = "full"


@recipe_options(*SHARED, "dtype")
def estimate(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or SmolLM2-135M-Instruct-Q4_1; only its config is read.")],
    method: Annotated[Method, typer.Option(help="shira; lora, as in PEFT (rank 16); or full: every weight.")] = Method.shira,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="Tokens a row.", min=2)] = 512,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    dropout: Annotated[float, typer.Option(help="With --method lora: the LoRA's dropout.", min=0, max=1)] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **options: Any,
) -> None:
    """Predict the peak memory of a training step with AdamW. No weights are read or created.

    Example: shira estimate SmolLM2-135M-Instruct-Q4_1 --mask wm --density 0.01 --batch-size 4 --length 512
    """
    if dropout and method is not Method.lora:
        raise DataError("--dropout is for --method lora: leave it out")
    import torch

    from ..integrations.transformers import causal_skeleton, dtype_of, load_config, untrained
    from ..runs import estimate as library
    from ..sparse.tensor import dtype_name

    recipe = Recipe(**given(options))
    check_mask(recipe)
    config = load_config(model)
    recipe = with_targets(recipe, causal_skeleton(model))
    chosen = getattr(torch, dtype_of(model, recipe.dtype), None) or getattr(config, "dtype", None) or torch.float32
    with waiting("running a step without data"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model may warn when it is built
        found = library.estimate(
            lambda: untrained(config, chosen),
            method=method.value,
            batch_size=batch_size,
            length=length,
            checkpointing=checkpointing,
            dropout=dropout,
            **{name: getattr(recipe, name) for name in SHARED},
        )
    setup: dict[str, Any] = {"model": model, "method": method.value, "dtype": dtype_name(chosen)}
    setup |= {"batch_size": batch_size, "length": length, "checkpointing": checkpointing, "parameters": found.parameters}
    if as_json:
        print_json(setup | {"bytes": found.parts, "total": found.total})
        return
    table = Table("part", "bytes", "")
    table.columns[1].justify = table.columns[2].justify = "right"
    for part, size in found.parts.items():
        table.add_row(part, bytes_text(size), f"{size / found.total:.0%}")
    table.add_section()
    table.add_row("peak", bytes_text(found.total), "")
    note = ", checkpointing" * checkpointing
    console.print(f"{cell(model)}, {method.value}, {setup['dtype']}, {batch_size} x {length} tokens{note}", highlight=False)
    console.print(table)
    console.print(f"{found.parameters:,} entries train; see docs/memory.md for what is not counted", highlight=False)
