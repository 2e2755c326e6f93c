"""The `shira` command. Each subcommand is a few lines over the library. A failure prints one line and gives exit code 1."""

import sys
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
    push,
    sample,
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
COMMANDS = {
    "demo": demo.demo,
    "train": train.train,
    "train-image": train_image.train_image,
    "sample": sample.sample,
    "targets": targets.targets,
    "estimate": estimate.estimate,
    "masks": masks.masks,
    "generate": generate.generate,
    "chat": chat.chat,
    "eval": evaluate.evaluate,
    "inspect": inspect.inspect,
    "compare": compare.compare,
    "fuse": fuse.fuse,
    "extract": extract.extract,
    "merge": merge.merge,
    "convert": convert.convert,
    "push": push.push,
}
if checkout.has("benchmarks"):
    COMMANDS["bench"] = bench.bench
if checkout.has("experiments"):
    COMMANDS["experiment"] = experiment.experiment
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)


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
    try:
        app(prog_name="shira")
    except (ShiraError, OSError) as error:
        fail(error)
        sys.exit(1)
