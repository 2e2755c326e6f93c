"""A comparison as one HTML page with its pictures inside: no script, no other file, nothing fetched."""

import base64
import html
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import linalg
from .adapter import Adapter, SparseTensor
from .analysis import BINS, Comparison, deltas
from .checkpoints import Source
from .errors import AdapterError, MissingExtra, did_you_mean
from .texts import visible

__all__ = ["check_tensor", "needs_matplotlib", "page", "tables"]

CELLS = 160  # of a drawn mask, along its longer side
LONGEST, SHORT = 40, 16  # signs of a name in a picture; and where it stands along an edge
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:0 auto;padding:1rem;color:#222}
h1,h2{overflow-wrap:anywhere}h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .3rem}
img{max-width:100%;height:auto;display:block;margin:.5rem auto}
table{border-collapse:collapse;font-size:.85rem}th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}div.wide{overflow-x:auto}p.note{color:#555;font-size:.9rem}
th{white-space:nowrap}summary{cursor:pointer;margin-top:2rem}"""


def needs_matplotlib() -> Any:
    """pyplot, drawing into memory. Raises MissingExtra."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra(f"a report needs matplotlib: pip install 'shira-adapters[report]' ({error})") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def check_tensor(adapters: Mapping[str, Adapter], tensor: str) -> None:
    """Raise AdapterError unless some adapter holds this tensor."""
    known = {name for adapter in adapters.values() for name in adapter.tensors}
    if tensor not in known:
        raise AdapterError(f"no adapter holds a tensor {tensor!r}; {did_you_mean(tensor, sorted(known))}")


def page(found: Comparison, adapters: Mapping[str, Adapter], base: Source | None, tensor: str | None = None) -> str:
    """The whole page.

    found: of these adapters. tensor: the one whose mask and spectrum are drawn; the one that changes most, if none is named.
    Raises AdapterError if no adapter holds it; MissingExtra without matplotlib.
    """
    pyplot = needs_matplotlib()
    if tensor is None:
        tensor = max(found.tensors, key=lambda name: sum(c.l2**2 for c in found.tensors[name].changes.values()))
    check_tensor(adapters, tensor)
    _, shape, changes = next(deltas(adapters, base, tensor))
    called = _escaped(tensor)
    broken = called.replace(".", ".<wbr>")
    about, *pairs = tables(found, adapters)
    pieces = [
        f"<h1>{_escaped(' · '.join(found.adapters))}</h1>",
        _table(*about[1:]),
        '<p class="note">Effective rank: of ΔW, the mean over its tensors. LoRA\'s rank: of a LoRA with as many parameters. '
        "LoRA holds: the most of ‖ΔW‖² that a change of that rank can.</p>",
    ]
    for title, head, rows in pairs:
        pieces += [
            f"<h2>{title}</h2>",
            _table(head, rows),
            '<p class="note">AWOM: ‖A₁ᵀA₂‖; relative: over ‖A₁‖·‖A₂‖. AWOR: the share of zeros in A₁ᵀA₂. Conflicts: positions '
            "that both change, with different signs, and their share of all |ΔW|.</p>",
            _picture(pyplot, _matrices(pyplot, found), "Overlap, AWOR and cosine of each two adapters"),
        ]
    pieces += [
        "<h2>Where the change lies</h2>",
        _picture(
            pyplot, _heat_maps(pyplot, found), "Heat map of each adapter's share of its squared change by layer and module"
        ),
        '<p class="note">Share of ‖ΔW‖² by layer (down) and module (across).</p>',
        f"<h2>One mask: {broken}</h2>",
        _picture(pyplot, _masks(pyplot, shape, changes), f"Positions that each adapter holds in {called}"),
        f'<p class="note">{" × ".join(map(str, shape))} entries; a pixel is the share held among those it stands for.</p>',
        "<h2>How large the changes are</h2>",
        _picture(pyplot, _histograms(pyplot, found), "Histogram of the changes by magnitude, in all tensors"),
        '<p class="note">In all tensors; positive changes upwards, negative ones downwards. Steps show the precision of the '
        "values: in bfloat16 a weight can change by few sizes only.</p>",
        f"<h2>Singular values: {broken}</h2>",
        _picture(pyplot, _spectra(pyplot, shape, changes), f"Singular values of each change of {called}, with LoRA's rank"),
        '<p class="note">Dotted: the rank of a LoRA with as many parameters, beyond which its change has nothing.</p>',
        "<details><summary>Every tensor</summary>",
        _table(["tensor", "adapter", "entries", "‖ΔW‖", "effective rank", "LoRA's rank", "smallest AWOR"], _tensor_rows(found)),
        "</details>",
    ]
    title = _escaped(" and ".join(found.adapters))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} compared</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        + "\n".join(pieces)
        + "\n</body></html>\n"
    )


ADAPTER_HEAD = ["adapter", "mask", "entries", "density", "‖ΔW‖", "effective rank", "LoRA's rank", "LoRA holds"]
PAIR_HEAD = ["pair", "overlap", "Jaccard", "AWOR", "AWOM", "relative", "cosine", "distance", "conflicts", "their share"]


