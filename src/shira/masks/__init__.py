"""Which entries train. A mask is any function that returns the positions of at most `k` entries of one tensor.

It says what it needs by the names of its arguments, and is called with just those:

    weight             Tensor, the base weight, [out, in]
    k                  int, the budget: how many entries may train
    gradient           Tensor, of the loss summed over the calibration batches, the weight's shape
    squared_gradient   Tensor, of each calibration batch's loss, squared, mean over the batches, the weight's shape
    activations        Tensor, the 2-norm of each input feature over the calibration tokens, [in]
    seed               int, one for each (seed, tensor name), so that two layers of one shape differ
    name               str, the tensor's name
    avoid              int64 [any], sorted flat positions that must not train, as other adapters hold them; mostly empty

and returns positions, integers [at most k] in any order, flat in C order; or a boolean tensor of the weight's shape.
`gradient`, `squared_gradient` and `activations` make `calibration` a must. Other arguments need defaults; set them with
`functools.partial`, or in a name, as on the command line:

    shira.attach(model, mask=functools.partial(shira.masks.struct, direction="columns"))
    shira.attach(model, mask="block:by=snip,size=8", calibration=batches)
    shira.attach(model, mask=lambda weight, k: weight.flatten().abs().topk(k, largest=False).indices)

A mask with an argument `by` (a score) or `of` (masks) is given, as further keywords, what these need.

What holds for every mask of the catalogue: scores are taken in float32; among equal scores the first positions win; NaN is
refused; entries beyond the budget are never given. struct, block, wanda and lift need a matrix, the others take any shape.
"""

import inspect
import re
from typing import NamedTuple

from ..sparse.positions import draw, frequency_of, lines, seed_of
from ..sparse.topk import top_k
from .activation import wanda
from .budgets import BudgetPlan, Pool, budget, plan, share_out
from .catalogue import CATALOGUE, Mask, difference, intersection, needs, resolve, union
from .gradient import fisher, grad, snip
from .lowrank import lift
from .magnitude import wm
from .patterns import block, nm
from .scores import CALIBRATED, SCORES, Score
from .selecting import options_of, ranked, score, score_of, select
from .sets import from_adapter
from .structured import struct
from .uniform import rand

__all__ = [
    "CALIBRATED",
    "CATALOGUE",
    "SCORES",
    "BudgetPlan",
    "Mask",
    "MaskInfo",
    "Pool",
    "Score",
    "available",
    "block",
    "budget",
    "difference",
    "draw",
    "fisher",
    "frequency_of",
    "from_adapter",
    "grad",
    "intersection",
    "lift",
    "lines",
    "needs",
    "nm",
    "options_of",
    "plan",
    "rand",
    "ranked",
    "resolve",
    "score",
    "score_of",
    "seed_of",
    "select",
    "share_out",
    "snip",
    "struct",
    "top_k",
    "union",
    "wanda",
    "wm",
]


class MaskInfo(NamedTuple):
    """A line of the catalogue. needs: what it is told beside a budget; options: with their defaults."""

    name: str
    meaning: str
    source: str
    needs: tuple[str, ...]
    options: dict[str, object]


def available() -> list[MaskInfo]:
    """The catalogue: each mask's name, what it selects, who proposed it, what it needs beside a budget, and its options."""
    return [_info(name, mask) for name, mask in CATALOGUE.items()]


def _info(name: str, mask: Mask) -> MaskInfo:
    """The first line of a mask's docstring is its meaning, with the source in parentheses at its end."""
    first = (inspect.getdoc(mask) or "").split("\n\n")[0].replace("\n", " ")
    found = re.fullmatch(r"(.*) \((.*)\)\.", first)
    meaning, source = found.groups() if found else (first, "")
    wanted = needs(mask)
    options = {
        p.name: p.default
        for p in inspect.signature(mask).parameters.values()
        if p.name not in wanted and p.default is not p.empty and p.kind is not p.VAR_KEYWORD
    }
    meaning = meaning.removeprefix("Positions of ")
    return MaskInfo(name, meaning, source, tuple(n for n in wanted if n not in ("k", "avoid")), options)
