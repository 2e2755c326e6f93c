"""How strongly an adapter works: one number, or one for each tensor by pattern."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import AdapterError, TargetError
from .targets import by_pattern

__all__ = ["Fixed", "Strength", "as_given", "check_strengths", "is_there", "strengths_of"]

LARGEST = (2 - 2**-23) * 2.0**127  # that float32 holds, in which all is added up
Strength = float | Mapping[str, float]  # of a whole adapter; or of its tensors, pattern -> strength
Fixed = float | tuple[tuple[str, float], ...]  # the same, checked and hashable


def check_strengths(strengths: Mapping[str, Strength]) -> dict[str, Fixed]:
    """Each adapter's strength, checked. Raises AdapterError for one that is no finite number, nor maps patterns to such."""
    return {name: _fixed(f"the strength of {name!r}", strength) for name, strength in strengths.items()}


def _fixed(what: str, strength: Any) -> Fixed:
    if isinstance(strength, Mapping):
        if not strength or not all(isinstance(pattern, str) for pattern in strength):
            raise AdapterError(f"{what} must map patterns of tensor names to numbers, found {dict(strength)!r}")
        return tuple((pattern, _finite(f"{what} for {pattern!r}", value)) for pattern, value in strength.items())
    return _finite(what, strength)


def _finite(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        too_large = isinstance(value, int | float) and LARGEST < abs(value) < math.inf
        raise AdapterError(
            f"{what} must be a finite number, found {value!r}" + (", which float32 does not hold" if too_large else "")
        )
    return float(value)


def as_given(strength: Fixed) -> float | dict[str, float]:
    """A checked strength in the form it was given in."""
    return strength if isinstance(strength, float) else dict(strength)


def is_there(strength: Fixed) -> bool:
    """Whether any of it is not 0."""
    return strength != 0 if isinstance(strength, float) else any(value != 0 for _, value in strength)


def strengths_of(label: str, strength: Fixed, names: Iterable[str]) -> dict[str, float]:
    """Tensor name -> strength: of the patterns that mean a name (`targets.by_pattern`) the last one counts.

    label: what to call the adapter in a message. Raises AdapterError for a pattern that means no name, and for a name that no
    pattern means: a slip of the pen is then no strength of 0 or 1.
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
