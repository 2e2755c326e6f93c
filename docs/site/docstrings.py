"""How a docstring becomes Markdown for the API reference: a list of its parameters, and examples as code."""

import re
import textwrap
from typing import Any

import griffe

NAMES = re.compile(r"(\*{0,2}\w+(?:\([\w, ]*\))?(?:, \*{0,2}\w+(?:\([\w, ]*\))?)*): (.*)")


def as_markdown(docstring: str, parameters: set[str]) -> str:
    """A line that begins with names of parameters and a colon becomes an item of a list; an indented block becomes code."""
    blocks = re.split(r"\n\s*\n", docstring)
    return "\n\n".join(_code(block) if block.startswith("    ") else _text(block, parameters) for block in blocks)


def _code(block: str) -> str:
    return f"```python\n{textwrap.dedent(block)}\n```"


def _text(block: str, parameters: set[str]) -> str:
    lines: list[str] = []
    in_a_list = False
    for line in re.sub(rf"(?<=[.;]) (?={NAMES.pattern})", lambda here: _unless_it_goes_on(here, parameters), block).split("\n"):
        found = NAMES.match(line)
        if found and _names(found[1]) <= parameters:
            if lines and not in_a_list:
                lines.append("")
            in_a_list = True
            line = f"- `{found[1]}`: {found[2]}"
        elif in_a_list and not line.startswith(" "):
            lines.append("")
            in_a_list = False
        lines.append(line)
    return "\n".join(lines)


def _names(listed: str) -> set[str]:
    """Of "loss_fn(model, batch), seed": both names."""
    return set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", listed)))


def _unless_it_goes_on(space: re.Match[str], parameters: set[str]) -> str:
    """A new line before the names of parameters within a line; the space itself before anything else."""
    found = NAMES.match(space.string, space.end())
    return "\n" if found and _names(found[1]) <= parameters else " "


class Docstrings(griffe.Extension):
    """Every docstring of the package, once it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        named = getattr(obj, "parameters", ())
        parameters = {parameter.name for parameter in named} | set(obj.members)
        obj.docstring.value = as_markdown(obj.docstring.value, parameters)
