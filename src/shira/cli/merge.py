"""shira merge: write a plain checkpoint that contains adapters."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.models import model_path
from .adapters import given_adapters
from .output import bytes_text, cell, console, progress

__all__ = ["merge"]


def merge(
    base: Annotated[str, typer.Argument(help="The base: a folder, a safetensors file, or SmolLM2-135M-Instruct-Q4_1.")],
    adapters: Annotated[list[str], typer.Argument(help="FILE or FILE=STRENGTH, one or more, as in `shira fuse`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder.")],
) -> None:
    """Write a checkpoint that any tool can load: the base with adapters in its weights.

    Example: shira merge SmolLM2-135M-Instruct-Q4_1 spam.safetensors questions.safetensors=0.5 -o merged
    """
    from ..checkpoints import merging

    parts = given_adapters(adapters)
    with progress("merging", 100) as update:
        stayed = merging.merge(model_path(base), parts, output, on_progress=lambda share: update(int(100 * share), ""))
    files = [file.stat().st_size for file in output.iterdir()]
    console.print(f"{cell(output)}: {len(files)} files, {bytes_text(sum(files))}")
    if stayed:
        console.print(f"{stayed} entries have the value of the base: no change, or one smaller than its dtype can hold")
