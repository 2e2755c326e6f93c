"""shira targets: list the weights that training would change."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from .options import given, recipe_options
from .output import cell, console, print_json

if TYPE_CHECKING:
    from ..weights.targets import Target

__all__ = ["targets"]


@recipe_options("targets", "exclude", "layers", "density", "rank", "total")
def targets(
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or SmolLM2-135M-Instruct-Q4_1; only its config is read.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one entry a tensor.")] = False,
    **options: Any,
) -> None:
    """List the weights that `shira train` would change, and how many of their entries.

    Example: shira targets SmolLM2-135M-Instruct-Q4_1 --targets q_proj,v_proj,input_layernorm --layers 0-14
    """
    from .. import masks
    from ..integrations.transformers import skeleton
    from ..runs.recipes import usual_targets
    from ..weights.targets import resolve

    found = given(options)
    names = {key: found.pop(key) for key in ("exclude", "layers") if key in found}
    built = skeleton(model)
    chosen = resolve(built, found.pop("targets", None) or usual_targets(built), **names)
    counts = masks.plan({target.name: target.budget_shape for target in chosen}, **(found or {"density": 0.01})).counts
    rows = [_row(target, counts[target.name]) for target in chosen]
    if as_json:
        print_json(rows)
        return
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"]), *row["shape"], row["layer"]), []).append(row)
    table = Table(Column("tensor", overflow="fold"), *(Column(each, no_wrap=True) for each in ("×", "shape", "module", "each")))
    for (name, *_), members in groups.items():
        first = members[0]
        shape = "×".join(map(str, first["shape"]))
        table.add_row(cell(name), str(len(members)), shape, first["layer"], f"{first['trained']:,}")
    console.print(table)
    trained, entries = sum(row["trained"] for row in rows), sum(row["entries"] for row in rows)
    console.print(f"{len(rows)} tensors, {trained:,} of {entries:,} entries ({trained / entries:.2%})")


def _row(target: "Target", trained: int) -> dict[str, Any]:
    layer = " and ".join(dict.fromkeys(type(module).__name__ for module in target.modules))
    shape = list(target.weight.shape)
    return {"name": target.name, "shape": shape, "layer": layer, "entries": target.weight.numel(), "trained": trained}
