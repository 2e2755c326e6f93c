"""shira compare: overlap, distances and ranks of adapters, as a table, JSON, or a page with pictures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..data.models import built_in, model_path
from ..errors import DataError
from .output import bytes_text, cell, console, print_json, progress, waiting

if TYPE_CHECKING:
    from ..checkpoints.sources import CheckpointSource

__all__ = ["compare"]

PAGE, FACTS = "index.html", "compare.json"


def compare(
    adapters: Annotated[list[Path], typer.Argument(help="Adapters, as files; two or more.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model or pipeline they were trained on; needed unless all are deltas.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for index.html and compare.json.", show_default=False)] = None,
    tensor: Annotated[
        str | None, typer.Option(help="The tensor whose mask and spectrum the page draws.", show_default="the most changed")
    ] = None,
    spectra: Annotated[bool, typer.Option(help="Compute singular values, which takes most of the time.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
) -> None:
    """Compare adapters: overlap, AWOM and AWOR, cosine, distances, sign conflicts, and the rank of their changes.

    Example: shira compare spam.safetensors questions.safetensors --base SmolLM2-135M-Instruct-Q4_1 --out report/
    """
    from ..analysis import comparison, report, words
    from ..files.tensorfiles import write_whole

    loaded = comparison.named(adapters)
    if tensor is not None:
        report.check_held(loaded, tensor)
    if out is not None:
        _check_out(out)
        report.pyplot_and_template()
    tensors = _tensors(base, {name for adapter in loaded.values() for name in adapter.tensors}) if base is not None else None
    base = base and (built_in(base) or base)
    with progress("comparing", len({name for adapter in loaded.values() for name in adapter.tensors})) as update:
        found = comparison.compare(
            *loaded.values(), base=tensors, spectra=spectra, on_progress=lambda done, _: update(done, "")
        )
    facts = {"made": report.provenance(loaded, base), **found.as_dict()}
    if out is not None:
        with waiting("drawing"):
            page = report.page(found, loaded, tensors, tensor, base)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / FACTS, json.dumps(facts).encode())
        write_whole(out / PAGE, page.encode())
    if as_json:
        print_json(facts)
        return
    for title, head, rows in report.tables(found, loaded):
        if len(rows) <= 4:  # transposed: long rows of figures do not fit into 80 columns
            head, *rows = map(list, zip(head, *rows, strict=True))
        table = Table(*map(cell, head), title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(cell, row))
        console.print(table)
    for sentence in words.in_words(found):
        console.print(cell(sentence), highlight=False)
    if out is not None:
        console.print(f"{cell(out / PAGE)}: {bytes_text(len(page.encode()))}")


def _check_out(out: Path) -> None:
    """Raise DataError before slow work unless the report can be written there. An earlier report is replaced."""
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    if not there.is_dir():
        raise DataError(f"--out: {there} is no folder; name one for {PAGE} and {FACTS}")
    if (out / PAGE).exists() and not (out / FACTS).exists():
        raise DataError(f"--out: {out / PAGE} is there already and is of no report, and would be lost; name another folder")


def _tensors(base: str, names: set[str]) -> "CheckpointSource":
    """The base. A folder of safetensors files is read tensor by tensor, without Transformers; else a model is loaded."""
    folder = Path(model_path(base))
    if any(folder.glob("*.safetensors")):
        return folder
    from ..runs.bases import load_base

    with waiting("loading the base"):
        return load_base(base, "auto", names)
