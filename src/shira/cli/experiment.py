"""shira experiment: run or resume the paper's experiments. Only a checkout has this command."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MissingExtra
from . import checkout
from .options import avoid_cudnn_attention
from .output import console, errors

__all__ = ["experiment"]


def experiment(
    name: Annotated[
        str, typer.Argument(help="A recipe of experiments/language/recipes, or a YAML file; none lists them.")
    ] = "",
    results: Annotated[
        Path | None, typer.Option(help="JSON lines to add to.", show_default="experiments/language/results/NAME.jsonl")
    ] = None,
    only_report: Annotated[bool, typer.Option("--report", help="Run nothing; make the tables of what is there.")] = False,
    again: Annotated[
        str | None, typer.Option(help="Forget the run of this number first, so that it is made again.", show_default=False)
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the plots (PNG).", show_default=False)] = None,
) -> None:
    """Make the runs that the results lack, one line each; then print the tables. Several processes may share the work.

    Example: shira experiment table2 --plots plots
    """
    try:
        language = checkout.module("experiments.language.main")
    except ModuleNotFoundError as error:
        raise MissingExtra(f"the experiments need {error.name}: pip install 'shira-adapters[bench,eval]'") from error
    if not name:
        for recipe, about in language.recipes().items():
            console.print(f"{recipe:<20} {about}", highlight=False)
        return
    avoid_cudnn_attention()
    results = results or checkout.CHECKOUT / "experiments" / "language" / "results" / f"{Path(name).stem}.jsonl"

    def on_run(label: str, left: int) -> None:
        errors.print(f"{label}, {left} left", markup=False, highlight=False)

    failed = []

    def on_failure(label: str, what: str) -> None:
        failed.append(label)
        errors.print(f"{label} FAILED: {what}", markup=False, highlight=False)

    text = language.main(name, results, run=not only_report, again=again, plots=plots, on_run=on_run, on_failure=on_failure)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if failed:
        errors.print(f"{len(failed)} runs failed, and are tried again the next time", markup=False, highlight=False)
        raise typer.Exit(1)
