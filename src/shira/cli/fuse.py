"""shira fuse: fuse several adapters into one file."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from .adapters import given_adapters
from .options import Density, Drop, Force, MethodName, Seed, check_new, method_options
from .output import bytes_text, cell, console, progress, waiting

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..fusion.strengths import Strength

__all__ = ["fuse"]

EXAMPLES, LONGEST, BATCH = 64, 512, 16  # of each task, with --on; tokens of an example; examples in a batch


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
    on: Annotated[
        list[str] | None,
        typer.Option(
            help="Data of each adapter's task, in their order, as for shira train: each then keeps what it does on them. The "
            "first 64 examples are read, and the model runs on them. In place of a method.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Fuse adapters into one: base + the change that the method computes from all strength · (values − base).

    Example: shira fuse spam.safetensors questions.safetensors=0.5 --base SmolLM2-135M-Instruct-Q4_1 -o both.safetensors
    Example: shira fuse spam.safetensors questions.safetensors --base SmolLM2-135M-Instruct-Q4_1 --on spam --on questions
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
    kind = recorded.pop() if len(recorded) == 1 else "auto"
    if on:
        fused = _on_inputs(strengths, on, base, kind, method)
    else:
        model = None
        if base is not None:
            from ..runs.bases import load_base

            with waiting("loading the base"):
                model = load_base(base, kind, tensors)
        with waiting("fusing"):
            fused = fusing.fuse(strengths, model, method, **options)
    if name:
        fused.metadata["name"] = name
    fused.save(output)
    console.print(f"{cell(output)}: {fused.nnz:,} entries, {bytes_text(output.stat().st_size)}")


def _on_inputs(
    strengths: "Mapping[str | os.PathLike[str], Strength]", on: Sequence[str], base: str | None, dtype: str, method: str
) -> "Adapter":
    """The adapters fused on inputs of their tasks, by `fuse_on_inputs`. Raises DataError if the options do not go together."""
    from ..data.reading import examples_of
    from ..data.tokens import encode
    from ..integrations.transformers import batches, load_tokenizer
    from ..runs.live import load_live
    from ..switching.on_inputs import fuse_on_inputs

    files = {str(file): str(file) for file in strengths}
    if base is None:
        raise DataError("--on runs the model: give it, --base MODEL")
    if len(on) != len(files):
        raise DataError(f"--on must be given once for each adapter, {len(files)} times, in their order; found {len(on)}")
    if method != "sum" or any(strength != 1 for strength in strengths.values()):
        raise DataError("--on takes the place of strengths and methods; give files alone, and no --method")
    tokenizer = load_tokenizer(base)
    rows = [encode(tokenizer, itertools.islice(examples_of(data, "train"), EXAMPLES), LONGEST) for data in on]
    with waiting("loading the model"):
        model, switcher = load_live(base, files, dtype)
    inputs = {file: batches(each[:], model, BATCH, tokenizer.pad_token_id or 0) for file, each in zip(files, rows, strict=True)}
    with progress("reading the adapters", None) as update:
        return fuse_on_inputs(switcher, inputs, progress=lambda done, total: update(done, "", "batches, tensors", total))
