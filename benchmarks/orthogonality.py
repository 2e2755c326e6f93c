"""The orthogonality of adapters by kind and size (SHiRA §4.2, arXiv 2406.13175): Figures 4 and 9, on random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiments.palette import look
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shira import masks
from shira.analysis import spectra as linalg

from .common import print_row

DENSITY = 0.01
FACTOR_RANK = 64  # rank of sparse LoRA's factors, which together have 1 % as many entries as the weight
SIZES = (128, 256, 512, 1024, 2048, 4096)
PAIRS = 25  # from 50 adapters, each in one pair
STATED = "stated in the paper (Figure 4), at 4096²: dense and sparse LoRA near 0, WM much higher, Struct nearly 1"

Pair = tuple[Tensor, Tensor]


def dense(side: int, generator: torch.Generator) -> Pair:
    """Adapters that change every entry."""
    return torch.randn(side, side, generator=generator), torch.randn(side, side, generator=generator)


def lora(side: int, generator: torch.Generator) -> Pair:
    """Products of factors with as many parameters as a 1 % mask (at least rank 1), scaled so that entries have variance 1."""
    rank = max(1, round(DENSITY * side / 2))
    one, other = (
        torch.randn(side, rank, generator=generator) @ torch.randn(rank, side, generator=generator) / rank**0.5
        for _ in range(2)
    )
    return one, other


def sparse_lora(side: int, generator: torch.Generator) -> Pair:
    """Products of sparse factors of rank 64, scaled so that entries have variance 1.

    The two factors together have 1 % as many entries as the weight.
    """
    share = DENSITY * side / (2 * FACTOR_RANK)

    def factor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < share)

    scale = share * FACTOR_RANK**0.5
    one, other = (factor(side, FACTOR_RANK) @ factor(FACTOR_RANK, side) / scale for _ in range(2))
    return one, other


def wm(side: int, generator: torch.Generator) -> Pair:
    """Both adapters at the top 1 % of one random weight (WM-overlap)."""
    where = masks.wm(torch.randn(side, side, generator=generator), round(DENSITY * side * side))
    return sparse(side, where, generator), sparse(side, where, generator)


def wm_apart(side: int, generator: torch.Generator) -> Pair:
    """One adapter at the top 1 % of one random weight, the other at the next 1 % (WM-non-overlap)."""
    weight, k = torch.randn(side, side, generator=generator), round(DENSITY * side * side)
    first, both = masks.wm(weight, k), masks.wm(weight, 2 * k)
    return sparse(side, first, generator), sparse(side, both[~torch.isin(both, first)], generator)


def rand(side: int, generator: torch.Generator) -> Pair:
    """Each adapter at its own 1 % of random positions."""
    seeds = torch.randint(2**62, (2,), generator=generator).tolist()
    one, other = (sparse(side, masks.draw(side * side, round(DENSITY * side * side), seed), generator) for seed in seeds)
    return one, other


def struct(side: int, generator: torch.Generator) -> Pair:
    """Rows at equal distances, from a different offset for each adapter, and the diagonal.

    Each adapter has at least one row, even if 1 % of the entries are too few for a row and the diagonal.
    """
    rows = max(1, (round(DENSITY * side * side) - side) // (side - 1))
    apart = -(-side // rows)
    weight, k = torch.empty(side, side), rows * (side - 1) + side
    one, other = (
        sparse(side, masks.struct(weight, k, frequency=apart, offset=offset), generator)
        for offset in torch.randperm(apart, generator=generator)[:2].tolist()
    )
    return one, other


def sparse(side: int, where: Tensor, generator: torch.Generator) -> Tensor:
    """A sparse matrix with normally distributed values at these positions."""
    return linalg.as_matrix((side, side), where, torch.randn(where.numel(), generator=generator, dtype=torch.float64))


KINDS: dict[str, Callable[[int, torch.Generator], Pair]] = {
    "dense": dense,
    "LoRA": lora,
    "sparse LoRA": sparse_lora,
    "rand": rand,
    "WM": wm,
    "WM-non-overlap": wm_apart,
    "Struct": struct,
}


def orthogonality(one: Tensor, other: Tensor) -> tuple[float, float, float]:
    """AWOR, AWOM, and AWOM / (‖A₁‖ · ‖A₂‖)."""
    if one.is_sparse:
        product = linalg.gram(one, other)
        nonzero, squares = product.nonzero, product.squares
        norms = float(one.values().norm() * other.values().norm())
    else:
        both = one.T @ other
        nonzero, squares = int(both.count_nonzero()), float(both.norm()) ** 2
        norms = float(one.norm() * other.norm())
    return 1 - nonzero / one.numel(), squares**0.5, squares**0.5 / norms if norms else 0.0


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """For each kind and size, means and standard deviations over 25 pairs of adapters."""
    rows = []
    for side in (128, 256) if quick else SIZES:
        for kind, draw in KINDS.items():
            generator = torch.Generator().manual_seed(side)
            found = torch.tensor(
                [orthogonality(*draw(side, generator)) for _ in range(2 if quick else PAIRS)], dtype=torch.float64
            )
            figures = dict(zip(("awor", "awom", "awom_relative"), found.mean(0).tolist(), strict=True))
            spread = dict(zip(("awor_sd", "awom_sd", "awom_relative_sd"), found.std(0).tolist(), strict=True))
            rows.append(print_row("orthogonality", side=side, kind=kind, **figures, **spread))
    for title, field, digits in (("AWOR", "awor", 4), ("AWOM", "awom", 1), ("AWOM over both norms", "awom_relative", 4)):
        table = Table("side", *KINDS, title=title)
        for side in dict.fromkeys(row["side"] for row in rows):
            table.add_row(f"{side}²", *(f"{row[field]:,.{digits}f}" for row in rows if row["side"] == side))
        Console(width=120).print(table)
    print(STATED)
    if plot is not None:
        _plot(rows, plot)
    return rows


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    styles = {"WM": dict(marker="o", markersize=8, fillstyle="none"), "WM-non-overlap": dict(marker="x", linestyle="none")}
    others: dict[str, Any] = {"marker": "."}  # in place of each method's marker, since many points are at one place
    titles = {"awor": "AWOR, the share of zeros in A₁ᵀA₂", "awom": "AWOM, ‖A₁ᵀA₂‖", "awom_relative": "AWOM over ‖A₁‖ · ‖A₂‖"}
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for kind in KINDS:
            mine = [row for row in rows if row["kind"] == kind]
            style = look(kind) | {"label": kind} | styles.get(kind, others)
            axis.plot([row["side"] for row in mine], [row[field] for row in mine], **style)
        axis.set_xscale("log", base=2)
        sides = sorted({row["side"] for row in rows})
        axis.set_xticks(sides, [f"{side}" for side in sides], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("side of the weight", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        if field != "awor":
            axis.set_yscale("log")
    last = max(row["side"] for row in rows)
    at = {row["kind"]: row["awor"] for row in rows if row["side"] == last}
    stated = {"Struct": "paper: nearly 1", "WM": "paper: much higher", "dense": "paper: near 0"}
    for kind, words in stated.items():
        above = 0.04 if kind == "dense" else -0.07
        axes[0].annotate(words, (last, at[kind] + above), ha="right", fontsize=8, style="italic")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), fontsize=9, frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    print(f"plot: {path}")
