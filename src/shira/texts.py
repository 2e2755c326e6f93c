"""Text from others, in files and arguments: parsed strictly, and shown as plain text.

It is shown so that it has no effect on a terminal, on Markdown, or on a reader of JSON.
"""

import json
import math
import numbers
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["as_share", "described", "is_several", "markdown", "plain_number", "shown", "strict_json", "visible"]

LONGEST_NUMBER = 40  # digits
PERCENTAGE = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]{1,20})?)\s*%\s*")
DEEPEST = 32  # objects and lists inside each other
PLAIN = re.compile(r"(?!.*www\.)(?:[^\W_]|[ .,%()+=/;'-])*")  # text without a special meaning in Markdown

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 8, 8, 8
_short.maxstring, _short.maxlong, _short.maxother = 100, 40, 100


def visible(text: str, keep: str = "") -> str:
    r"""The text with every non-printable character escaped as in Python: "\x1b[2J", "\n", "\u202e".

    So it cannot move a cursor, break a line, or change the writing direction. keep: characters that are not escaped.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else sign.encode("unicode_escape").decode() for sign in text)


def shown(value: object) -> str:
    """A value as an error quotes it: short and in one line, however large or deep the value is."""
    try:
        return visible(_short.repr(value))
    except (ValueError, RecursionError):  # a number with thousands of digits, or thousands of nested levels
        return f"a huge {type(value).__name__}"


def described(value: object) -> str:
    """How a message names a value that is not what was expected: "'x' (str)", "a list"."""
    kind = type(value).__name__
    if value is None or isinstance(value, str | bytes | int | float | os.PathLike):
        return f"{shown(value)} ({kind})"
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def plain_number(value: Any) -> Any:
    """A number of NumPy as Python's own, also as a value of a mapping. Anything else is returned as it is."""
    if isinstance(value, Mapping):
        return {key: plain_number(each) for key, each in value.items()}
    return value.item() if isinstance(value, numbers.Number) and hasattr(value, "item") else value


def is_several(value: object) -> bool:
    """Whether a value can be a list of things. Text and mappings are not, nor are arrays and tensors without a dimension."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) and getattr(value, "ndim", 1) != 0


def as_share(value: object) -> str:
    """What to add to an error about a share, if a percentage was given for it, 5 or "5%": "; 5 % is 0.05"."""
    if isinstance(value, str) and (written := PERCENTAGE.fullmatch(value)):
        percentage = float(written[1])
        return f"; {percentage:g} % is {percentage / 100:g}" if percentage <= 100 else ""
    is_percentage = type(value) in (int, float) and 1 < value <= 100  # type: ignore[operator]  # it is a number here
    return f"; {value:g} % is {value / 100:g}" if is_percentage else ""  # type: ignore[operator]


def markdown(text: object) -> str:
    """Text for Markdown, also for a table cell: unchanged, or as code if a character could have a meaning in Markdown."""
    plain = visible(str(text))
    if PLAIN.fullmatch(plain):
        return plain
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    space = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{space}{plain}{space}{fence}".replace("|", "\\|")


def strict_json(content: str | bytes) -> Any:
    """The value of a JSON text, which must have only one meaning.

    Raises ValueError for text that is not JSON, a key twice in one object, a number that is not finite, a whole number of more
    than LONGEST_NUMBER digits, more than DEEPEST levels, or a string that is not valid Unicode and so cannot be written again.
    """
    text = content.decode() if isinstance(content, bytes) else content
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_float=_real, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for each in level:
            if isinstance(each, str):
                each.isascii() or each.encode()  # half of a surrogate pair raises UnicodeEncodeError, a ValueError
            elif isinstance(each, dict):
                below += each
                below += each.values()
            elif isinstance(each, list):
                below += each
        level = below
    if level:
        raise ValueError(f"it nests deeper than {DEEPEST}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"a number that is not finite: {shown(digits)}")
    return value


def _no_number(word: str) -> Any:
    raise ValueError(f"a number that is not finite: {word}")
