"""Options that are defined once, as a field of a dataclass.

The field has the option's type, default, help text and bounds, its form on a command line, and the receiver of its value. The
check, the command (`cli/options.py`), the YAML file and the call are derived from it.
"""

import dataclasses
import operator
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import DataError
from ..texts import as_share, shown

__all__ = ["check", "kinds", "option", "parse_layers", "parse_scale", "parse_targets", "passed_to"]

LARGEST = 2**63 - 1  # the largest integer in an int64 tensor
BOUNDS = {"ge": "from {} on", "gt": "above {}", "le": "at most {}", "lt": "below {}"}  # named as in `operator`
WORDS: dict[Any, str] = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
WORDS |= {list[str]: "a list of names", list[int]: "a list of numbers", dict[str, Any]: "'name: value' pairs"}


def option(
    default: Any, help: str, to: str = "", *, group: str = "", usual: str = "", parse: Any = None, **bounds: float
) -> Any:
    """A dataclass field that is an option.

    to: the receiver of the value: "attach", "trainer" or both. group: the heading of this and the next options in a command's
        help.
    usual: what holds if the value is None, for the help of a command.
    parse: converts the text of a command line to the value, or raises ValueError. bounds: any of BOUNDS, for numbers.
    """
    limits = [(getattr(operator, name), BOUNDS[name].format(limit), limit) for name, limit in bounds.items()]
    about = {"help": help, "to": to, "group": group, "usual": usual, "parse": parse, "limits": limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def kinds(owner: Any) -> Iterator[tuple[dataclasses.Field[Any], tuple[Any, ...]]]:
    """(field, types that its value may have) for each option of a dataclass."""
    hints = get_type_hints(owner)
    for field in dataclasses.fields(owner):
        hint = hints[field.name]
        yield field, get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def check(recipe: Any) -> None:
    """Raise DataError, which names the option, if a value has a wrong type or is out of bounds."""
    for field, allowed in kinds(type(recipe)):
        value, limits = getattr(recipe, field.name), field.metadata["limits"]
        if not any(_fits(value, kind, limits) for kind in allowed):
            expected = " or ".join(_in_words(kind, limits) for kind in allowed if kind is not types.NoneType)
            is_share = any(limit == 1 and not holds(2, limit) for holds, _, limit in limits)
            more = as_share(value) if is_share else ""
            raise DataError(f"recipe: {field.name} must be {expected}, found {shown(value)}{more}")


def passed_to(receiver: str, recipe: Any) -> dict[str, Any]:
    """The options for a receiver, by name. Options that are None are left out, so that the receiver's defaults apply."""
    chosen = (field.name for field in dataclasses.fields(recipe) if receiver in field.metadata["to"])
    return {name: value for name in chosen if (value := getattr(recipe, name)) is not None}


def parse_targets(text: str) -> str | list[str]:
    """Parse --targets: a plain name, or names with commas, give a list; a keyword or a regular expression gives the text."""
    from ..weights.targets import KEYWORDS

    if text in ("auto", *KEYWORDS) or not re.fullmatch(r"[\w.,\s-]+", text) or ".*" in text:
        return text
    return [part.strip() for part in text.split(",")]


def parse_scale(text: str) -> float | str:
    """Parse --lr-scale: auto, or a number."""
    return text if text == "auto" else float(text)


def parse_layers(text: str) -> list[int]:
    """Parse numbers and spans with commas: "0,2,4-7". Raises ValueError for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if span is None:
            raise ValueError(part)
        numbers += range(int(span[1]), int(span[2] or span[1]) + 1)
    return numbers


def _fits(value: Any, kind: Any, limits: Any) -> bool:
    """Whether a value has a type. Numbers must also be finite and within the limits, and integers must fit into int64."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inner[0], ()) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if kind in (int, float):
        largest = LARGEST if type(value) is int else sys.float_info.max
        return type(value) in (int, kind) and abs(value) <= largest and all(holds(value, end) for holds, _, end in limits)
    return isinstance(value, kind)


def _in_words(kind: Any, limits: Any) -> str:
    """A type in words; for a number, with its limits."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    ends = " and ".join(text for _, text, _ in limits) if kind in (int, float) else ""
    return f"{WORDS[kind]} {ends}".strip()
