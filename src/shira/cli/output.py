"""Output of the commands: tables and results on stdout, progress and errors on stderr.

Text may come from untrusted files. So the consoles here interpret no markup, and print control characters as escapes. Text from
a file or an argument also goes through `cell`, so that it cannot break a line either.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
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
from rich.text import Text

from ..errors import did_you_mean
from ..files.paths import nearby
from ..texts import visible

__all__ = ["IS_FIRST", "bytes_text", "cell", "console", "errors", "fail", "print_json", "progress", "waiting", "write"]

LONGEST_CELL, LONGEST_ERROR = 1000, 4000  # characters
LOG_EVERY = 30  # seconds between the lines of a stage in a log

if os.environ.get("COLUMNS") == "0":  # where there is no terminal; rich would print nothing
    del os.environ["COLUMNS"]
IS_FIRST = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, only the first prints and saves


class _Plain(Console):
    """A console for plain text: no markup, no emoji names, and no control characters except line breaks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        if all(isinstance(each, str) for each in objects):  # a line stays one line, also in a log, and may be copied
            options = {"soft_wrap": True, "highlight": False} | options
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, keep="\n"), **options)


console = _Plain(quiet=not IS_FIRST)
errors = _Plain(stderr=True)


def cell(value: object) -> str:
    """A value from a file, or a path, for a line or a table: on one line, with at most LONGEST_CELL characters."""
    text = visible(str(value))
    return text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + "…"


def fail(error: Exception) -> None:
    """Print one line on stderr that says what went wrong."""
    missing = error.filename if isinstance(error, FileNotFoundError) else None
    text = visible(f"there is no file or folder {missing!r}{_near(str(missing))}" if missing else str(error))
    errors.print(Text(type(error).__name__, "bold red"), end=": ")
    errors.print(text if len(text) <= LONGEST_ERROR else text[:LONGEST_ERROR] + "…", highlight=False, soft_wrap=True)


def _near(missing: str) -> str:
    """For a path that does not exist: the near names in its folder, as "; did you mean 'poet'?", or nothing."""
    words = did_you_mean(missing, nearby(missing))
    return f"; {words}" if words.startswith("did") else ""


@contextlib.contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Show progress on stderr. Yields a function: update(done, note), or update(done, note, what, total) for the next stage.

    A terminal shows a bar for each stage. A log gets a line every LOG_EVERY seconds, and one when a stage ends.
    """
    stage, note, done, started = cell(what), "", 0, time.monotonic()
    told = started
    with Progress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=errors,
        disable=not (IS_FIRST and errors.is_terminal),
    ) as bar:
        task = bar.add_task(stage, total=total, note="")

        def update(now: int, its_note: str = "", what: str | None = None, its_total: int | None = None) -> None:
            nonlocal stage, note, done, total, started, told, task
            if what is not None and what != stage:
                if done:
                    _log(stage, started, done, total, note)
                    bar.update(task, total=total or done)  # one without a total ends, and its time stops
                    task = bar.add_task(what, total=its_total, note="")
                else:
                    bar.reset(task, description=what, total=its_total)
                stage, total, started = what, its_total, time.monotonic()
                told = started
            done, note = now, cell(its_note)
            bar.update(task, completed=done, note=note)
            if done != total and time.monotonic() - told >= LOG_EVERY:  # the last line of a stage comes at its end
                _log(stage, started, done, total, note)
                told = time.monotonic()

        yield update
        bar.update(task, total=total or done)
    _log(stage, started, done, total, note)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show the elapsed time on stderr, for work without known progress: a spinner in a terminal, one line in a log."""
    started = time.monotonic()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<26}", markup=False),
        TimeElapsedColumn(),
        console=errors,
        disable=not (IS_FIRST and errors.is_terminal),
    ) as bar:
        bar.add_task(what, total=None)
        yield
    _log(what, started)


def _log(what: str, started: float, done: int = 0, total: int | None = None, note: str = "") -> None:
    """Print the line of a log for a stage that has ended, or goes on."""
    if IS_FIRST and not errors.is_terminal:
        words = [f"{done}/{total}"] if total else [f"{done}", note] if done else []  # without a total the note is the unit
        more = ", ".join(note.split("  ")) if total and note else ""
        words += ["in"] if words else []
        line = " ".join([f"{what}:", *filter(None, words), f"{time.monotonic() - started:.1f} s"]) + (more and f", {more}")
        errors.print(line, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, for programs."""
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def write(text: str) -> None:
    """Print a piece of a longer text on stdout at once. Line breaks and tabs stay."""
    if IS_FIRST:
        sys.stdout.write(visible(text, keep="\n\t"))
        sys.stdout.flush()


def bytes_text(count: int) -> str:
    """1234567 -> '1.2 MB'."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
