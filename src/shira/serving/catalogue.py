"""The served folder: which adapters there are, under which names, and in which versions.

Each adapter is one file NAME.safetensors, or a folder NAME with one adapter in it. Nothing outside of the folder is opened: a
link that leads out of it is refused.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter import Shapes, check_unchanged, lenders_of, open_lenders, opened, read
from ..analysis.contents import describe
from ..data.models import model_path
from ..errors import ShiraError
from ..files.bases import named_base
from ..files.paths import State
from ..texts import shown, visible
from .selections import AdapterReplaced, SelectionError, ServedSelection, UnknownAdapter, is_possible, parse, parse_name

__all__ = ["SETTLED", "Catalogue", "Found", "path_in", "shapes_of", "version_of"]

ENDING = ".safetensors"
SETTLED = 0.05  # seconds after the last change of a file; before, its writer may still be at work
TRIES = 40  # `load` waits so many times for a file to settle


class Found(NamedTuple):
    """An adapter in the folder. version: "" if it cannot be served, for the reason `error`."""

    name: str
    path: Path
    version: str
    error: str
    states: tuple[tuple[str, State], ...]  # of its files when they were looked at
    lent: tuple[tuple[Path, State | None], ...] = ()  # the same of files beside it that hold positions of it; None: missing


def version_of(states: Iterable[State]) -> str:
    """The version of an adapter, from the states of the files that were read: it changes with every write and replacement."""
    return hashlib.blake2b(repr([state[1:] for state in states]).encode(), digest_size=8).hexdigest()


def shapes_of(model: str) -> Shapes:
    """The tensors of the served model by its path or name, for `Catalogue`. They are looked up when a file needs them."""
    return lambda: named_base(model_path(model)) or {}


def path_in(folder: Path, name: str) -> Path:
    """The path of an adapter in the served folder: its file, or its folder if there is no such file. It need not exist.

    Raises SelectionError for a name that is not possible, or one that leads out of the folder; OSError.
    """
    file = folder / f"{parse_name(name)}{ENDING}"
    is_folder = (folder / name).is_dir() and not os.path.lexists(file)
    path = folder / name if is_folder or os.path.isdir(file) else file  # a folder with that ending has its whole name
    _check_inside(folder, path)  # before what it leads to is listed
    for file in _files(path):
        _check_inside(folder, file)
    return path


def _check_inside(folder: Path, each: Path) -> None:
    """Raise SelectionError for a link that leads out of the folder."""
    if not os.path.realpath(each).startswith(os.path.join(os.path.realpath(folder), "")):
        raise SelectionError(
            f"{str(each.relative_to(folder))!r} is a link that leads out of the served folder; put a copy there"
        )


class Catalogue:
    """What the folder offers now. `scan` looks again; a request keeps the version that it has found.

    base: the names of the base model, the first is shown. shapes: the model's tensors, which a folder of PEFT's SHiRA
    needs (`shapes_of`). Without them its configuration must name a base that is on this machine.
    Raises SelectionError if the folder is none, or a name of the base is empty or could be a selection: "b+c", "b:1".

        catalogue = Catalogue("adapters", ["SmolLM2-135M"])
        catalogue.scan()
        catalogue.resolve("poet:1.0+coder:0.5").key
    """

    def __init__(self, folder: str | os.PathLike[str], base: Sequence[str], shapes: Shapes | None = None) -> None:
        self.folder, self.base = Path(folder).absolute(), tuple(base)  # "adapters/poet" could be a name of the hub
        if self.folder.is_file():
            raise SelectionError(f"{self.folder} is a file; give the folder of the adapters: {self.folder.parent}")
        if not self.folder.is_dir():
            raise SelectionError(f"there is no folder {self.folder} to serve adapters from; make it first")
        for name in self.base:
            if not name.strip() or (re.search("[+:]", name) and is_possible(name)):
                raise SelectionError(
                    f"{shown(name)} cannot be a name of the base model: expected one that is not empty and names no selection "
                    "of adapters, as 'poet+coder' and 'poet:1' do; choose another --served-model-name"
                )
        self._shapes = shapes
        self._found: dict[str, Found] = {}
        self._unloaded: set[str] = set()
        self._one_at_a_time = threading.Lock()
        # name -> version of each adapter that is served; name -> why another cannot be. They are replaced, never changed
        self.versions: Mapping[str, str] = {}
        self.refused: Mapping[str, str] = {}

    def resolve(self, text: str) -> ServedSelection:
        """The selection that a request names. Raises what `selections.parse` raises."""
        return ServedSelection() if text in self.base else parse(text, self.versions, self.refused, self.base)

    def scan(self) -> None:
        """Look at the folder again: new files appear, replaced ones get a new version, removed ones go. Raises OSError."""
        with self._one_at_a_time:
            names = self._names()
            self._found = {name: found for name in names if (found := self._look(name)) is not None}
            self._publish()

    def load(self, name: str) -> str:
        """Serve an adapter of the folder now, also after `unload`. Returns its version.

        Raises UnknownAdapter if it is not there; AdapterReplaced if it does not settle; ShiraError if it cannot be served.
        """
        with self._one_at_a_time:
            found = self._look(parse_name(name), TRIES)
            if found is None:
                raise UnknownAdapter(f"there is no {name}{ENDING} in the served folder, and no folder {name}")
            if found.error:
                raise SelectionError(found.error)
            self._unloaded.discard(name)
            self._found[name] = found
            self._publish()
            return found.version

    def unload(self, name: str) -> None:
        """Serve an adapter no longer, until `load`. Requests that have come keep it. Raises UnknownAdapter."""
        with self._one_at_a_time:
            if name not in self.versions:
                raise UnknownAdapter(f"no adapter {name!r} is served")
            self._unloaded.add(name)
            self._publish()

    def inspect(self, name: str) -> dict[str, Any]:
        """What an adapter holds. All of it is read and checked. Raises UnknownAdapter, FormatError and OSError."""
        path = path_in(self.folder, name)
        if name not in self._found or not path.exists():
            raise UnknownAdapter(f"there is no adapter {name!r} in the served folder")
        return {**describe(read(path, model=self._shapes)[0], path), "file": path.name}

    def listed(self) -> list[dict[str, Any]]:
        """Each adapter in the folder: its name, file, version, bytes, time of the last change, and status."""
        rows = []
        for name, found in sorted(self._found.items()):
            status = "error" if found.error else "unloaded" if name in self._unloaded else "served"
            sizes, times = [state.size for _, state in found.states], [state.modified for _, state in found.states]
            row = {"name": visible(name), "file": visible(found.path.name), "version": found.version, "status": status}
            rows.append({**row, "bytes": sum(sizes), "modified": max(times, default=0) / 1e9, "error": found.error or None})
        return rows

    def _publish(self) -> None:
        found = self._found.items()
        self.versions = {name: each.version for name, each in found if not each.error and name not in self._unloaded}
        self.refused = {name: each.error for name, each in found if each.error}

    def _names(self) -> list[str]:
        """The names of all files and folders that may be adapters; "coder/" for a folder whose name a file has, too."""
        with os.scandir(self.folder) as there:
            found = [each for each in there if not each.name.startswith(".")]
        folders = {each.name for each in found if os.path.isdir(each)}  # of a link that leads to itself, is_dir would raise
        files = {each.name.removesuffix(ENDING) for each in found if each.name.endswith(ENDING) and each.name not in folders}
        return sorted(folders | files | {f"{name}/" for name in folders & files})

    def _look(self, name: str, tries: int = 0) -> Found | None:
        """An adapter as it is now; what was known of it if its files are the same, or are being written; None if it is gone.

        tries: how often to wait for files that are being written. Raises AdapterReplaced after the last.
        """
        before = self._found.get(name)
        try:
            if name.endswith("/"):
                raise SelectionError(f"{name[:-1]}{ENDING} has the same name and goes first; rename one of them")
            path = path_in(self.folder, name)
            if name in self.base:
                raise SelectionError(f"{name!r} is the name of the base model; rename the file")
            states = _states(path)
            lent = _states_of(each for each, _ in before.lent) if before is not None else ()
        except FileNotFoundError as error:
            if not os.path.islink(error.filename):
                return None
            return Found(name, self.folder / name, "", f"{Path(error.filename).name} is a link that leads to nothing", ())
        except (SelectionError, OSError) as error:
            return Found(name, self.folder / name, "", self._without_folder(error), ())
        if not states or (before is not None and (before.states, before.lent) == (states, lent)):
            return before if states else None
        age = time.time() - max(state.changed for _, state in (*states, *lent) if state is not None) / 1e9
        if 0 <= age < SETTLED:  # below 0 the clock was set back, or it is another machine's
            if not tries:
                return before
            if tries == 1:
                raise AdapterReplaced(f"the file of {name!r} is being written; load it again when it is whole")
            time.sleep(SETTLED)
            return self._look(name, tries - 1)
        lent = ()
        try:
            with opened(path, model=self._shapes) as adapter:
                lent = _states_of(lenders_of(adapter))
                for lender, _ in lent:
                    _check_inside(self.folder, lender)
                open_lenders(adapter)
                return Found(name, path, version_of(check_unchanged(adapter)), "", states, lent)
        except FileNotFoundError:
            return None
        except (ShiraError, OSError) as error:
            return Found(name, path, "", self._without_folder(error), states, lent)

    def _without_folder(self, error: Exception) -> str:
        """An error without the place of the folder, which is not for clients."""
        return str(error).replace(f"{self.folder}{os.sep}", "")


def _files(path: Path) -> list[Path]:
    """The files of an adapter, by their names alone: of those in the folder, if it is one."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.suffix in (ENDING, ".json", ".bin")]


def _states(path: Path) -> tuple[tuple[str, State], ...]:
    """Name and state of each file of an adapter."""
    return tuple((file.name, State.of(os.stat(file))) for file in _files(path))


def _states_of(lenders: Iterable[Path]) -> tuple[tuple[Path, State | None], ...]:
    """Path and state of files that may be missing."""
    return tuple((file, State.of(os.stat(file)) if file.exists() else None) for file in lenders)
