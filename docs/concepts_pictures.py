"""Draw the pictures of concepts.md: `python docs/concepts_pictures.py`. Weights and adapters are small, and made by shira."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import shira

HERE = Path(__file__).parent / "pictures"
SIDE = 24
COUNT = 2 * SIDE  # the numbers of a LoRA of rank 1, and as many entries of a mask
BLUE, ORANGE, GREEN, GREY = (0.12, 0.37, 0.72), (0.90, 0.45, 0.05), (0.10, 0.60, 0.35), (0.87, 0.87, 0.87)
NAMES = {"a": BLUE, "b": ORANGE}


def low_rank(seed: int) -> Tensor:
    """The change of a LoRA of rank 1."""
    torch.manual_seed(seed)
    return torch.outer(torch.randn(SIDE), torch.randn(SIDE))


def sparse(seed: int) -> Tensor:
    """The change of an adapter at random positions."""
    torch.manual_seed(seed)
    change = torch.zeros(SIDE, SIDE)
    change.view(-1)[shira.masks.select("rand", "w", change, COUNT, seed=seed)] = torch.randn(COUNT)
    return change


def grid(axis: Axes, colours: np.ndarray, title: str) -> None:
    axis.imshow(colours)
    axis.set_xticks(np.arange(-0.5, SIDE), minor=True)
    axis.set_yticks(np.arange(-0.5, SIDE), minor=True)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=10)


def changed(*changes: Tensor) -> np.ndarray:
    """Grey where nothing changes; blue and orange where one of two changes does; green where both do."""
    first, second = changes[0] != 0, changes[-1] != 0 if len(changes) > 1 else torch.zeros(SIDE, SIDE, dtype=torch.bool)
    picture = np.tile(np.array(GREY), (SIDE, SIDE, 1))
    for where, colour in ((first & ~second, BLUE), (second & ~first, ORANGE), (first & second, GREEN)):
        picture[where.numpy()] = colour
    return picture


def mask(path: Path) -> None:
    """Which entries a LoRA and a mask change, and the rank of the change."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.9), layout="constrained")
    for axis, name, change in zip(
        axes, (f"LoRA of {COUNT} numbers", f"mask of {COUNT} entries"), (low_rank(1), sparse(1)), strict=True
    ):
        count, rank = int((change != 0).sum()), int(torch.linalg.matrix_rank(change))
        size = (change.abs() / change.abs().max()).sqrt().numpy()[..., None]
        grid(
            axis,
            size * np.array(BLUE) + (1 - size) * np.array(GREY),
            f"{name}: {count} of {SIDE * SIDE} entries change,\nthe rank of the change is {rank}",
        )
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def adding(path: Path) -> None:
    """Where two changes meet: of LoRAs everywhere, of sparse adapters hardly anywhere."""
    figure, axes = plt.subplots(2, 3, figsize=(8, 5.8), layout="constrained")
    for row, (kind, make) in zip(axes, (("LoRA", low_rank), ("sparse", sparse)), strict=True):
        a, b = make(1), make(2)
        meet = int(((a != 0) & (b != 0)).sum())
        for axis, name, change in zip(row, "ab", (a, b), strict=False):
            picture = changed(change)
            picture[(change != 0).numpy()] = NAMES[name]
            grid(axis, picture, f"{kind} {name}: {int((change != 0).sum())} entries")
        grid(row[2], changed(a, b), f"{kind} a + b: {meet} {'entry' if meet == 1 else 'entries'} of both")
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def switch(path: Path) -> None:
    """Twelve entries of a weight, and what the switcher keeps, after each call."""
    layer = nn.Linear(12, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 13.0))
    held = {}
    switcher = shira.Switcher(layer)
    for name, positions, values in (("a", [1, 4, 9], [50.0, 51.0, 52.0]), ("b", [4, 7], [70.0, 71.0])):
        held[name] = positions
        tensor = shira.SparseTensor((1, 12), torch.tensor(positions), torch.tensor(values))
        switcher.add(name, shira.Adapter({"weight": tensor}))
    calls = [("the base", None), ('use("a")', "a"), ('use("b")', "b"), ("use(None)", None)]
    figure, axis = plt.subplots(figsize=(8, 3.7), layout="constrained")
    for row, (call, active) in enumerate(calls):
        switcher.use(active)
        y = -1.75 * row
        axis.text(-0.8, y, call, ha="right", va="center", fontsize=11, family="monospace" if row else None)
        for entry, value in enumerate(layer.weight.detach()[0].tolist()):
            written = active is not None and entry in held[active]
            box(axis, entry, y, NAMES[active] if active and written else GREY, f"{value:g}", 0.88)
        if active is not None:
            kept = switcher.base_values("weight", torch.tensor(held[active])).tolist()
            axis.text(-0.8, y - 0.78, "kept", ha="right", va="center", fontsize=9, color="0.4")
            for entry, value in zip(held[active], kept, strict=True):
                box(axis, entry, y - 0.78, (1, 1, 1), f"{value:g}", 0.5)
    axis.set(xlim=(-3.2, 12), ylim=(-5.8, 0.6), aspect="equal")
    axis.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


def box(axis: Axes, x: float, y: float, colour: tuple[float, float, float], words: str, size: float) -> None:
    side = dict(linewidth=0.8, edgecolor="0.5", facecolor=colour)
    axis.add_patch(plt.Rectangle((x - size / 2, y - size / 2), size, size, **side))
    dark = sum(colour) < 1.9
    axis.text(x, y, words, ha="center", va="center", fontsize=10 if size > 0.6 else 8, color="white" if dark else "black")


if __name__ == "__main__":
    mask(HERE / "concepts-mask.png")
    switch(HERE / "concepts-switch.png")
    adding(HERE / "concepts-adding.png")
