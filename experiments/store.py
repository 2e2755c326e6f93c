"""Results as JSON lines. A finished run is not made again, several processes share the work, and each run can be made alone.

A key holds everything that decides a run, as plain JSON. Its hash is the run's number. A line holds the key, the result, the
time, the duration and the versions of the libraries.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

import shira
from shira.data.packages import cache_folder

__all__ = ["Key", "Store", "artefacts", "number", "on_accelerator", "work"]

Key = dict[str, Any]
WAIT = 5.0  # seconds before looking again, while other processes make all runs that are left


def number(key: Key) -> str:
    """The hash that identifies a run. It does not depend on the order of the settings."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def artefacts() -> Path:
    """The folder of trained adapters, one folder for each run. It is in the user cache, since adapters can be trained again."""
    folder = cache_folder() / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def on_accelerator(model: nn.Module) -> nn.Module:
    """The model, moved to an accelerator if there is one."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


class Store:
    """A file of results, to which other processes may add lines at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        self._read = 0  # bytes

    def get(self, key: Key) -> dict[str, Any] | None:
        """The result of a run, or None if it is not done."""
        line = self.line(number(key))
        return None if line is None else line["result"]

    def line(self, run: str) -> dict[str, Any] | None:
        """The line of a run, by the run's number."""
        self._follow()
        return self._lines.get(run)

    def lines(self) -> list[dict[str, Any]]:
        self._follow()
        return list(self._lines.values())

    def add(self, key: Key, result: dict[str, Any], seconds: float) -> None:
        versions = {"shira": shira.__version__, "torch": torch.__version__}
        versions |= {name: version(name) for name in ("transformers", "peft", "lm-eval")}
        line = {"run": number(key), "key": key, "result": result, "seconds": round(seconds, 1), "versions": versions}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{artefacts() / self.path.name}.lock"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}) + "\n")

    def forget(self, unwanted: Callable[[dict[str, Any]], bool]) -> int:
        """Remove lines from the file; returns their number."""
        kept = [line for line in self.lines() if not unwanted(line)]
        gone = len(self._lines) - len(kept)
        with FileLock(f"{artefacts() / self.path.name}.lock"):
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._lines, self._read = {}, 0
        return gone

    def _follow(self) -> None:
        """Read the lines that were added. A line that is not complete yet is read the next time."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for line in filter(None, whole.split(b"\n")):
            row = json.loads(line)
            self._lines[row["run"]] = row


@contextlib.contextmanager
def claim(run: str) -> Iterator[bool]:
    """Yields whether this process may make a run. Then no other process can until this one has left, also by an error."""
    lock = FileLock(artefacts() / f"{run}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def work(
    wanted: Callable[[], Iterable[Key]],
    run: Callable[[Key], dict[str, Any]],
    store: Store,
    on_run: Callable[[Key, int], None] = lambda key, left: None,
    on_failure: Callable[[Key, str], None] = lambda key, what: None,
) -> None:
    """Make the wanted runs that are not done yet, one after another. Other processes may do the same at the same time.

    wanted() is called again after each run, since the wanted runs may depend on results. on_run(key, number of runs left) is
    called before each run. After a run that fails, for example for lack of memory, on_failure(key, error) is called, and the
    other runs continue.
    """
    failed: set[str] = set()
    while left := [key for key in wanted() if store.get(key) is None and number(key) not in failed]:
        for key in left:
            with claim(number(key)) as mine:
                if mine and store.get(key) is None:
                    on_run(key, len(left))
                    start = time.monotonic()
                    try:
                        store.add(key, run(key), time.monotonic() - start)
                    except Exception as error:
                        failed.add(number(key))
                        on_failure(key, f"{type(error).__name__}: {error}")
                    break
        else:
            time.sleep(WAIT)
