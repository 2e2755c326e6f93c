"""An adapter's metadata: the fields that readers may rely on, and their types (docs/format.md)."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import AdapterError
from ..sparse.tensor import XXH3
from ..texts import shown

__all__ = ["check_metadata"]


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
