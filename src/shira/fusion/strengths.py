"""The strength of an adapter: one number, or one for each tensor by pattern."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..adapter import Adapter
from ..errors import AdapterError, DataError, TargetError
from ..files.paths import path_of
from ..texts import described, shown, strict_json
from ..weights.targets import by_pattern

__all__ = [
    "CheckedStrength",
    "File",
    "Strength",
    "as_given",
    "check_strengths",
    "finite_number",
    "given_strengths",
    "is_nonzero",
    "number_of",
    "parse_strength",
    "strengths_of",
]

LARGEST = (2 - 2**-23) * 2.0**127  # the largest float32, because changes are added up in float32
File = TypeVar("File", bound=str | os.PathLike[str])  # a type checker takes no dict of str for one of str | PathLike
Strength = float | Mapping[str, float]  # of the whole adapter; or pattern of tensor names -> strength
CheckedStrength = float | tuple[tuple[str, float], ...]  # the same, checked and hashable


def parse_strength(text: str) -> tuple[str, Strength]:
    """'poet=0.5' -> ('poet', 0.5). Without '=' the strength is 1.

    Instead of a number, a JSON object may map patterns of tensor names to numbers. Raises DataError for anything else.
    """
    name, equals, strength = text.partition("={") if text.endswith("}") else text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        if not text.endswith("}"):
            return name, float(strength)
        patterns: dict[str, float] = strict_json("{" + strength)
        return name, patterns
    except ValueError:
        raise DataError(
            f"{shown(text)}: the strength after '=' must be a number or a JSON object, found {shown(strength)}"
        ) from None


def given_strengths(call: str, adapters: Any) -> dict[str, tuple[Adapter | Path, Any]]:
    """Label -> (adapter or path of its file, strength), sorted by label. Strengths are not checked.

    call: the name of the calling function, for messages. adapters: file -> strength, or name -> (Adapter, strength).
    Raises AdapterError for anything else, and if a file is given twice, also by another path.
    """
    meant = f"{call} takes {{'poet.safetensors': 1.0}}, or of adapters in memory {{'poet': (poet, 1.0)}}"
    if not isinstance(adapters, Mapping):
        raise AdapterError(f"{meant}; found {described(adapters)}")
    given: dict[str, tuple[Adapter | Path, Any]] = {}
    for key, value in sorted(adapters.items(), key=lambda item: str(item[0])):
        if isinstance(value, tuple):
            if not isinstance(key, str) or len(value) != 2 or not isinstance(value[0], Adapter):
                raise AdapterError(f"{meant}; found {shown(key)}: ({', '.join(map(described, value))})")
            given[key] = value
        elif isinstance(value, Adapter):
            raise AdapterError(f"{meant}; found {shown(key)} with an adapter that has no strength")
        else:
            given[str(key)] = path_of(key, f"{{{'poet.safetensors'!r}: 1.0}}", AdapterError), value
    if len(given) < max(1, len(adapters)):
        verb = call.rpartition(".")[2]
        raise AdapterError("one adapter is given twice" if given else f"nothing to {verb}: give at least one adapter")
    places: dict[str, str] = {}  # where a file is -> its label
    for label, (content, _) in given.items():
        other = label if isinstance(content, Adapter) else places.setdefault(os.path.realpath(content), label)
        if other != label:
            raise AdapterError(f"one adapter is given twice, as {shown(other)} and {shown(label)}; add up its strengths")
    return given


def check_strengths(strengths: Mapping[str, Strength]) -> dict[str, CheckedStrength]:
    """Each adapter's strength, checked. Raises AdapterError unless it is a finite number or maps patterns to finite numbers."""
    return {name: _checked(f"the strength of {shown(name)}", strength) for name, strength in strengths.items()}


def _checked(what: str, strength: Any) -> CheckedStrength:
    if isinstance(strength, Mapping):
        if not strength or not all(isinstance(pattern, str) for pattern in strength):
            raise AdapterError(f"{what} must map patterns of tensor names to numbers, found {shown(dict(strength))}")
        return tuple((pattern, finite_number(f"{what} for {shown(pattern)}", value)) for pattern, value in strength.items())
    return finite_number(what, strength)


def finite_number(what: str, value: Any) -> float:
    """One strength as a float. Numbers of NumPy, and arrays and tensors of one number, are numbers, too. Bools are not.

    what: its name in messages. Raises AdapterError unless it is a finite number that float32 holds.
    """
    number = value if isinstance(value, int | float) else number_of(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST:
        too_large = isinstance(number, int | float) and LARGEST < abs(number) < math.inf
        raise AdapterError(
            f"{what} must be a finite number, found {shown(value)}" + (", which float32 does not hold" if too_large else "")
        )
    return float(number)


def number_of(value: Any) -> Any:
    """The one element of an array, a tensor, or a number of NumPy, in Python's type. Anything else is returned as it is."""
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it has no such method, or not one element
        return value


def as_given(strength: CheckedStrength) -> float | dict[str, float]:
    """A checked strength in the form in which the user gave it."""
    return strength if isinstance(strength, float) else dict(strength)


def is_nonzero(strength: CheckedStrength) -> bool:
    """Whether the strength is not 0, for any tensor."""
    return strength != 0 if isinstance(strength, float) else any(value != 0 for _, value in strength)


def strengths_of(label: str, strength: CheckedStrength, names: Iterable[str]) -> dict[str, float]:
    """Tensor name -> strength. The last pattern that matches a name (`targets.by_pattern`) counts.

    label: the adapter's name in messages. Raises AdapterError for a pattern that matches no name, and for a name that no
    pattern matches. So a typing error does not silently become a strength of 0 or 1.
    """
    names = list(names)
    if isinstance(strength, float):
        return dict.fromkeys(names, strength)
    try:
        found = by_pattern(names, dict(strength))
    except TargetError as error:
        raise AdapterError(f"{label}: {error}") from error
    for name in names:
        if name not in found:
            raise AdapterError(f"{label}: no pattern fits '{name}'; begin with \"*\" to say what holds for the rest")
    return found
