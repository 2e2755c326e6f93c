"""The pictures of a comparison, drawn by matplotlib."""

import base64
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..sparse.tensor import SparseTensor
from ..texts import visible
from .comparison import BINS, Comparison
from .spectra import as_matrix, spectrum

__all__ = ["heat_maps", "histograms", "mask_pictures", "matrices", "png", "spectra_curves"]

CELLS = 160  # of a drawn mask, along its longer side
LONGEST, SHORT = 40, 16  # characters of a name in a picture; and of one along an edge
NARROW = 12  # modules that fit below one of two panels in a row; a UNet has more


def _drawn(name: str, most: int = LONGEST) -> str:
    """A name that matplotlib draws as it is: a dollar would begin a formula, and a legend leaves out what begins with _."""
    text = visible(name)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return " " * text.startswith("_") + text.replace("$", r"\$")


def png(pyplot: Any, figure: Any) -> str:
    """A figure as a PNG in base64; it is closed."""
    data = io.BytesIO()
    figure.savefig(data, dpi=150)
    pyplot.close(figure)
    return base64.b64encode(data.getvalue()).decode()


def _panels(pyplot: Any, count: int, height: float, most: int = 2, width: float = 5.4) -> tuple[Any, list[Any]]:
    """A figure that a phone can show: at most two panels a row, or three small ones, of given height each.

    A last row with fewer panels is centred.
    """
    across = min(most, count)
    rows = -(-count // across)
    figure = pyplot.figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2 * across)
    axes = []
    for number in range(count):
        row, place = divmod(number, across)
        start = 2 * place + across - min(across, count - row * across)
        axes.append(figure.add_subplot(grid[row, start : start + 2]))
    return figure, axes


def matrices(pyplot: Any, found: Comparison) -> Any:
    """Overlap, AWOR and cosine, adapters by adapters."""
    names = found.adapters
    fields: dict[str, Callable[[Any], float | None]] = {
        "overlap": lambda pair: pair.overlap,
        "AWOR": lambda pair: pair.awor,
        "cosine": lambda pair: pair.cosine,
    }
    short = [_drawn(name, 12) for name in names]
    few = len(names) <= 4
    figure, axes = _panels(pyplot, len(fields), 2.5 if few else 1.0 + 0.45 * len(names), 3 if few else 1)
    for axis, (title, field) in zip(axes, fields.items(), strict=True):
        cells = torch.full((len(names), len(names)), float("nan"), dtype=torch.float32, device="cpu")
        for one, other in itertools.permutations(range(len(names)), 2):
            value = field(found.total.pair(names[one], names[other]))
            if value is not None:
                cells[one, other] = value
        signed = title == "cosine"
        axis.imshow(cells.numpy(), cmap="RdBu_r" if signed else "viridis", vmin=-1 if signed else 0, vmax=1)
        for one, other in itertools.permutations(range(len(names)), 2):
            value = float(cells[one, other])
            dark = abs(value) > 0.6 if signed else value < 0.5
            axis.text(
                other,
                one,
                "–" if math.isnan(value) else f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
        axis.set_xticks(range(len(names)), short, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), short)
        axis.tick_params(labelleft=axis is axes[0] or not few)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    return figure


