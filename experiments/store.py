"""Results as JSON lines: what has been run is not run again, several processes share the work, and any run can be redone alone.

A key says all that decides a run, as plain JSON; its hash is the run's number. A line holds the key, what came out, when, how
long it took and under which versions.
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
WAIT = 5.0  # seconds between two looks at what other processes are doing


def number(key: Key) -> str:
    """The hash by which a run is known: the same for the same settings, in whatever order."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def artefacts() -> Path:
    """Where trained adapters are kept, a folder a run: in the user cache, since they can be trained again."""
    folder = cache_folder() / "experiments"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def on_accelerator(model: nn.Module) -> nn.Module:
    """The model, moved to a GPU if there is one."""
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


class Store:
    """A file of results, which other processes may add to meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        self._read = 0  # bytes

    def get(self, key: Key) -> dict[str, Any] | None:
        """What came out of a run, or None if it is not done."""
        line = self.line(number(key))
        return None if line is None else line["result"]

    def line(self, run: str) -> dict[str, Any] | None:
        """All that is known of a run, by its number."""
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
        """Take lines out of the file; returns how many."""
        kept = [line for line in self.lines() if not unwanted(line)]
        gone = len(self._lines) - len(kept)
        with FileLock(f"{artefacts() / self.path.name}.lock"):
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._lines, self._read = {}, 0
        return gone

    def _follow(self) -> None:
        """Read what has been added; a line that is being written is left for the next time."""
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
    """Whether this process may do a run; others cannot until it has ended, however it ends."""
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
    """Run what is wanted and not yet done, one after another, beside any other processes that do the same.

    wanted() is asked anew after each run, since what is wanted may depend on what came out. on_run(key, how many are left) is
    called before each. A run that fails is left out, for lack of memory say, and the others go on: on_failure(key, error).
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
