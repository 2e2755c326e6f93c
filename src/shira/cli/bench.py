"""shira bench: measure shira, PEFT and plain torch in one run. Only a checkout has this command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MissingExtra, ShiraError
from . import checkout
from .options import avoid_cudnn_attention

__all__ = ["bench"]


class What(StrEnum):
    """The benchmarks."""

    switch = "switch"
    scale = "scale"
    train = "train"
    files = "files"
    load = "load"
    fusion = "fusion"
    orthogonality = "orthogonality"
    distributed = "distributed"
    products = "products"
    diffusers = "diffusers"
    pipelines = "pipelines"
    unet = "unet"
    serve = "serve"
    mixed = "mixed"


ON_A_GPU = (What.switch, What.scale, What.train, What.products, What.mixed)


def bench(
    what: Annotated[
        What,
        typer.Argument(
            help="switch: one weight. scale: LLaMA2-7B's shape. train: a step, and memory. files: bytes. load: from a file. "
            "fusion: ten adapters. orthogonality: AWOR and AWOM by kind and size. distributed: what two processes send. "
            "products: ways to a gradient, on a GPU. diffusers: adapters of an image pipeline. "
            "pipelines: SD-1.5 and SDXL, from file to weights and back; five of many adapters. unet: training UNets. "
            "serve: a server of many adapters, its base and its peers. mixed: several adapters in one step, or in turns."
        ),
    ],
    plot: Annotated[Path | None, typer.Option(help="Where to save a plot (PNG).", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it runs; ignore the figures.")] = False,
    device: Annotated[
        str, typer.Option(help="cpu or cuda: switch, scale, train, products and mixed on a GPU (docs/gpu.md).")
    ] = "cpu",
) -> None:
    """Measure shira, PEFT and plain torch in turn. Prints one JSON line for each setup, then a table of medians.

    Example: shira bench switch --plot switch.png
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and what not in ON_A_GPU):
        raise typer.BadParameter(f"{what.value} cannot be measured on {device!r}", param_hint="--device")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ShiraError("--device cuda needs a GPU that torch can use; here it sees none (torch.cuda.is_available())")
    avoid_cudnn_attention()
    module = {What.scale: "switch", What.load: "files", What.products: "gpu", What.unet: "train_unet"}.get(what, what.value)
    module = "gpu" if device == "cuda" and what != What.mixed else module
    try:
        benchmark = checkout.module(f"benchmarks.{module}")
        if what == What.files:
            benchmark.sizes(plot, quick)
        elif what == What.load:
            benchmark.loading(plot, quick)
        elif what == What.mixed:
            benchmark.main(plot, quick, device)
        elif device == "cuda" or what == What.products:
            measure = {What.train: benchmark.train, What.products: benchmark.products_}.get(what, benchmark.switch)
            measure(plot, quick, device, **{"scale": True} if what == What.scale else {})
        elif what == What.scale:
            benchmark.main(plot, quick, scale=True)
        else:
            benchmark.main(plot, quick)
    except ModuleNotFoundError as error:
        raise MissingExtra(f"the benchmarks need {error.name}: pip install 'shira-adapters[bench]'") from error
