"""Where a training run writes: an adapter, its recipe and its model card, in a folder of their own or side by side.

A folder can be pushed to the hub as it is. Files side by side have one stem: spam.safetensors, spam.yaml, spam.md.
"""

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..adapter import Adapter
from ..errors import DataError
from ..files.paths import claimed
from ..files.suggestions import ADAPTER, is_ours
from ..files.tensorfiles import write_whole
from ..integrations.card import Base, card
from ..integrations.hub import CARD, RECIPE
from .shared_options import Run

__all__ = ["CARD", "RECIPE", "Output", "named", "output_for", "save_run"]

SAMPLES = "samples.png"
SUFFIX = ".safetensors"
OTHER_FILES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".yaml", ".yml", ".json", ".md")  # no names of folders


R = TypeVar("R", bound=Run)


class Output(NamedTuple):
    """The files of a run. kept: the recipe is there already, as the run's own configuration, and is not written again."""

    adapter: Path
    recipe: Path
    card: Path
    samples: Path
    kept: bool = False
    replaces: bool = False  # --force: what is there is lost

    @property
    def stem(self) -> Path:
        """The folder of the files, or what they share of their paths, without an ending."""
        if self.card.name != CARD:
            return self.adapter.with_suffix("")
        return self.adapter.parent if self.adapter.parent.name else self.adapter.parent.absolute()

    @property
    def files(self) -> tuple[Path, ...]:
        """What the run writes."""
        return tuple(path for path in self[:4] if not (self.kept and path == self.recipe))


def output_for(
    output: Path | None,
    stem: str,
    *,
    force: bool = False,
    config: Path | None = None,
    repeats: bool = False,
    model: str = "",
) -> Output:
    """Where a run writes: to the file or folder that was asked for, or, without one, beside each other under a new name.

    output: "poet.safetensors", or the name of a folder, "poet". stem: of the new name; if it is taken, stem-2, stem-3, ….
    config: the run's own YAML file. repeats: the run's settings are those of that file, which then stays as it is.
    model: what trains; if it is a folder, the run does not fill that.

    Raises DataError if something is there already, unless force and it is an adapter, and for the model's own folder;
    FileNotFoundError if the folder to write in does not exist.
    """
    if output is None:
        plain = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "adapter"
        found = _side_by_side(Path(plain + SUFFIX), config, repeats)
        return found if force else next(each for each in _numbered(found, config, repeats) if _is_free(each))
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to save the adapter in; make it first")
    found = _side_by_side(output, config, repeats) if output.suffix == SUFFIX else _in_folder(output)
    is_other_file = output.suffix in OTHER_FILES or (output.suffix != SUFFIX and output.exists() and not output.is_dir())
    if is_other_file or found.adapter.is_dir():
        raise DataError(f"{output} is no name for an adapter: name a file, poet{SUFFIX}, or a folder, poet")
    if found.card.name == CARD and os.path.isdir(model) and output.exists() and output.samefile(model):
        raise DataError(
            f"{output} is the folder of the model, with files of its own; name another folder, or a file, poet{SUFFIX}"
        )
    if force and found.adapter.exists() and not is_ours(found.adapter):
        raise DataError(
            f"{found.adapter} is there already and is no adapter's file, and --force replaces no others; give another "
            "--output, or remove it"
        )
    if force:
        return found._replace(replaces=True)
    if taken := next((path for path in found.files if path.exists()), None):
        raise DataError(f"{taken} is there already, and would be lost; give --force to replace it, or another --output")
    return found


def named(recipe: R, output: Path | None) -> R:
    """The recipe, whose adapter is named after the output if it has no name: poet of "poet", of "poet.safetensors"."""
    if recipe.name or output is None:
        return recipe
    folder = output.parent if output.name == ADAPTER else output
    name = output.stem if output.suffix == SUFFIX and folder is output else folder.name
    return dataclasses.replace(recipe, name=name)


def save_run(
    output: Output,
    adapter: Adapter,
    base: Base,
    save_recipe: Callable[[Path], None],
    *,
    like: Path | None = None,
    data: str | None = None,
    goes_on: bool = False,
) -> Output:
    """Write what a run has made. Returns where: under a further name if somebody else has taken the name meanwhile.

    goes_on: the run has checkpoints. Then what was written does not stay after a failure, so that the same command can be given
    again. Without them an adapter that was written stays, since nothing else holds what was trained.
    """
    with _claimed(output) as output, _removed_on_error(output) if goes_on else contextlib.nullcontext():
        adapter.save(output.adapter, like=like)
        if not output.kept:
            save_recipe(output.recipe)
        picture = output.samples.name if output.samples.exists() else None
        text = card(adapter, output.adapter.name, base, recipe=output.recipe.name, picture=picture, data=data)
        write_whole(output.card, text.encode())
    return output


@contextlib.contextmanager
def _removed_on_error(output: Output) -> Iterator[None]:
    """If the block fails, what it has written does not stay."""
    before = {path for path in output.files if os.path.lexists(path)}
    try:
        yield
    except BaseException:
        for path in set(output.files) - before:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _claimed(output: Output) -> Iterator[Output]:
    """The output, or the next one whose name is free. No run that ends meanwhile takes the same."""
    for found in _numbered(output, None, False):
        found.adapter.parent.mkdir(exist_ok=True)
        with claimed(found.adapter) as is_ours:
            if output.replaces or (is_ours and _is_free(found, but=(output.samples,))):
                yield found
                return


def _in_folder(folder: Path) -> Output:
    return Output(folder / ADAPTER, folder / RECIPE, folder / CARD, folder / SAMPLES)


def _side_by_side(file: Path, config: Path | None, repeats: bool) -> Output:
    found = Output(file, file.with_suffix(".yaml"), file.with_suffix(".md"), file.with_suffix(".png"))
    same = config is not None and config.exists() and found.recipe.exists() and config.samefile(found.recipe)
    return found._replace(kept=same and repeats)


def _is_free(output: Output, *, but: tuple[Path, ...] = ()) -> bool:
    """Whether none of the output's files is there. but: files of the run's own."""
    return not any(map(os.path.lexists, set(output.files) - set(but)))


def _numbered(output: Output, config: Path | None, repeats: bool) -> Iterator[Output]:
    """output, output-2, output-3, …."""
    yield output
    for number in itertools.count(2):
        if output.card.name == CARD:
            yield _in_folder(output.stem.with_name(f"{output.stem.name}-{number}"))
        else:
            yield _side_by_side(output.adapter.with_stem(f"{output.adapter.stem}-{number}"), config, repeats)
