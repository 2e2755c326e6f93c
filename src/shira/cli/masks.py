"""shira masks: list all masks."""

from typing import Annotated

import typer
from rich.table import Table

from .output import console, print_json

__all__ = ["masks"]


def masks(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the masks: the entries that each trains, its source, the calibration that it needs, and its options.

    Example: shira train SmolLM2-135M-Instruct-Q4_1 --data spam --mask block:by=snip,size=8
    """
    from .. import masks as catalogue

    rows = catalogue.available()
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    table = Table("mask", "entries that train", "source", "calibration", "options")
    table.columns[-1].no_wrap = True  # an option is read in one piece
    for row in rows:
        calibrated = ", ".join(name.replace("_", " ") for name in row.needs if name in catalogue.CALIBRATED)
        options = ",\n".join(f"{key}={_text(value)}" for key, value in row.options.items())
        options += " (Python only)" if "adapter" in row.options else ""  # an adapter cannot be given after --mask
        table.add_row(row.name, row.meaning, row.source, calibrated or "-", options or "-")
    console.print(table)


def _text(value: object) -> str:
    """An option's default, as it is written after --mask; '…' if it has no fixed default."""
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return "…" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
