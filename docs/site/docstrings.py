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
    for line in block.split("\n"):
        in_a_list = _begins_with(line, parameters) or (in_a_list and line.startswith(" "))
        pieces = _apart(line, parameters) if in_a_list else [line]
        for piece in pieces:
            item = _begins_with(piece, parameters)
            if lines and item != lines[-1].startswith(("- ", " ")) and not piece.startswith(" "):
                lines.append("")  # before the first item of a list, and after the last
            lines.append(re.sub(NAMES, r"- `\1`: \2", piece, count=1) if item else piece)
    return "\n".join(lines)


def _begins_with(line: str, parameters: set[str], place: int = 0) -> bool:
    """Whether names of parameters and a colon stand there, as in "loss_fn(model, batch), seed: …"."""
    found = NAMES.match(line, place)
    return bool(found) and set(re.findall(r"\w+", re.sub(r"\([^)]*\)", "", found[1]))) <= parameters


def _apart(line: str, parameters: set[str]) -> list[str]:
    """One piece for each of the parameters that a line describes."""
    starts = [found.end() for found in re.finditer(r"[.;] ", line) if _begins_with(line, parameters, found.end())]
    return [line[start:end].rstrip() for start, end in zip([0, *starts], [*starts, None], strict=True)]


class Docstrings(griffe.Extension):
    """Every docstring of the package, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._walk(pkg)

    def _walk(self, each: griffe.Object) -> None:
        if each.docstring is not None:
            parameters = {parameter.name for parameter in getattr(each, "parameters", ())}
            parameters |= set(each.members) if each.is_class else set()
            each.docstring.value = as_markdown(each.docstring.value, parameters)
        for member in each.members.values():
            if not member.is_alias:
                self._walk(member)
