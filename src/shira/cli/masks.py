"""shira masks: list all masks."""

from typing import Annotated

import typer
from rich.table import Table

from .output import console, print_json

__all__ = ["masks"]

WIDE = 110  # signs in a line of a terminal in which each column has enough room
COLUMNS = ("entries that train", "source", "calibration", "options")


def masks(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the masks: the entries that each trains, its source, the calibration that it needs, and its options.

    Example: shira train SmolLM2-135M-Instruct-Q4_1 --data spam --mask block:by=snip,size=8
    """
    from .. import masks as catalogue

    rows = catalogue.available()
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    is_narrow = console.width < WIDE
    table = Table("mask", *([", ".join(COLUMNS)] if is_narrow else COLUMNS), show_lines=is_narrow)
    table.columns[-1].no_wrap = not is_narrow  # an option is read in one piece
    for row in rows:
        calibrated = ", ".join(name.replace("_", " ") for name in row.needs if name in catalogue.CALIBRATED)
        options = [f"{key}={_text(value)}" for key, value in row.options.items()]
        if "adapter" in row.options:
            options[-1] += " (Python only)"  # --mask takes no adapter
        if is_narrow:
            lines = {"": row.meaning, "source: ": row.source, "calibration: ": calibrated, "options: ": ", ".join(options)}
            table.add_row(row.name, "\n".join(name + line for name, line in lines.items() if line))
        else:
            table.add_row(row.name, row.meaning, row.source, calibrated or "-", ",\n".join(options) or "-")
    console.print(table)


def _text(value: object) -> str:
    """An option's default, as it is written after --mask; '…' if it has no fixed default."""
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return "…" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
