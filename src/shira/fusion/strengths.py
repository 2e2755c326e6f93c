"""How strongly an adapter works: one number, or one for each tensor by pattern."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..errors import AdapterError, TargetError
from ..files.paths import path_of
from ..texts import described, shown
from ..weights.targets import by_pattern

__all__ = ["CheckedStrength", "Strength", "as_given", "check_strengths", "given_strengths", "is_there", "strengths_of"]

LARGEST = (2 - 2**-23) * 2.0**127  # that float32 holds, in which all is added up
Strength = float | Mapping[str, float]  # of a whole adapter; or of its tensors, pattern -> strength
CheckedStrength = float | tuple[tuple[str, float], ...]  # the same, checked and hashable


def given_strengths(call: str, adapters: Any) -> dict[str, tuple[Adapter | Path, Any]]:
    """Label -> an adapter, or the file of one, and its strength, which is not checked; by label. adapters: file -> strength, or
    name -> (Adapter, strength). call: of which function, for the message of the AdapterError that is raised for anything else.
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
    return given


def check_strengths(strengths: Mapping[str, Strength]) -> dict[str, CheckedStrength]:
    """Each adapter's strength, checked. Raises AdapterError for one that is no finite number, nor maps patterns to such."""
    return {name: _fixed(f"the strength of {shown(name)}", strength) for name, strength in strengths.items()}


def _fixed(what: str, strength: Any) -> CheckedStrength:
    if isinstance(strength, Mapping):
        if not strength or not all(isinstance(pattern, str) for pattern in strength):
            raise AdapterError(f"{what} must map patterns of tensor names to numbers, found {shown(dict(strength))}")
        return tuple((pattern, _finite(f"{what} for {shown(pattern)}", value)) for pattern, value in strength.items())
    return _finite(what, strength)


def _finite(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        too_large = isinstance(value, int | float) and LARGEST < abs(value) < math.inf
        raise AdapterError(
            f"{what} must be a finite number, found {shown(value)}" + (", which float32 does not hold" if too_large else "")
        )
    return float(value)


def as_given(strength: CheckedStrength) -> float | dict[str, float]:
    """A checked strength in the form it was given in."""
    return strength if isinstance(strength, float) else dict(strength)


def is_there(strength: CheckedStrength) -> bool:
    """Whether any of it is not 0."""
    return strength != 0 if isinstance(strength, float) else any(value != 0 for _, value in strength)


def strengths_of(label: str, strength: CheckedStrength, names: Iterable[str]) -> dict[str, float]:
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