Table = tuple[str, list[str], list[list[str]]]


def tables(found: Comparison, adapters: Mapping[str, Adapter]) -> list[Table]:
    """Title, head and rows: of the adapters, and of each two, if there are two."""
    about = []
    for name, change in found.total.changes.items():
        mask = (adapters[name].metadata.get("mask") or {}).get("name", "–")
        density = f"{adapters[name].density:.2%}"
        ranks = [_number(change.effective_rank), _number(change.lora_rank), _share(change.lora_energy)]
        about.append([name, str(mask), f"{change.entries:,}", density, _number(change.l2), *ranks])
    pairs = []
    for pair in found.total.pairs:
        shares = [_share(pair.overlap), _share(pair.jaccard), _share(pair.awor)]
        norms = [_number(pair.awom), _number(pair.awom_relative), _number(pair.cosine), _number(pair.distance)]
        pairs.append([f"{pair.first}, {pair.second}", *shares, *norms, f"{pair.conflicts:,}", _share(pair.conflict_mass)])
    listed: list[Table] = [("What they change", ADAPTER_HEAD, about), ("Where they meet", PAIR_HEAD, pairs)]
    return [table for table in listed if table[2]]


def _tensor_rows(found: Comparison) -> Iterable[list[str]]:
    for name, part in found.tensors.items():
        for adapter, change in part.changes.items():
            met = [pair.awor for pair in part.pairs if adapter in (pair.first, pair.second)]
            ranks = [_number(change.effective_rank), _number(change.lora_rank)]
            yield [name, adapter, f"{change.entries:,}", _number(change.l2), *ranks, _share(min(met, default=None))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _drawn(name: str, most: int = LONGEST) -> str:
    """A name as matplotlib draws it as text: a dollar would begin a formula, and a legend leaves out what begins with _."""
    text = visible(name)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return " " * text.startswith("_") + text.replace("$", r"\$")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{_escaped(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _picture(pyplot: Any, figure: Any, alt: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, dpi=150)
    pyplot.close(figure)
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _panels(pyplot: Any, count: int, height: float, most: int = 2) -> tuple[Any, list[Any]]:
    """A figure that a phone can show: at most two panels a row, or three small ones, of given height each."""
    across = min(most, count)
    rows = -(-count // across)
    figure, axes = pyplot.subplots(rows, across, figsize=(5.4, height * rows), layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.set_axis_off()
    return figure, flat[:count]


def _matrices(pyplot: Any, found: Comparison) -> Any:
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
        cells = torch.full((len(names), len(names)), float("nan"))
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


def _heat_maps(pyplot: Any, found: Comparison) -> Any:
    """Each adapter's share of its ‖ΔW‖² by layer and module."""
    places = {name: _layer_and_module(name) for name in found.tensors}
    layers = sorted({layer for layer, _ in places.values()})
    modules = sorted({module for _, module in places.values()})
    figure, axes = _panels(pyplot, len(found.adapters), 1.6 + min(5.0, 0.13 * len(layers)))
    for axis, adapter in zip(axes, found.adapters, strict=True):
        cells = torch.zeros(len(layers), len(modules))
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
        axis.set_title(_drawn(adapter), fontsize=10)
        axis.tick_params(labelsize=8)
    return figure


def _layer_and_module(name: str) -> tuple[int, str]:
    """'model.layers.3.mlp.up_proj.weight' -> (3, 'up_proj'); -1 for what is in no layer."""
    layer = re.search(r"\.(\d+)\.", name)
    return int(layer[1]) if layer else -1, name.removesuffix(".weight").rpartition(".")[2]


def _masks(pyplot: Any, shape: tuple[int, ...], changes: Mapping[str, SparseTensor]) -> Any:
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
    width = 4.4 if len(images) == 1 else 2.3
    figure, axes = _panels(pyplot, len(images), 0.5 + min(4.5, max(1.0, width * down / across)))
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
    tall = torch.full((down,), step).scatter_(0, torch.tensor([down - 1]), rows - step * (down - 1))
    wide = torch.full((across,), step).scatter_(0, torch.tensor([across - 1]), columns - step * (across - 1))
    return held / (tall[:, None] * wide).clamp_(min=1)


def _histograms(pyplot: Any, found: Comparison) -> Any:
    figure, (axis,) = _panels(pyplot, 1, 3.0)
    used = torch.tensor([counts for pair in found.histograms.values() for counts in pair]).sum(0).nonzero().view(-1)
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


def _spectra(pyplot: Any, shape: tuple[int, ...], changes: Mapping[str, SparseTensor]) -> Any:
    figure, (axis,) = _panels(pyplot, 1, 3.0)
    for number, (name, tensor) in enumerate(changes.items()):
        sparse = linalg.matrix(shape, tensor.indices, tensor.values)
        found = linalg.spectrum(sparse)
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
