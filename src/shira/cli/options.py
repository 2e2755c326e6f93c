"""Options that several commands have: written here, or made from the fields of a recipe."""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from ..errors import DataError, MaskError, did_you_mean
from ..runs import shared_options
from ..runs.options import kinds
from ..runs.recipes import Recipe
from ..texts import as_share

__all__ = [
    "DTYPES",
    "MOST_SEED",
    "Density",
    "Drop",
    "Dtype",
    "Force",
    "MaxNewTokens",
    "MethodName",
    "Seed",
    "System",
    "Temperature",
    "avoid_cudnn_attention",
    "check_new",
    "check_shares",
    "given",
    "method_options",
    "recipe_options",
]


def fields_of(kind: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> (what its definition says, types that its value may have) for each option of a kind of recipe."""
    return {field.name: (field.metadata, allowed) for field, allowed in kinds(kind)}


DTYPES = get_args(shared_options.Dtype)


def _known_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"found {dtype!r}; {did_you_mean(dtype, DTYPES)}")
    return dtype


Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.", callback=_known_dtype)]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]

# of commands that fuse
MEETING = "How to combine adapters that change the same entry: sum, mean, max, ties or dare."
MethodName = Annotated[str, typer.Option(help=MEETING)]
Density = Annotated[float | None, typer.Option(help="ties: the share of each adapter's changes to keep.", show_default="0.2")]
Drop = Annotated[float | None, typer.Option(help="dare: the probability of dropping a change.", show_default="0.5")]
MOST_SEED = 2**63 - 1  # torch takes no larger ones
Seed = Annotated[int | None, typer.Option(help="dare: the seed of what is dropped.", show_default="0", min=0, max=MOST_SEED)]

# of commands that let a model write
MaxNewTokens = Annotated[int, typer.Option(help="An answer has this many tokens at most.", min=1)]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0: always the most probable token. Above 0: tokens are drawn.", show_default="the model's own settings", min=0
    ),
]
System = Annotated[str, typer.Option(help="A system prompt for the chat template.", show_default=False)]


def method_options(method: str, **given: float | None) -> dict[str, float]:
    """The options that were given. Raises AdapterError for an unknown method, or for a wrong option or value."""
    from ..fusion.methods import resolve

    options = {key: value for key, value in given.items() if value is not None}
    resolve(method, options)
    return options


def avoid_cudnn_attention() -> None:
    """Let torch's own kernels compute attention in this process, not cuDNN's. Only a command does so: its process is its own.

    On Hopper GPUs cuDNN's gradients are NaN where batches are padded to 64, 192, 320, … tokens (torch 2.11 to 2.13,
    pytorch/pytorch issue 196678).
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def check_new(
    path: Path, option: str = "--output", *, force: bool | None = None, read: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Raise an error before slow work unless a new file can be written there.

    force: of a command that has --force, which replaces adapters only. read: the command's own inputs, which stay.
    """
    from ..files.patches import is_patch
    from ..files.suggestions import is_ours

    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: there is no folder {path.parent}; make it first")
    if path.exists() and not force:
        instead = "remove it" if force is None else "replace it with --force"
        raise DataError(f"{option}: {path} is there already, and would be lost; give another name, or {instead}")
    if path.exists() and not (path.is_file() and (is_ours(path) or is_patch(path))):
        raise DataError(
            f"{option}: {path} is there already and is no adapter's file, and --force replaces no others; give another name, "
            "or remove it"
        )
    if any(os.path.exists(each) and path.exists() and os.path.samefile(path, each) for each in read):
        raise DataError(f"{option}: {path} is read by this command; give another name")


def check_shares(**shares: float | None) -> None:
    """Raise MaskError for a percentage in place of a share. All else that is wrong is found by what takes them."""
    for name, value in shares.items():
        if value is not None and (more := as_share(value)):
            raise MaskError(f"{name} must be above 0 and at most 1, found {value!r}{more}")


def recipe_options(*names: str, of: Any = Recipe, **defaults: Any) -> Callable[[Any], Any]:
    """Add options of a recipe to a command that takes `**options`: those named here, or all. defaults: other defaults."""
    fields = fields_of(of)

    def add(command: Any) -> Any:
        parameters = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
        group = None
        for name, (about, kinds_of_value) in fields.items():
            group = about["group"] or group
            if name in (*names, *defaults) or not names:
                usual, panel = getattr(of(), name), None if names else group
                parameters.append(_parameter(name, about, kinds_of_value[0], usual, defaults.get(name), panel))
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return add


def given(options: dict[str, Any], of: Any = Recipe) -> dict[str, Any]:
    """The options that were given, parsed to the recipe's values. Raises typer.BadParameter if one cannot be parsed."""
    found, fields = {name: value for name, value in options.items() if value not in (None, [])}, fields_of(of)
    for name, value in found.items():
        about, _ = fields[name]
        try:
            found[name] = about["parse"](value) if about["parse"] else value
        except ValueError:
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"found {value!r}; expected: {about['help']}", param_hint=flag) from None
    return found


def _shown(name: str, usual: Any, parse: Any) -> str:
    """A default as it would be typed; "" if there is none."""
    if usual in (None, ""):
        return ""
    if isinstance(usual, bool):
        return str(usual).lower() if parse else f"{'' if usual else 'no-'}{name.replace('_', '-')}"
    return ",".join(usual) if isinstance(usual, list) else str(usual)


def _parameter(name: str, about: Any, kind: Any, usual: Any, default: Any, group: str | None) -> inspect.Parameter:
    """One option of a command. Without a default here it is None if it is not given, since a recipe file may set it."""
    choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else None
    shown: Any = True if default is not None else about["usual"] or _shown(name, usual, about["parse"]) or False
    take: Any = typer.Argument if name in ("model", "pipeline") else typer.Option
    option = take(help=about["help"], show_default=shown, rich_help_panel=group, metavar=choices)
    read: Any = str if about["parse"] or choices else kind
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[read | None, option])
