"""Adapters as arguments of commands: FILE, FILE=STRENGTH, and in a chat NAME=FILE."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from ..texts import shown

if TYPE_CHECKING:
    from ..fusion.strengths import Strength

__all__ = ["Adapters", "given_adapters", "named_adapters"]

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="FILE or FILE=STRENGTH; several are fused. A folder with one adapter is a file, too.",
        show_default=False,
    ),
]


def given_adapters(texts: Sequence[str]) -> "dict[str, Strength]":
    """File -> strength. A text that is a file is not split at its '='.

    Raises DataError for a strength that cannot be read, and if a file is given twice, also by another path.
    """
    from ..files.suggestions import adapter_in
    from ..fusion.strengths import parse_strength

    strengths: dict[str, Strength] = {}
    places: dict[str, str] = {}  # where a file is -> as it was given
    for text in texts:
        _refuse_name(text)
        file, strength = (text, 1.0) if os.path.exists(text) else parse_strength(text)
        place = os.path.realpath(adapter_in(Path(file))) if os.path.exists(file) else file
        if place in places:
            raise DataError(
                f"one adapter is given twice, as {shown(places[place])} and {shown(file)}; give it once, with the sum of its "
                "strengths"
            )
        strengths[file], places[place] = strength, file
    return strengths


def _refuse_name(text: str) -> None:
    """Raise DataError for NAME=FILE or NAME=FILE=STRENGTH of a file that exists."""
    name, rest = _split_name(text)
    if name and not os.path.exists(text.rpartition("=")[0]) and any(map(os.path.exists, (rest, rest.rpartition("=")[0]))):
        raise DataError(f"{shown(text)} gives the adapter a name, and only `shira chat` takes NAME=FILE; give {shown(rest)}")


def named_adapters(texts: Sequence[str]) -> "tuple[dict[str, str], dict[str, Strength]]":
    """Name -> file; and name -> strength for those that have one. FILE, NAME=FILE, FILE=STRENGTH or NAME=FILE=STRENGTH.

    Without a name, it is the file's or the folder's. Raises DataError, also if two adapters have the same name.
    """
    from ..fusion.strengths import parse_strength

    files: dict[str, str] = {}
    strengths: dict[str, Strength] = {}
    for text in texts:
        name, rest = _split_name(text)
        file, strength = (rest, 1.0) if os.path.exists(rest) else parse_strength(rest)
        name = re.sub(r"[\s=]+", "-", name or _name_of(file))  # can be typed as one word
        if name in files:
            raise DataError(f"two adapters have the name {shown(name)}: {files[name]} and {file}; name one: -a NAME={file}")
        files[name] = file
        if file != rest:
            strengths[name] = strength
    return files, strengths


def _split_name(text: str) -> tuple[str, str]:
    """'poet=a/b.safetensors' -> ('poet', 'a/b.safetensors'). What stands before '=' is no name if a strength follows."""
    name, equals, rest = text.partition("=")
    if not equals or not name or not rest or os.path.exists(text) or os.path.exists(name) or rest.startswith("{"):
        return "", text
    try:
        float(rest)
    except ValueError:
        return name, rest
    return "", text


def _name_of(file: str) -> str:
    """An adapter's name by its file, or by its folder if the file has the usual name."""
    from ..files.suggestions import ADAPTER

    path = Path(os.path.abspath(file))  # '.' has a name, too
    return path.parent.name if path.name == ADAPTER else path.name.removesuffix(".safetensors")
