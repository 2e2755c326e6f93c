"""The `shira` command. Each subcommand is a few lines over the library. A failure prints one line and gives exit code 1."""

import io
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from ..errors import ShiraError
from ..version import __version__
from . import (
    bench,
    chat,
    checkout,
    compare,
    convert,
    demo,
    estimate,
    evaluate,
    experiment,
    extract,
    fuse,
    generate,
    inspect,
    masks,
    merge,
    play,
    push,
    sample,
    serve,
    targets,
    train,
    train_image,
)
from .output import fail
from .wording import Command

__all__ = ["app", "main"]

app = typer.Typer(
    name="shira",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
PANELS: dict[str, dict[str, Callable[..., None]]] = {  # of `shira --help`
    "See it": {"demo": demo.demo},
    "Train": {
        "train": train.train,
        "targets": targets.targets,
        "masks": masks.masks,
        "estimate": estimate.estimate,
    },
    "Try": {"play": play.play, "generate": generate.generate, "chat": chat.chat, "eval": evaluate.evaluate},
    "Adapters": {
        "inspect": inspect.inspect,
        "compare": compare.compare,
        "fuse": fuse.fuse,
        "convert": convert.convert,
        "extract": extract.extract,
        "merge": merge.merge,
        "push": push.push,
    },
    "Serve": {"serve": serve.serve},
    "Pictures": {"train-image": train_image.train_image, "sample": sample.sample},
    "Figures": {},
}
if checkout.has("benchmarks"):
    PANELS["Figures"]["bench"] = bench.bench
if checkout.has("experiments"):
    PANELS["Figures"]["experiment"] = experiment.experiment
COMMANDS = {name: command for panel in PANELS.values() for name, command in panel.items()}
for panel, commands in PANELS.items():
    for name, command in commands.items():
        app.command(name, cls=Command, rich_help_panel=panel)(command)


def show_version(wanted: bool) -> None:
    """Print the version and stop, if it was asked for."""
    if wanted:
        print(f"shira {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Sparse High Rank Adapters: train 1-2 % of a model's own weights, switch in milliseconds."""


def main() -> None:
    """Run the command line. The exit code is 0 for success, 1 if the command failed, and 2 if its arguments are wrong."""
    warnings.filterwarnings("default", ".* gone in shira ", DeprecationWarning)  # Python shows them to programmers alone
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale may lack letters of a name, or of our tables
    try:
        app(prog_name="shira")
    except (ShiraError, OSError) as error:
        fail(error)
        sys.exit(1)
