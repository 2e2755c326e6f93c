"""shira targets: what would be trained."""

import re
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .. import masks
from ..weights import targets as target_names
from .output import cell, console, print_json

__all__ = ["parse_layers", "parse_targets", "targets"]


def targets(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or SmolLM2-135M-Instruct; only its config is read.")],
    wanted: Annotated[
        str, typer.Option("--targets", help="Names with commas, all-linear, attention, mlp, auto, or a regex.")
    ] = "all-linear",
    exclude: Annotated[str | None, typer.Option(help="Names, with commas, to leave out.")] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers of layers: 3, or 4-11, or 0,2,4-7.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of each target's entries (0.01).")] = None,
    rank: Annotated[int | None, typer.Option(help="Instead: as many entries as a LoRA of this rank.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry a tensor.")] = False,
) -> None:
    """List the weights that training would touch, and how many of their entries.

    Example: shira targets SmolLM2-135M-Instruct --targets q_proj,v_proj,norm --layers 0-14
    """
    from ..integrations.transformers import skeleton

    chosen = target_names.resolve(
        skeleton(model), parse_targets(wanted), exclude=exclude.split(",") if exclude else (), layers=parse_layers(layers)
    )
    budget = {"density": density if density is not None or rank is not None else 0.01, "rank": rank}
    counts = masks.plan({target.name: target.sides for target in chosen}, **budget).counts  # type: ignore[arg-type]
    rows = [_row(target, counts[target.name]) for target in chosen]
    if as_json:
        print_json(rows)
        return
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"]), *row["shape"], row["layer"]), []).append(row)
    table = Table(Column("tensor", no_wrap=True), "×", "shape", "module", "each")
    for (name, *_), members in groups.items():
        first = members[0]
        shape = "×".join(map(str, first["shape"]))
        table.add_row(cell(name), str(len(members)), shape, first["layer"], f"{first['trained']:,}")
    console.print(table)
    trained, entries = sum(row["trained"] for row in rows), sum(row["entries"] for row in rows)
    console.print(f"{len(rows)} tensors, {trained:,} of {entries:,} entries ({trained / entries:.2%})")


def parse_targets(text: str) -> str | list[str]:
    """What --targets means: a comma makes a list of names, and so does a plain name; else a keyword or a regex."""
    if text in ("auto", *target_names.KEYWORDS) or not re.fullmatch(r"[\w.,\s-]+", text) or ".*" in text:
        return text
    return [part.strip() for part in text.split(",")]


def parse_layers(text: str | None) -> list[int] | None:
    """Numbers and spans, with commas: "0,2,4-7"."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if span is None:
            raise typer.BadParameter(f"layers must be numbers and spans with commas, as 0,2,4-7; found {part!r}")
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    return numbers


def _row(target: target_names.Target, trained: int) -> dict[str, Any]:
    layer = " and ".join(dict.fromkeys(type(module).__name__ for module in target.modules))
    shape = list(target.weight.shape)
    return {"name": target.name, "shape": shape, "layer": layer, "entries": target.weight.numel(), "trained": trained}
