"""Make options of commands from the fields of the Recipe."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ..runs.options import kinds
from ..runs.recipes import Recipe

__all__ = ["given", "recipe_options"]

FIELDS = {field.name: (field.metadata, allowed) for field, allowed in kinds(Recipe)}


def recipe_options(*names: str, **defaults: Any) -> Callable[[Any], Any]:
    """Add options of the Recipe to a command that takes `**options`: those named here, or all. defaults: other defaults."""

    def add(command: Any) -> Any:
        parameters = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
        group = None
        for name, (about, _) in FIELDS.items():
            group = about["group"] or group
            if name in (*names, *defaults) or not names:
                parameters.append(_parameter(name, defaults.get(name), None if names else group))
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return add


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, parsed to the Recipe's values. Raises typer.BadParameter if one cannot be parsed."""
    found = {name: value for name, value in options.items() if value not in (None, [])}
    for name, value in found.items():
        about, _ = FIELDS[name]
        try:
            found[name] = about["parse"](value) if about["parse"] else value
        except ValueError:
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"found {value!r}; expected: {about['help']}", param_hint=flag) from None
    return found


def _parameter(name: str, default: Any, group: str | None) -> inspect.Parameter:
    """One option of a command. Without a default here it is None if it is not given, since a recipe file may set it."""
    about, (kind, *_) = FIELDS[name]
    choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else None
    usual = getattr(Recipe(), name)
    shown: Any = default is not None or (usual not in (None, "") and str(usual).strip("[]").replace("'", ""))
    take: Any = typer.Argument if name == "model" else typer.Option
    option = take(help=about["help"], show_default=shown, rich_help_panel=group, metavar=choices)
    read: Any = str if about["parse"] or choices else kind
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[read | None, option])
