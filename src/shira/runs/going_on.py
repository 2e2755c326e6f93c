"""Runs that were stopped go on: their checkpoints lie in a folder beside the output, and the same command finds them there.

The folder also says which run it is of: run.json holds the settings, and a digest of each data file. It is removed when the
run has written its output.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files.paths import CHECKPOINT, OURS, claimed
from ..files.tensorfiles import write_whole
from ..texts import shown
from .outputs import Output
from .shared_options import Masked

__all__ = ["checkpoints_of", "folder_of", "last_step"]

RUN = "run.json"
LAST = ("trainer_state.json", "custom_checkpoint_0.pkl")  # files that a whole checkpoint has: of the Trainer, of Accelerate


@contextlib.contextmanager
def checkpoints_of(output: Output, recipe: Masked, data: Iterable[str | None], *, replace: bool = False) -> Iterator[Path]:
    """The folder for the checkpoints of a run, poet.checkpoints. If a run of the same settings was stopped, its own are in it.

    data: names of what the run reads; those that are files or folders must have the content that they had. replace: a run of
    other settings is given up. If the block ends without an error, the folder is removed.

    Raises DataError if the folder is of another run, or of one that still goes on.
    """
    folder = folder_of(output)
    with claimed(folder) as is_ours:
        if not is_ours:
            raise DataError(f"another run saves its checkpoints in {folder} now; wait for its end, or give another --output")
        _begin(folder, _told(recipe, data, folder), replace)
        try:
            yield folder
        except BaseException:
            if last_step(folder) is None:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def last_step(folder: Path) -> int | None:
    """The step after which the last whole checkpoint in a run's folder was saved, None if there is none."""
    found = {int(name[1]): path for path in folder.iterdir() if (name := CHECKPOINT.fullmatch(path.name))}
    whole = [step for step, path in found.items() if any((path / last).exists() for last in LAST)]
    return max(whole, default=None)


def folder_of(output: Output) -> Path:
    """The folder for the checkpoints of a run."""
    return output.stem.with_name(f"{output.stem.name}.checkpoints")


def _begin(folder: Path, told: dict[str, Any], replace: bool) -> None:
    """Make the folder, or check that it is of this run."""
    if folder.exists() and not all(OURS.fullmatch(path.name) for path in folder.iterdir()):  # a kill may have left it empty
        try:
            before = dict(json.loads((folder / RUN).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise DataError(
                f"{folder} is there already, and holds no checkpoints of a run; move it away, or give another --output"
            ) from None
        differs = next((key for key in sorted(before.keys() | told.keys()) if before.get(key) != told.get(key)), None)
        if differs is None:
            return
        if not replace:
            raise DataError(
                f"{folder} is of a run with {differs} {shown(before.get(differs))}, and this one has "
                f"{shown(told.get(differs))}; give the same command again to go on with that run, --force to begin "
                "anew, or another --output"
            )
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    write_whole(folder / RUN, json.dumps(told, indent=1).encode())


def _told(recipe: Masked, data: Iterable[str | None], folder: Path) -> dict[str, Any]:
    """What decides a run: its settings, and the content of its data, but not of the folder for its checkpoints."""
    found = dataclasses.asdict(recipe)
    for name in data:
        if name and (path := Path(name)).exists():
            found[f"content of {name}"] = _digest(path, folder.absolute())
    told: dict[str, Any] = json.loads(json.dumps(found))
    return told


def _digest(path: Path, apart: Path) -> str:
    """A SHA-256 over the content of a file, or of all files in a folder and their names. apart: a folder that is left out."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    files = [each for each in files if apart not in each.absolute().parents and not OURS.fullmatch(each.name)]
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            digest.update(f"{each.relative_to(path)}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
