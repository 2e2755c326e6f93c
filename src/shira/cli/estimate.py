"""shira estimate: the memory that training will take, part by part."""

import warnings
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import DataError
from ..runs.recipes import Recipe
from .output import bytes_text, cell, console, print_json, waiting
from .targets import parse_targets

__all__ = ["estimate"]


class Method(StrEnum):
    """How the model is trained."""

    shira = "shira"
    lora = "lora"
    full = "full"


def estimate(
    model: Annotated[
        str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct; its configuration is read.")
    ],
    method: Annotated[Method, typer.Option(help="shira; lora, as PEFT has it; or full: every weight.")] = Method.shira,
    mask: Annotated[str, typer.Option(help="With shira: any mask; struct takes less than the others.")] = "wm",
    density: Annotated[float | None, typer.Option(help="Share of each target's entries that train (0.01).")] = None,
    rank: Annotated[int | None, typer.Option(help="Instead, and for lora: the rank (lora: 16).")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Names with commas, all-linear, attention, mlp, or a regex (the paper's: q, k, v, up, down)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="Tokens a row.", min=2)] = 512,
    dtype: Annotated[str, typer.Option(help="auto (the configuration's), float32, bfloat16 or float16.")] = "auto",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    dropout: Annotated[float, typer.Option(help="With lora: the dropout before it.", min=0, max=1)] = 0.0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Predict the peak memory of a training step with AdamW. No weight is read or made.

    Example: shira estimate SmolLM2-135M-Instruct --mask wm --density 0.01 --batch-size 4 --length 512
    """
    import torch

    from ..integrations.transformers import load_config, untrained
    from ..runs import estimate as library

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in ("auto", *dtypes):
        raise DataError(f"dtype must be auto, float32, bfloat16 or float16, found {dtype!r}")
    config = load_config(model)
    chosen = dtypes.get(dtype) or getattr(config, "dtype", None) or torch.float32
    names = Recipe().targets if targets is None else parse_targets(targets)
    with waiting("running a step without data"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a model says when it is built
        found = library.estimate(
            lambda: untrained(config, chosen),
            method=method.value,
            mask=mask,
            density=density,
            rank=rank,
            targets=names,
            batch_size=batch_size,
            length=length,
            checkpointing=checkpointing,
            dropout=dropout,
        )
    setup: dict[str, Any] = {"model": model, "method": method.value, "dtype": str(chosen).removeprefix("torch.")}
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
