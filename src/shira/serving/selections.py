"""What a request runs with: the base, one adapter, or several with strengths; as users write it, and as a key.

Requests with equal keys may share a batch. The key holds the version of each adapter's file at the time of the request, so it
means the same in every process that sees the served folder, and after the file was replaced it means the old file.
"""

import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from ..errors import did_you_mean
from ..texts import shown, strict_json
from .problems import Problem

__all__ = [
    "AdapterReplaced",
    "Part",
    "SelectionError",
    "ServedSelection",
    "UnknownAdapter",
    "is_possible",
    "of_key",
    "parse",
    "parse_name",
]

MOST_PARTS = 16
MOST_LETTERS = 4096
LONGEST_NAME = 240  # bytes; file systems take 255, and it has an ending
NAME = re.compile(r"[^\s/\\+:@\x00-\x1f]+")
WRITTEN = "NAME, NAME:STRENGTH, or several joined by +, as in 'poet:1.0+coder:0.5'"


class SelectionError(Problem):
    """A text that names no possible selection."""

    code = "invalid_model"
    param = "model"


class UnknownAdapter(SelectionError):
    """A name that no served adapter has."""

    status = 404
    code = "model_not_found"


class AdapterReplaced(Problem):
    """An adapter whose file was replaced or removed after the request came. OpenAI's client sends such a request again."""

    status = 409
    code = "adapter_replaced"


class Part(NamedTuple):
    """One adapter of a selection. version: of its file (`catalogue.version_of`)."""

    name: str
    version: str
    strength: float = 1.0


class ServedSelection(NamedTuple):
    """Adapters in the order of their names; none for the base."""

    parts: tuple[Part, ...] = ()

    @property
    def key(self) -> str:
        """The selection as one text, "" for the base. Equal selections have equal keys."""
        return json.dumps(self.parts, separators=(",", ":"), ensure_ascii=True) if self.parts else ""

    def __str__(self) -> str:
        """The selection as a user would write it, "base" for the base."""
        return "+".join(f"{name}:{_written(strength)}" if strength != 1 else name for name, _, strength in self.parts) or "base"


def _written(strength: float) -> str:
    """A strength as a user would write it, and exactly."""
    short = f"{strength:g}"
    return short if float(short) == strength else repr(strength)


def parse_name(name: str) -> str:
    """The name of an adapter, if it is possible. Raises SelectionError otherwise."""
    if not NAME.fullmatch(name) or name.startswith(".") or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        raise SelectionError(
            f"{shown(name)} cannot be the name of an adapter: it must not be empty, begin with a dot, have more than "
            f"{LONGEST_NAME} bytes, or hold white space, characters that cannot be printed, or any of / \\ + : @"
        )
    return name


def parse(text: str, versions: Mapping[str, str], refused: Container[str] = (), base: Sequence[str] = ()) -> ServedSelection:
    """The selection that a text names: "poet", "poet:0.5", "poet:1.0+coder:0.5".

    versions: name -> version of each adapter that is served. refused: names of files that cannot be served. base: names of the
    base, which a message about a wrong name shows first.
    An adapter with strength 0 is left out.
    Raises UnknownAdapter for a name that is not served; SelectionError for anything else that is no selection.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > MOST_LETTERS:
        raise SelectionError(f"expected {WRITTEN}; found {shown(text)}")
    parts: dict[str, Part] = {}
    pieces = text.split("+")
    if len(pieces) > MOST_PARTS:
        raise SelectionError(f"a selection has at most {MOST_PARTS} adapters, found {len(pieces)}")
    for piece in pieces:
        name, colon, written = piece.strip().partition(":")
        if name in refused:
            raise UnknownAdapter(f"adapter {shown(name)} is not served: its file cannot be used; GET /v1/adapters says why")
        if name not in versions:
            known = versions if len(pieces) > 1 else [*base, *versions]
            raise UnknownAdapter(f"no adapter {shown(name)} is served; {did_you_mean(name, known)}")
        if name in parts:
            raise SelectionError(f"{shown(name)} is named twice in {shown(text)}; give it one strength")
        parts[name] = Part(name, versions[name], _strength(written, name) if colon else 1.0)
    return ServedSelection(tuple(sorted(part for part in parts.values() if part.strength)))


def is_possible(text: str) -> bool:
    """Whether a text would be a selection, if there were adapters of the names in it."""
    names = {piece.partition(":")[0].strip(): "" for piece in text.split("+")}
    try:
        for name in names:
            parse_name(name)
        parse(text, names)
    except SelectionError:
        return False
    return True


def _strength(written: str, name: str) -> float:
    try:
        strength = math.nan if "_" in written or not written.isascii() else float(written)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise SelectionError(f"the strength of {shown(name)} must be a finite number, found {shown(written)}; write {WRITTEN}")
    return strength


def of_key(key: str) -> ServedSelection:
    """The selection of a key. Raises SelectionError for a text that is no key."""
    try:
        parts = tuple(Part(name, version, float(strength)) for name, version, strength in strict_json(key)) if key else ()
        selection = ServedSelection(parts)
        for name, version, _ in parts:
            if not isinstance(version, str):
                raise ValueError
            parse_name(name)
    except (ValueError, TypeError, SelectionError):
        raise SelectionError(f"{shown(key)} is no key of a selection") from None
    return selection
