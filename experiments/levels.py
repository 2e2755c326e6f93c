"""How few values the weights of a model that was stored in few bits have, and what that means for a mask by magnitude.

    python -m experiments.levels
    python -m experiments.levels --model gemma-3-270m-Q4_K_M

The built-in model's linear layers were stored in 4 bits: 32 neighbours in a row have at most 16 levels, evenly spaced from
their smallest value to their largest. `moved` draws weights that would have been stored as the same levels. The first table is
in docs/data.md, the second in docs/masks/README.md.
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shira import masks
from shira.checkpoints.sources import Checkpoint
from shira.data.models import SMOLLM2, model_path

from .language.gemma import GEMMA
from .language.runs import place
from .language.tables import markdown

BLOCK, LEVELS = 32, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # as in the study of masks


def distinct(weight: Tensor) -> Tensor:
    """The number of different values in each block, int64 [blocks]."""
    ordered = weight.reshape(-1, BLOCK).sort(dim=1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)


def moved(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A weight that is stored as the same levels: each entry moves at random by up to half a step between levels.

    One smallest and one largest entry of a block stay, since the levels are spaced between them.
    """
    blocks = weight.float().reshape(-1, BLOCK)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    move = (torch.rand(blocks.shape, generator=generator) - 0.5) * (high - low) / (LEVELS - 1)
    move = torch.where(blocks == low, move.abs(), torch.where(blocks == high, -move.abs(), move))
    for ends in (blocks.argmin(dim=1, keepdim=True), blocks.argmax(dim=1, keepdim=True)):
        move.scatter_(1, ends, 0.0)
    return (blocks + move).reshape(weight.shape).to(weight.dtype)


def ties(weight: Tensor, k: int, bottom: bool) -> dict[str, int]:
    """Counts for the mask `wm` or `wm:bottom=true`.

    chosen: entries; edge: those with the magnitude of the last one; left_out: further ones with that magnitude, not chosen;
    in_block: chosen entries whose magnitude another entry of their block has, too.
    """
    chosen, magnitudes = masks.wm(weight, k, bottom=bottom), weight.abs().reshape(-1)
    last = magnitudes[chosen].max() if bottom else magnitudes[chosen].min()
    edge = int((magnitudes[chosen] == last).sum())
    alike = (magnitudes.view(-1, BLOCK)[chosen // BLOCK] == magnitudes[chosen, None]).sum(dim=1) > 1
    left_out = int((magnitudes == last).sum()) - edge
    return {"chosen": k, "edge": edge, "left_out": left_out, "in_block": int(alike.sum())}


def tied(tensors: Mapping[str, Tensor], density: float, levels_known: bool = True) -> list[list[str]]:
    """Rows of a table, in per cent of the chosen entries: the model, weights that `moved` draws, and normal ones.

    levels_known: whether the model was stored in the levels that `moved` knows. Otherwise those rows are missing.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in tensors if name.split(".")[-2] in TARGETS):
        weight = tensors[name]
        k = int(density * weight.numel())
        normal = (torch.randn(weight.shape, generator=generator) * weight.float().std()).to(weight.dtype)
        kinds = {"this model": weight}
        if levels_known:
            kinds["moved by up to half a step"] = moved(weight, generator)
        kinds["normal"] = normal
        for (mask, bottom), (kind, held) in itertools.product((("wm", False), ("wm:bottom=true", True)), kinds.items()):
            same = torch.isin(masks.wm(held, k, bottom=bottom), masks.wm(weight, k, bottom=bottom)).sum()
            counts.setdefault((mask, kind), Counter()).update(ties(held, k, bottom) | {"same": int(same)})
    columns = ("edge", "left_out", "in_block", "same")
    return [
        [f"`{mask}`", kind, *(f"{100 * of[what] / of['chosen']:.1f}" for what in columns)]
        for (mask, kind), of in counts.items()
    ]


def kinds_of(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Rows of a table: kinds of weights, their number and share, and the different values in a block: their mean, and most."""
    found: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    for name in tensors:
        weight = tensors[name]
        kind = "norms" if weight.dim() < 2 else "embedding" if "embed" in name else "linear layers"
        sizes[kind] = sizes.get(kind, 0) + weight.numel()
        found.setdefault(kind, []).append(distinct(weight))
    rows = []
    for kind, size in sorted(sizes.items(), key=lambda each: -each[1]):
        counts = torch.cat(found[kind]).double()
        share = f"{100 * size / sum(sizes.values()):.2f} %"
        rows.append([kind, f"{size:,}", share, f"{counts.mean():.1f}", f"{counts.max():.0f}"])
    return rows


def main(arguments: Any = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--model", default=SMOLLM2, choices=[SMOLLM2, GEMMA])
    asked = parser.parse_args(arguments)
    tensors = Checkpoint(model_path(place(asked.model)))
    print(markdown(["weights", "number", "share", "different values among 32: mean", "most"], kinds_of(tensors)))
    print()
    head = ["mask", "weights", "tied with the last", "such ones left out", "tied in the block", "same as in this model"]
    print(markdown(head, tied(tensors, asked.density, levels_known=asked.model == SMOLLM2)))


if __name__ == "__main__":
    main()
