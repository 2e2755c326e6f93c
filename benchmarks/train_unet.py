"""Training UNets: shira, PEFT's LoRA with and without dropout, and the frozen model as the lower bound."""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from experiments.image.parts import unet as emoji_unet
from torch import nn

from shira import kernels

from .common import alternate, busy_clock, print_row, show
from .train import NO_DROPOUT, prepare, steps_in_turn
from .unets import ATTENTION, CONVOLUTIONS, SD15, SMALL, inputs

SPARSER = "shira wm 1 %"
METHODS = ["frozen", SPARSER, "shira wm", "PEFT LoRA", NO_DROPOUT]
BOTH = [*ATTENTION, *CONVOLUTIONS]


def build(size: str) -> tuple[nn.Module, dict[str, Any]]:
    """A UNet in random values and float32, and a batch of its inputs."""
    torch.manual_seed(0)
    if size == "emoji":  # docs/images.md: latents of 8 x 8, 12 tokens, 24 pictures in a batch
        model = emoji_unet()
        return model, inputs(model, 8, batch=24, tokens=12)
    widths = {"half of SD-1.5": (160, 320, 640, 640), "tiny": SMALL["block_out_channels"]}[size]
    model = diffusers.UNet2DConditionModel(**SD15 | {"block_out_channels": widths})
    return model, inputs(model, 32 if size != "tiny" else 8)


def unet_step(
    method: str, size: str, rank: int, targets: list[str], *, autocast: bool = False
) -> tuple[Callable[[], None], int]:
    """A function that takes one optimizer step of a UNet, and the number of parameters that train. rank: of the LoRA."""
    model, given = build(size)
    sparser = {"density": 0.01} if method == SPARSER else {}  # the paper's; else as many as a LoRA of this rank has
    _, trained = prepare("shira wm" if sparser else method, model, targets, rank=rank, **sparser)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    wanted = torch.randn(given["sample"].shape, generator=torch.Generator().manual_seed(1))
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def step() -> None:
        with context:
            loss = nn.functional.mse_loss(model(**given).sample.float(), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """The emoji model, under autocast, too; and SD-1.5's layout at half its widths. Attention, then convolutions as well."""
    setups: list[tuple[str, list[str], bool, int]] = [
        ("emoji", ATTENTION, False, 4),
        ("emoji", BOTH, False, 4),
        ("emoji", BOTH, True, 4),
        ("half of SD-1.5", ATTENTION, False, 16),
        ("half of SD-1.5", BOTH, False, 4),  # the rank of Diffusers' scripts, if none is given
        ("half of SD-1.5", BOTH, False, 16),
    ]
    rows = []
    for size, targets, autocast, rank in [("tiny", BOTH, False, 2)] if quick else setups:
        methods, rounds = (METHODS[2:], 1) if quick else (METHODS, 5)
        figures = steps_in_turn(unet_step, methods, rounds, size, rank, targets, autocast=autocast)
        what = "attention and convolutions" if targets == BOTH else "attention"
        dtype = "bfloat16 autocast" if autocast else "float32"
        rows.append(print_row("unet", setup=f"{size}, {what}, {dtype}, rank {rank}", **figures))
    title = "a training step"
    if torch.get_num_threads() == 1:  # as in `common.busy_clock`
        rows, title = [row | {"ms": row["cpu_ms"]} for row in rows], f"{title}, processor time"
    show(title, rows, lambda row: str(row["setup"]), plot)
    return rows


def profile(method: str, size: str, rank: str, *targets: str) -> None:
    """Print where the time of a step goes: python -m benchmarks.train_unet "shira wm" emoji 4 conv1 conv2"""
    step, _ = unet_step(method, size, int(rank), list(targets))
    for _ in range(3):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))


def weight_gradients(repeats: int = 3) -> None:
    """Print how long a 3 x 3 convolution's gradients take: the input's, the weight's whole one, and a sampled one."""
    for images, side, width, rank in (
        *((24, 96, 8, 4), (24, 192, 4, 4), (1, 160, 32, 16), (1, 320, 16, 16), (1, 640, 8, 16)),
        *((1, 320, 32, 16), (1, 640, 16, 16), (1, 640, 32, 16), (1, 1280, 8, 16), (1, 1280, 16, 16)),
    ):
        layer = nn.Conv2d(side, side, 3, padding=1).requires_grad_(False)
        input, gradient = torch.randn(2, images, side, width, width)
        positions = torch.randperm(layer.weight.numel())[: rank * 10 * side].sort().values.int()
        operator = functools.partial(torch.ops.aten.convolution_backward, gradient, input, layer.weight, None)
        settings = (layer.stride, layer.padding, layer.dilation, False, (0, 0), 1)
        sliding = kernels.Sliding(layer.kernel_size, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]
        runs = {
            "input's gradient": functools.partial(operator, *settings, (True, False, False)),
            "whole": functools.partial(operator, *settings, (False, True, False)),
            "sampled": functools.partial(kernels.sampled_images, gradient, input, positions, sliding),
        }
        ms = {name: 1e3 * value for name, value in alternate(runs, repeats, clock=busy_clock()).items()}
        density = positions.numel() / layer.weight.numel()
        print_row("weight gradients", setup=f"{images} x {side} x {width}²", density=density, ms=ms)


if __name__ == "__main__":
    profile(*sys.argv[1:]) if sys.argv[1:] else weight_gradients()
