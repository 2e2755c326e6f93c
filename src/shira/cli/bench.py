"""shira bench: ours beside the peers, in one run; from a checkout, where the benchmarks are."""

import importlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import MissingExtra

__all__ = ["bench"]


class What(StrEnum):
    """What can be measured."""

    switch = "switch"
    scale = "scale"
    train = "train"
    files = "files"
    load = "load"
    fusion = "fusion"
    orthogonality = "orthogonality"
    distributed = "distributed"


def bench(
    what: Annotated[
        What,
        typer.Argument(
            help="switch: one weight. scale: LLaMA2-7B's shape. train: a step, and memory. files: bytes. load: from a file. "
            "fusion: ten adapters. orthogonality: AWOR and AWOM by kind and size. distributed: what two processes send."
        ),
    ],
    plot: Annotated[Path | None, typer.Option(help="Where to save a plot (PNG).", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it runs; ignore the figures.")] = False,
) -> None:
    """Measure shira beside PEFT and plain torch: alternating, medians, one JSON line a setup, a table at the end.

    Example: shira bench switch --plot switch.png
    """
    root = Path(__file__).parents[3]
    if not (root / "benchmarks").is_dir():
        raise MissingExtra("the benchmarks are not part of the installed package; run this in a checkout of the source")
    sys.path.insert(0, str(root))
    module = {What.scale: "switch", What.load: "files"}.get(what, what.value)
    try:
        benchmark: Any = importlib.import_module(f"benchmarks.{module}")
        if what == What.files:
            benchmark.sizes(plot, quick)
        elif what == What.load:
            benchmark.loading(plot, quick)
        elif what == What.scale:
            benchmark.main(plot, quick, scale=True)
        else:
            benchmark.main(plot, quick)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"the benchmarks need {error.name}: pip install 'shira-adapters[bench]'") from error
