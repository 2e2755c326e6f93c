"""The catalogue: masks by name. The masks made of other masks are in this file, because they look these up by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import MaskError, did_you_mean
from ..texts import plain_number
from . import sets
from .activation import wanda
from .gradient import fisher, grad, snip
from .lowrank import lift
from .magnitude import wm
from .patterns import block, nm
from .scores import INPUTS, Score, find_score, inputs_of, is_ours
from .sets import Chooser, from_adapter, positions_in
from .structured import struct
from .uniform import rand

__all__ = ["CATALOGUE", "Mask", "call", "difference", "intersection", "needs", "resolve", "union"]

Mask = Callable[..., Tensor]


def resolve(mask: str | Mask) -> tuple[str, Mask]:
    """A mask's name and function.

    A name may carry options after a colon, as on a command line: "block:by=snip,size=8", "union:of=wm+rand".
    Raises MaskError for an unknown name, an unknown option, or a function that requires other arguments than a mask's.
    """
    if isinstance(mask, str):
        name, _, rest = mask.partition(":")
        if name not in CATALOGUE:
            raise MaskError(f"unknown mask {name!r}; {did_you_mean(name, CATALOGUE)}")
        return name, _with_options(CATALOGUE[name], name, rest) if rest else CATALOGUE[name]
    if not callable(mask):
        raise MaskError(f"mask must be a name or a function, found {type(mask).__name__}")
    needs(mask)
    inner = mask.func if isinstance(mask, partial) else mask
    return getattr(inner, "__name__", type(inner).__name__), mask


def needs(function: Mask | Score) -> tuple[str, ...]:
    """The inputs that a mask or a score asks for, including those of its `by` and `of`.

    Raises MaskError if it requires any other argument, or has an option that must be a whole number and is not.
    """
    wanted: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in INPUTS:
            wanted.append(parameter.name)
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        elif parameter.default is parameter.empty:
            raise MaskError(f"a mask may ask for {', '.join(INPUTS)}; {function!r} asks for {parameter.name!r}")
        elif is_ours(function) and parameter.annotation in (int, int | None) and not _is_whole(parameter.default):
            raise MaskError(f"{parameter.name} must be a whole number, found {parameter.default!r}")
        elif parameter.name == "by":
            wanted += needs(find_score(parameter.default))
        elif parameter.name == "of":
            wanted += [name for mask in parameter.default for name in needs(resolve(mask)[1])]
    return tuple(dict.fromkeys(wanted))


def _is_whole(value: Any) -> bool:
    value = plain_number(value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def call(function: Mask | Score, inputs: Mapping[str, Any]) -> Any:
    """Call a mask or a score with the inputs it asks for."""
    return function(**inputs_of(function, needs(function), inputs))


def union(weight: Tensor, k: int, of: Sequence[str | Mask] = ("wm", "snip"), **inputs: Any) -> Tensor:
    """Positions of entries that any of several masks chooses, each asked for equally many (ours).

    of: names or functions of masks, two or more. If each mask takes the top of a score, more than k − (number of masks)
        positions are returned.
    Returns int64 [at most k], sorted, flat in C order. Raises MaskError for fewer than two masks, or if one of them raises it.
    """
    return sets.joined(_each(of, weight, inputs), k)


def intersection(weight: Tensor, k: int, of: Sequence[str | Mask] = ("wm", "snip"), **inputs: Any) -> Tensor:
    """Positions of entries that all of several masks choose, each asked for equally many (ours).

    of: names or functions of masks, two or more. If each mask takes the top of a score, more than k − (number of masks)
        positions are returned.
    Returns int64 [at most k], sorted, flat in C order. Raises MaskError for fewer than two masks, or if one of them raises it.
    """
    return sets.common(_each(of, weight, inputs), k, weight.numel())


def difference(weight: Tensor, k: int, of: Sequence[str | Mask] = ("snip", "wm"), **inputs: Any) -> Tensor:
    """Positions of one mask's best entries that no other mask chooses with k (SHiRA's WM-non-overlap, arXiv 2406.13175).

    With the same mask twice it gives "the next k" entries, as in the paper's second non-overlapping WM adapter.

    of: names or functions of masks, two or more; the first is the one mask.
    Returns int64 [at most k], sorted, flat in C order. Raises MaskError for fewer than two masks, or if one of them raises it.
    """
    return sets.remaining(_each(of, weight, inputs), k, weight.numel())


def _each(of: Sequence[str | Mask], weight: Tensor, inputs: dict[str, Any]) -> list[Chooser]:
    """For each mask a function from a count to its positions, int64 and sorted. Raises MaskError for fewer than two masks."""
    if isinstance(of, str) or len(of) < 2:
        raise MaskError(f"a set of masks needs two or more of them, found {of!r}")

    def chooser(label: str, mask: Mask) -> Chooser:
        def choose(count: int) -> Tensor:
            try:
                return positions_in(call(mask, inputs | {"weight": weight, "k": count}), weight, count)
            except MaskError as error:
                raise MaskError(f"its mask {label!r}: {error}") from error

        return choose

    return [chooser(*resolve(mask)) for mask in of]


def _with_options(mask: Mask, name: str, text: str) -> Mask:
    """The mask with options from a text such as "by=snip,size=8".

    A value is a whole number, true, false or a word; the value of `of` is words joined by '+'.
    """
    defaults = {p.name: p.default for p in inspect.signature(mask).parameters.values()}
    known = [key for key in defaults if key not in INPUTS and key != "inputs"]
    options: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known or not equals:
            hint = f"give it a value, {key}=…" if key in known else did_you_mean(key, known)
            raise MaskError(f"mask {name!r}: {part!r} is no option=value; {hint}")
        if isinstance(defaults[key], bool) and not isinstance(_value(value), bool):
            raise MaskError(f"mask {name!r}: {key} must be true or false, found {value!r}")
        options[key] = _value(value) if key != "of" else tuple(value.split("+"))
    changed = partial(mask, **options)
    needs(changed)
    return changed


def _value(text: str) -> int | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return text


CATALOGUE: Mapping[str, Mask] = MappingProxyType(
    {
        "struct": struct,
        "rand": rand,
        "wm": wm,
        "grad": grad,
        "snip": snip,
        "fisher": fisher,
        "wanda": wanda,
        "lift": lift,
        "block": block,
        "nm": nm,
        "union": union,
        "intersection": intersection,
        "difference": difference,
        "from_adapter": from_adapter,
    }
)
