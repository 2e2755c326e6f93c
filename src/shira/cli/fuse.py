"""shira fuse: several adapters into one file."""

from pathlib import Path
from typing import Annotated

import typer

from .. import fusion
from ..errors import DataError
from ..format import load
from .output import bytes_text, console, parse_adapter, waiting

__all__ = ["fuse"]


def fuse(
    adapters: Annotated[list[str], typer.Argument(help="FILE or FILE=STRENGTH, two or more (or one, to weaken it).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The fused adapter's file.")] = Path("fused.safetensors"),
    base: Annotated[
        str | None, typer.Option(help="The model they were trained on; needed unless all are deltas.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="The fused adapter's name.")] = None,
) -> None:
    """Fuse adapters into one: base + Σ strength · (values − base).

    Example: shira fuse spam.safetensors questions.safetensors=0.5 --base SmolLM2-135M-Instruct -o both.safetensors
    """
    parts = [parse_adapter(text) for text in adapters]
    if len({path for path, _ in parts}) < len(parts):
        raise DataError("one adapter is given twice; give it once, with the sum of its strengths")
    loaded = {path: (load(path), strength) for path, strength in parts}
    model = None
    if base is not None:
        from ..integrations.transformers import load_model

        recorded = {str((adapter.metadata.get("base") or {}).get("dtype", "auto")) for adapter, _ in loaded.values()}
        with waiting("loading the base"):
            model = load_model(base, recorded.pop() if len(recorded) == 1 else "auto")
    fused = fusion.fuse(loaded, base=model)
    if name:
        fused.metadata["name"] = name
    fused.save(output)
    console.print(f"{output}: {fused.nnz:,} entries, {bytes_text(output.stat().st_size)}")