def heat_maps(pyplot: Any, found: Comparison) -> Any:
    """Each adapter's share of its ‖ΔW‖² by layer and module."""
    places = {name: _layer_and_module(name) for name in found.tensors}
    layers = sorted({layer for layer, _ in places.values()})
    modules = sorted({module for _, module in places.values()})
    across = 2 if len(modules) <= NARROW else 1
    figure, axes = _panels(pyplot, len(found.adapters), 1.6 + min(5.0, 0.13 * len(layers)), most=across)
    for axis, adapter in zip(axes, found.adapters, strict=True):
        cells = torch.zeros(len(layers), len(modules), dtype=torch.float32, device="cpu")
        for name, part in found.tensors.items():
            if adapter in part.changes:
                layer, module = places[name]
                cells[layers.index(layer), modules.index(module)] += part.changes[adapter].l2 ** 2
        image = axis.imshow((100 * cells / max(1e-300, float(cells.sum()))).numpy(), cmap="viridis", vmin=0, aspect="auto")
        bar = figure.colorbar(image, ax=axis, shrink=0.8)
        bar.ax.tick_params(labelsize=8)
        bar.ax.set_title("%", fontsize=8)
        every = -(-len(layers) // 16)
        axis.set_yticks(range(0, len(layers), every), ["–" if layer < 0 else str(layer) for layer in layers[::every]])
        axis.set_xticks(
            range(len(modules)), [_drawn(module, SHORT) for module in modules], rotation=60, ha="right", rotation_mode="anchor"
        )
        axis.set_title(_drawn(adapter, LONGEST // across), fontsize=10)
        axis.tick_params(labelsize=8)
    return figure


def _layer_and_module(name: str) -> tuple[int, str]:
    """'model.layers.3.mlp.up_proj.weight' -> (3, 'up_proj'); -1 for what is in no layer."""
    layer = re.search(r"\.(\d+)\.", name)
    return int(layer[1]) if layer else -1, name.removesuffix(".weight").rpartition(".")[2]


def mask_pictures(pyplot: Any, shape: tuple[int, ...], changes: Mapping[str, SparseTensor]) -> Any:
    """The share of positions held in each cell of one tensor: by each adapter, or by all if they hold the same; and by more
    than one."""
    drawn = {name: tensor.indices.long() for name, tensor in changes.items()}
    if all(torch.equal(indices, next(iter(drawn.values()))) for indices in drawn.values()):
        drawn = {", ".join(drawn): next(iter(drawn.values()))}
    else:
        where, count = torch.cat(list(drawn.values())).unique(return_counts=True)
        drawn["two or more" if len(drawn) > 2 else "both"] = where[count > 1]
    images = {name: _cells(shape, indices) for name, indices in drawn.items()}
    down, across = next(iter(images.values())).shape
    alone = len(images) == 1
    high = min(4.5, max(1.0, (4.4 if alone else 2.3) * down / across))
    whole = min(5.4, max(3.0, high * across / down + 1.2)) if alone else 5.4  # no wider than what is drawn
    figure, axes = _panels(pyplot, len(images), 0.5 + high, width=whole)
    most = max(float(image.max()) for image in images.values())
    for axis, (name, image) in zip(axes, images.items(), strict=True):
        shown = axis.imshow((100 * image).numpy(), cmap="magma_r", vmin=0, vmax=max(100 * most, 1e-9), interpolation="nearest")
        axis.set_title(f"{_drawn(name)}: {drawn[name].numel():,}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title("% held", fontsize=8)
    return figure


def _cells(shape: tuple[int, ...], indices: Tensor) -> Tensor:
    """The share of entries held in each cell of a picture of at most CELLS × CELLS; a vector is drawn as a row."""
    rows, columns = (shape[0], int(torch.Size(shape[1:]).numel())) if len(shape) > 1 else (1, int(torch.Size(shape).numel()))
    step = max(1, -(-max(rows, columns) // CELLS))
    down, across = max(1, -(-rows // step)), max(1, -(-columns // step))

    def count(row: Tensor, column: Tensor) -> Tensor:
        return torch.bincount(row // step * across + column // step, minlength=down * across).view(down, across)

    held = count(indices // max(1, columns), indices % max(1, columns))
    tall, wide = (torch.full((count,), step, device="cpu") for count in (down, across))
    tall[-1], wide[-1] = rows - step * (down - 1), columns - step * (across - 1)
    return held.float() / (tall[:, None] * wide).clamp_(min=1)


def histograms(pyplot: Any, found: Comparison) -> Any:
    """Each adapter's changes by magnitude, positive ones upwards, negative ones downwards."""
    figure, (axis,) = _panels(pyplot, 1, 3.0)
    counted = [counts for pair in found.histograms.values() for counts in pair]
    used = torch.tensor(counted, device="cpu").sum(0).nonzero().view(-1)
    first, last = (int(used[0]), int(used[-1]) + 1) if used.numel() else (0, len(BINS) - 1)
    for number, (name, (negative, positive)) in enumerate(found.histograms.items()):
        colour = f"C{number % 10}"
        axis.stairs(positive[first:last], BINS[first : last + 1], color=colour, label=_drawn(name))
        axis.stairs([-count for count in negative[first:last]], BINS[first : last + 1], color=colour)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("log₁₀ |ΔW|", fontsize=9)
    axis.set_ylabel("changes (down: negative)", fontsize=9)
    axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    _finish(axis)
    return figure


def spectra_curves(pyplot: Any, shape: tuple[int, ...], changes: Mapping[str, SparseTensor]) -> Any:
    """The singular values of each adapter's change of one tensor, and the rank of a LoRA with as many parameters (dotted)."""
    figure, (axis,) = _panels(pyplot, 1, 3.0)
    for number, (name, tensor) in enumerate(changes.items()):
        sparse = as_matrix(shape, tensor.indices, tensor.values)
        found = spectrum(sparse)
        above = found.values > 1e-9 * float(found.values[:1].sum())
        axis.plot(
            found.counts.cumsum(0)[above].numpy(),
            found.values[above].numpy(),
            color=f"C{number % 10}",
            label=_drawn(name),
            linewidth=1.2,
        )
        axis.axvline(tensor.nnz / max(1, sum(sparse.shape)), color=f"C{number % 10}", linestyle=":")
    if any(bool(tensor.values.any()) for tensor in changes.values()):
        axis.set_yscale("log")
    axis.set_xlabel("singular values, from the largest", fontsize=9)
    axis.set_ylabel("σ", fontsize=9)
    _finish(axis)
    return figure


def _finish(axis: Any) -> None:
    axis.legend(fontsize=8, frameon=False)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
