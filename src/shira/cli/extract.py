"""shira extract: make a sparse adapter from a full fine-tune."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..data.models import model_path
from .options import Force, check_new, check_shares
from .output import bytes_text, cell, console, print_json, progress

__all__ = ["extract"]


def extract(
    base: Annotated[str, typer.Argument(help="The base: a folder, a safetensors file, or SmolLM2-135M-Instruct-Q4_1.")],
    tuned: Annotated[str, typer.Argument(help="Its fine-tune, in the same form.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter's file.")] = Path("extracted.safetensors"),
    density: Annotated[
        float | None, typer.Option(help="Share of entries to take.", show_default="all that differ, if few do")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Instead, the share of ‖ΔW‖ to keep, with the fewest entries.", show_default=False)
    ] = None,
    scope: Annotated[str, typer.Option(help="What has the budget: tensor (each), or model (all together).")] = "tensor",
    kind: Annotated[str, typer.Option(help="overwrite (the tuned values) or delta (the differences).")] = "overwrite",
    targets: Annotated[
        str | None, typer.Option(help="Names with commas, attention, mlp, or a regular expression.", show_default="all")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The adapter's name.", show_default="the fine-tune's")] = None,
    license: Annotated[str | None, typer.Option(help="The adapter's licence, for its file.", show_default=False)] = None,
    force: Force = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor that differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, with every tensor.")] = False,
) -> None:
    """Take the entries of a full fine-tune that differ most from its base, and report how much of the difference they keep.

    Example: shira extract SmolLM2-135M-Instruct-Q4_1 my-fine-tune --density 0.05 -o mine.safetensors
    """
    from ..adapter import opened
    from ..checkpoints import extraction

    check_shares(density=density, keep=keep)
    check_new(output, force=force)
    names = [part.strip() for part in targets.split(",")] if targets and "," in targets else targets
    with progress("comparing", 100) as update:
        extraction.extract_to(
            output,
            model_path(base),
            model_path(tuned),
            density=density,
            keep=keep,
            scope=scope,
            kind=kind,
            targets=names,
            name=name,
            license=license,
            on_progress=lambda share: update(int(100 * share), ""),
        )
    with opened(output) as adapter:
        facts, share = extraction.summary(adapter), adapter.density
        taken = {tensor: sparse.nnz for tensor, sparse in adapter.tensors.items()}
    nnz, size = sum(taken.values()), output.stat().st_size
    if as_json:
        print_json({"file": str(output), "bytes": size, "nnz": nnz, "density": share, **facts})
        return
    if tensors:
        listing = Table("tensor", "entries", "that differ", "taken", "‖ΔW‖", "kept")
        for tensor, found in facts["tensors"].items():
            kept = f"{found['kept']:.1%}"
            count = f"{taken.get(tensor, 0):,}"
            listing.add_row(cell(tensor), f"{found['entries']:,}", f"{found['changed']:,}", count, f"{found['norm']:.4g}", kept)
        console.print(listing)
    console.print(_curve(facts))
    left_out = f"; nothing is taken of {len(facts['left_out'])} tensors that differ" if facts["left_out"] else ""
    console.print(
        f"{cell(output)}: {nnz:,} of {facts['changed']:,} entries that differ, {bytes_text(size)}, "
        f"{facts['kept']:.1%} of ‖ΔW‖{left_out}"
    )


def _curve(facts: dict[str, Any]) -> Table:
    """A table of the share of ‖ΔW‖ that each density keeps. The suggested density is marked."""
    table = Table("density", "keeps of ‖ΔW‖", "", title=f"ΔW by scope {facts['scope']}", title_justify="left")
    for density, share in facts["curve"]:
        mark = "suggested" if density == facts["suggested_density"] else ""
        table.add_row(f"{density:g}", f"{share:.1%}", mark)
    return table
