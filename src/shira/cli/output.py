"""How the commands speak: tables and results on stdout, progress and errors on stderr."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import DataError
from ..strengths import Strength

__all__ = ["bytes_text", "console", "errors", "parse_adapter", "print_json", "progress", "waiting"]

console = Console()
errors = Console(stderr=True)


@contextlib.contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields update(done, note), or update(done, note, what, total) for the next stage."""
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
    ) as bar:
        task = bar.add_task(what, total=total, note="")

        stage = what

        def update(done: int, note: str = "", what: str | None = None, total: int | None = None) -> None:
            nonlocal stage, task
            if what is not None and what != stage:
                stage = what
                if bar.tasks[-1].completed:
                    task = bar.add_task(what, total=total, note="")
                else:
                    bar.reset(task, description=what, total=total)
            bar.update(task, completed=done, note=note)

        yield update


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr, with the time that has passed, for what cannot tell how far it is."""
    with Progress(SpinnerColumn(), TextColumn("{task.description:<26}"), TimeElapsedColumn(), console=errors) as bar:
        bar.add_task(what, total=None)
        yield


def print_json(value: Any) -> None:
    """One JSON document on stdout, for programs."""
    print(json.dumps(value, indent=2))


def bytes_text(count: int) -> str:
    """1234567 -> '1.2 MB'."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def parse_adapter(text: str) -> tuple[str, Strength]:
    """'poet.safetensors=0.5' -> ('poet.safetensors', 0.5); without '=', or if the whole is a file, the strength is 1.

    In place of a number, a JSON object may map patterns of tensor names to numbers.
    """
    path, equals, strength = text.partition("={") if text.endswith("}") else text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        if not text.endswith("}"):
            return path, float(strength)
        patterns: dict[str, float] = json.loads("{" + strength)
        return path, patterns
    except ValueError:
        raise DataError(f"{text!r}: the strength after '=' must be a number or a JSON object, found {strength!r}") from None
