"""A command whose errors and help show options and defaults as they are typed: `--base`, not `base=`."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand

from ..data.models import BUILT_IN
from ..errors import ShiraError
from ..texts import as_share
from ..training.foreign_names import here

__all__ = ["Command", "as_typed"]

TEXT = r"'[^']*'" + r'|"[^"]*"'
# as repr writes it, and no part of a path, as in runs/lr=0.1/a.safetensors
VALUE = rf"""(?:{TEXT}|\[(?:{TEXT}|[^\]'"])*\]|True|False|None|[+-]?[\d.]+(?:e[+-]?\d+)?)(?![\w./-])"""


class Command(TyperCommand):
    """A command of Typer. Its help shows defaults without brackets, and a ShiraError that leaves it names options as typed."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        for each in self.params:
            if isinstance(shown := getattr(each, "show_default", None), str):  # Typer would put it in brackets
                setattr(each, "_get_default_string", lambda shown=shown, **_: shown)  # noqa: B010

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if error.param is not None and error.param.name == "model" and not error.message:  # it is missing
                error.possibilities = None  # type: ignore[attr-defined]  # options that are only spelled alike
                error.message = f"Give a folder, a hub id, or a built-in model: {', '.join(BUILT_IN)}."
            if error.param is not None and re.search("valid (float|number)", error.message):
                shares = (as_share(text) for text in _texts_of(error.param.opts, typed))
                error.message = error.message.removesuffix(".") + next(filter(None, shares), ".")
            raise
        except Exception as error:
            unknown = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
            known = {each.name: each.opts[0] for each in self.params if each.name}
            if said := here(unknown, known, lambda name: known[name]):
                error.possibilities = None  # type: ignore[attr-defined]  # options that are only spelled alike
                error.message = f"{error.message.removesuffix('.')}; {said}"  # type: ignore[attr-defined]  # Click's errors have one
            raise

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ShiraError as error:
            flags = {each.name: max(each.opts, key=len) for each in self.params if each.name and each.opts[0].startswith("-")}
            typed = {name for name in flags if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
            error.args = (as_typed(str(error), flags, typed),)
            raise


def _texts_of(flags: list[str], typed: list[str]) -> Iterator[str]:
    """What was typed for an option: as "--density 2%" or "--density=2%"."""
    for word, following in itertools.pairwise([*typed, ""]):
        flag, equals, text = word.partition("=")
        if flag in flags:
            yield text if equals else following


def as_typed(text: str, flags: dict[str, str], typed: set[str]) -> str:
    """An error's text with flags in place of the names of arguments.

    flags: name -> flag, {"base": "--base"}. typed: the names that were given on the command line. The others, which the file
        of a recipe has given, keep their names.

        as_typed("density must be at most 1; or pass base=", flags, {"density"})  # --density must be at most 1; or pass --base
    """
    named = "|".join(map(re.escape, flags)) or "(?!)"

    def with_value(found: re.Match[str]) -> str:
        value = found["value"]
        if value[:1] == "[":
            value = re.sub(r"""['"]|(?<=,) """, "", value[1:-1])
        elif value[:1] in ("'", '"'):
            value = value[1:-1]
        return f"{flags[found['name']]} {value}".rstrip()

    def as_flag(found: re.Match[str]) -> str:
        return flags[found["name"]]

    def if_typed(found: re.Match[str]) -> str:
        return as_flag(found) if found["name"] in typed else found["name"]

    name = f"(?P<name>{named})"
    text = re.sub(rf"(?<![\w.'/\\?&=-]){name}=(?P<value>{VALUE}|(?=[\s,;:)]|$))", with_value, text)
    head, about, rest = re.split(r"( must be|, not both|$)", text, maxsplit=1)
    plain = head.removeprefix("recipe: ")
    if plain == head:
        head = re.sub(rf"(?:(?<=[:;] )|^){name}(?=$| ')", if_typed, head)
    elif not typed.isdisjoint(re.findall(r"\w+", plain)):
        head = re.sub(rf"\b{name}\b", as_flag, plain)
    text, no_option, known = (head + about + rest).partition(" has no option ")
    return text + no_option + re.sub(rf"'{name}'", as_flag, known)
