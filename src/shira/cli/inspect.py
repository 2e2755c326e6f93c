"""shira inspect: show what an adapter's file holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .output import bytes_text, cell, console, print_json

if TYPE_CHECKING:
    from ..adapter import Adapter

__all__ = ["describe", "inspect"]


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter, or a weight patch of an RL trainer.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
) -> None:
    """Check an adapter's file, and show what it holds.

    Example: shira inspect spam.safetensors --tensors
    """
    from ..adapter import load

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


def _files_of(path: Path) -> list[Path]:
    """The files of an adapter: one, also if its folder is given, or those of a weight patch."""
    from ..files.suggestions import adapter_in

    found = adapter_in(path)
    return sorted(found.glob("*.safetensors")) if found.is_dir() else [found]


def describe(adapter: "Adapter", file: Path) -> dict[str, Any]:
    """Everything that is known of an adapter, as values that JSON can hold."""
    tensors = {
        name: {
            "shape": list(tensor.shape),
            "nnz": tensor.nnz,
            "density": tensor.nnz / max(1, tensor.numel),
            "kind": tensor.kind,
            "dtype": str(tensor.values.dtype).removeprefix("torch."),
            "fingerprint": adapter.fingerprints.get(name),
        }
        for name, tensor in adapter.tensors.items()
    }
    known = adapter.metadata
    return {
        "file": str(file),
        "name": adapter.name,
        "nnz": adapter.nnz,
        "density": adapter.density,
        "bytes": sum(each.stat().st_size for each in _files_of(file)),
        "kinds": sorted({t.kind for t in adapter.tensors.values()}),
        "dtypes": sorted({str(entry["dtype"]) for entry in tensors.values()}),
        **{key: known.get(key) for key in ("mask", "base", "training", "license", "fused")},
        "fingerprint": adapter.fingerprint,
        "tensors": tensors,
    }
