"""A decoding step of a mixed batch, whose rows have different adapters, beside turns: a step for each adapter's rows.

A mixed step computes the base's product of all rows, and adds to each row the sparse product with its own adapter's change:
y = W x + ΔW x. Turns write one adapter after another in place, and each computes its own rows. The layers are those that the
paper adapts, without what lies between them.

`shira serve --mix` does so. A mixed step rounds otherwise: to bfloat16 after W x, and once more after the sum.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shira
from shira import kernels
from shira.kernels import RowChange

from .common import alternate, busy_clock, print_row, show
from .switch import DENSITY, LLAMA2_7B, adapter_for, model_of

SMOLLM2 = ([(576, 576)] + [(192, 576)] * 2 + [(1536, 576), (576, 1536)]) * 30


def adder(changes: list[RowChange], rows: int, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """What adds the sparse products of one layer to its output: by one launch of Triton on a GPU, else by the library.

    changes: of each adapter. rows: of each adapter.
    """
    if device.type == "cuda":
        from . import mixed_kernel

        table = mixed_kernel.table_of([(each.starts, each.columns, each.changes) for each in changes], rows, device)

        def add(output: Tensor, inputs: Tensor, kept: Any = changes) -> None:  # kept: the table holds addresses only
            mixed_kernel.add(output, inputs, table, rows)

        return add
    groups = [(number * rows, (number + 1) * rows, change) for number, change in enumerate(changes)]
    return lambda output, inputs: kernels.add_products_(output, inputs, groups)


def measure(
    shapes: list[tuple[int, int]], dtype: torch.dtype, count: int, rows: int, repeats: int, device: str
) -> dict[str, float]:
    """Milliseconds of one token for each of count · rows requests: mixed, and in turns; and of the switches of one round."""
    model = model_of(shapes, dtype).to(device)
    weights = dict(model.named_parameters())
    adapters = [adapter_for({name: w.detach().cpu() for name, w in weights.items()}, seed) for seed in range(count)]
    switcher = shira.Switcher(model, ready=count)
    for number, adapter in enumerate(adapters):
        switcher.add(str(number), adapter)
    batch = {width: torch.randn(count * rows, width, dtype=dtype, device=device) for _, width in shapes}
    changes = [switcher.changes(str(number)) for number in range(count)]
    added = {}
    for name, weight in weights.items():
        made = [kernels.row_change(each[name].indices, each[name].values, tuple(weight.shape)) for each in changes]
        added[name] = adder(made, rows, weight.device)

    def step(first: int, last: int) -> None:
        for weight in weights.values():
            nn.functional.linear(batch[weight.shape[1]][first:last], weight)

    def mixed() -> None:
        for name, weight in weights.items():
            inputs = batch[weight.shape[1]]
            added[name](nn.functional.linear(inputs, weight), inputs)

    def turns() -> None:
        for number in range(count):
            step(number * rows, (number + 1) * rows)

    def switches() -> None:
        for number in range(count):
            switcher.use(str(number))

    runs = {
        "turns": turns,
        "mixed": mixed,
        "the base, one batch": functools.partial(step, 0, count * rows),
        "switches": switches,
    }
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = {} if device == "cuda" else {"clock": busy_clock()}
    with torch.no_grad():
        for number in range(count):
            switcher.use(str(number))  # so that all are ready
        switcher.use(None)
        seconds = alternate(runs, repeats, wait=wait, between=lambda _: switcher.use(None), **clock)
    return {name: 1e3 * value for name, value in seconds.items()}


def main(plot: Path | None, quick: bool, device: str = "cpu") -> list[dict[str, Any]]:
    """SmolLM2-135M's target layers on the CPU, a quarter of LLaMA2-7B's on a GPU, in bfloat16."""
    shapes, what = (LLAMA2_7B[:40], "8 layers of LLaMA2-7B") if device == "cuda" else (SMOLLM2, "SmolLM2-135M")
    if quick:
        shapes, what = [(96, 70), (70, 96)], "two small layers"
    rows = []
    for count, own in ((2, 3),) if quick else ((2, 1), (2, 4), (2, 16), (8, 1), (8, 4), (8, 16), (16, 1), (16, 4)):
        ms = measure(shapes, torch.bfloat16, count, own, 1 if quick else 9, device)
        rows.append(print_row("mixed", setup=f"{what}: {count} adapters, {own} rows each", density=DENSITY, ms=ms))
    show("one token for each row", rows, lambda row: str(row["setup"]), plot)
    return rows
