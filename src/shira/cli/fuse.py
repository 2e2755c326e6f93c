"""shira fuse: fuse several adapters into one file."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .adapters import given_adapters
from .options import Density, Drop, Force, MethodName, Seed, check_new, method_options
from .output import bytes_text, cell, console, waiting

if TYPE_CHECKING:
    from ..fusion.strengths import Strength

__all__ = ["fuse"]


def fuse(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help='FILE, FILE=STRENGTH, or \'FILE={"*": 1, "*.mlp.*": 0.5}\', where the last pattern that fits counts.'
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The fused adapter's file.")] = Path("fused.safetensors"),
    base: Annotated[
        str | None,
        typer.Option(help="The model or pipeline they were trained on; needed unless all are deltas.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The fused adapter's name.", show_default="the names of all, with +")] = None,
    method: MethodName = "sum",
    density: Density = None,
    drop: Drop = None,
    seed: Seed = None,
    force: Force = False,
) -> None:
    """Fuse adapters into one: base + the change that the method computes from all strength · (values − base).

    Example: shira fuse spam.safetensors questions.safetensors=0.5 --base SmolLM2-135M-Instruct-Q4_1 -o both.safetensors
    """
    from ..adapter import opened
    from ..fusion import fusing
    from ..fusion.strengths import check_strengths

    strengths: dict[str | os.PathLike[str], Strength] = dict(given_adapters(adapters).items())
    options = method_options(method, density=density, drop=drop, seed=seed)  # errors come before the model is loaded
    check_new(output, force=force, read=strengths)
    check_strengths({str(file): strength for file, strength in strengths.items()})
    recorded, tensors = set(), set[str]()
    for file in strengths:
        with opened(file) as adapter:
            tensors |= set(adapter.tensors)
            dtype = (adapter.metadata.get("base") or {}).get("dtype")
            recorded.add(dtype if isinstance(dtype, str) else "auto")
    model = None
    if base is not None:
        from ..runs.bases import load_base

        with waiting("loading the base"):
            model = load_base(base, recorded.pop() if len(recorded) == 1 else "auto", tensors)
    with waiting("fusing"):
        fused = fusing.fuse(strengths, model, method, **options)
    if name:
        fused.metadata["name"] = name
    fused.save(output)
    console.print(f"{cell(output)}: {fused.nnz:,} entries, {bytes_text(output.stat().st_size)}")
