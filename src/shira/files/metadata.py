"""An adapter's metadata: the fields that readers may rely on, and their types (docs/format.md)."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..sparse.tensor import XXH3
from ..texts import shown

__all__ = ["base_facts", "check_metadata", "name_of"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # field -> (test of its type, the type's name in messages)
    **dict.fromkeys(("name", "license"), (_is_text, "a text")),
    **dict.fromkeys(("mask", "base", "training", "fused", "fingerprints", "extraction"), (_is_object, "an object")),
    **dict.fromkeys(("mask.name", "base.id", "fused.method"), (_is_text, "a text")),
    **dict.fromkeys(("mask.options", "fused.strengths"), (_is_object, "an object")),
    "base.dtype": (lambda value: all(map(_is_text, value if isinstance(value, list) else [value])), "a text, or several"),
}


def name_of(path: Path) -> str:
    """A checkpoint's name: its hub id if it is in the hub's cache, otherwise that of its folder or file."""
    path = path.absolute()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.resolve().name


def base_facts(model: str | None, dtypes: Iterable[str]) -> dict[str, Any]:
    """A base for an adapter's metadata: its id, of a path only the name; and its dtype, a list if there are several."""
    known = sorted(set(dtypes))
    local = bool(model) and (Path(str(model)).exists() or Path(str(model)).is_absolute())  # a folder of another machine
    identity = name_of(Path(str(model))) if local else model
    return {"id": identity or "unknown", "dtype": known[0] if len(known) == 1 else known}


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise AdapterError if a field that docs/format.md describes has another type. All other fields are free."""
    for field_name, (fits, expected) in FIELDS.items():
        value: Any = metadata
        for key in field_name.split("."):
            value = value.get(key) if value is not None else None
        if value is not None and not fits(value):
            raise AdapterError(f"metadata '{field_name}' must be {expected}, found {shown(value)}")
    for name, value in (metadata.get("fingerprints") or {}).items():
        if not isinstance(value, str):
            raise AdapterError(f"metadata 'fingerprints' must hold texts, found {shown(value)} for {shown(name)}")
        if ":" in value and not value.startswith(XXH3):
            raise AdapterError(f"the fingerprint {shown(value)} of {shown(name)} is by an unknown hash; upgrade shira-adapters")
