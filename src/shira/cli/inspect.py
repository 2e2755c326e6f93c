"""shira inspect: show what an adapter's file holds."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .output import bytes_text, cell, console, print_json

__all__ = ["inspect"]


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter, or a weight patch of an RL trainer.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
) -> None:
    """Check an adapter's file, and show what it holds.

    Example: shira inspect spam.safetensors --tensors
    """
    from ..adapter import load
    from ..analysis.contents import describe

    facts = describe(load(file), file)
    if as_json:
        print_json(facts)
        return
    table = Table("what", "value", title=cell(file), show_header=False, title_justify="left")
    settings = _listed(facts["mask"])
    base = ", ".join(map(str, facts["base"].values())) if facts["base"] else "not recorded"
    rows = {
        "name": facts["name"] or "-",
        "tensors": str(len(facts["tensors"])),
        "entries": f"{facts['nnz']:,}",
        "density": f"{facts['density']:.3%} of the adapted tensors",
        "kind": ", ".join(facts["kinds"]),
        "values": ", ".join(facts["dtypes"]),
        "size": f"{bytes_text(facts['bytes'])}, {facts['bytes'] / max(1, facts['nnz']):.2f} bytes an entry",
        "mask": settings,
        "base": base,
        "fingerprint": facts["fingerprint"] or "not recorded",
        "training": _listed(facts["training"]),
        "license": facts["license"] or "not recorded",
    }
    for key, value in rows.items():
        table.add_row(key, cell(value))
    if facts["fused"]:
        method = {key: value for key, value in facts["fused"].items() if key != "strengths"}
        strengths = ", ".join(f"{name} × {strength}" for name, strength in (facts["fused"].get("strengths") or {}).items())
        table.add_row("fused", cell(f"{_listed(method)}: {strengths}"))
    console.print(table)
    if tensors:
        listing = Table("tensor", "shape", "entries", "density", "kind", "values")
        for name, entry in facts["tensors"].items():
            shape = " × ".join(map(str, entry["shape"]))
            listing.add_row(cell(name), shape, f"{entry['nnz']:,}", f"{entry['density']:.3%}", entry["kind"], entry["dtype"])
        console.print(listing)


def _listed(settings: dict[str, Any] | None) -> str:
    """{"name": "wm", "targets": ["q", "k"], "held_out": {"rows": 3}} -> 'wm, targets q k, held_out (rows 3)'."""
    parts = []
    for key, value in (settings or {}).items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        text = f"({_listed(value)})" if isinstance(value, dict) and value else text
        parts.append(str(text) if key == "name" else f"{key} {text}")
    return ", ".join(parts) or "not recorded"
