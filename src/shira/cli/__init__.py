"""The `shira` command. Each subcommand is a few lines over the library. A failure prints one line and gives exit code 1."""

import sys

import typer

from ..errors import ShiraError
from . import (
    bench,
    checkout,
    compare,
    convert,
    demo,
    estimate,
    evaluate,
    experiment,
    extract,
    fuse,
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

__all__ = ["app", "main"]

app = typer.Typer(
    name="shira",
    help="Sparse High Rank Adapters: train 1-2 % of a model's own weights, switch in milliseconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("train-image")(train_image.train_image)
app.command("sample")(sample.sample)
app.command("targets")(targets.targets)
app.command("estimate")(estimate.estimate)
app.command("masks")(masks.masks)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("compare")(compare.compare)
app.command("fuse")(fuse.fuse)
app.command("extract")(extract.extract)
app.command("merge")(merge.merge)
app.command("convert")(convert.convert)
app.command("push")(push.push)
if checkout.has("benchmarks"):
    app.command("bench")(bench.bench)
if checkout.has("experiments"):
    app.command("experiment")(experiment.experiment)


def main() -> None:
    """Run the command line. The exit code is 0 for success, 1 if the command failed, and 2 if its arguments are wrong."""
    try:
        app(prog_name="shira")
    except (ShiraError, OSError) as error:
        fail(error)
        sys.exit(1)
