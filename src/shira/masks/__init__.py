"""Masks: which entries train. A mask is any function that returns the positions of at most `k` entries of one tensor.

The names of its arguments say what it needs. It is called with these and no others:

    weight             Tensor [out, in], the base weight
    k                  int, the budget: how many entries may train
    gradient           Tensor of the weight's shape: the gradient of the loss summed over the calibration batches
    squared_gradient   Tensor of the weight's shape: the square of each batch's gradient, mean over the calibration batches
    activations        Tensor [in]: the 2-norm of each input feature over the calibration tokens
    seed               int, derived from (seed, tensor name), so that two layers of one shape differ
    name               str, the tensor's name
    avoid              int64 [any], sorted flat positions that must not train because other adapters hold them; often empty

A function of yours gets copies of the tensors, so it may compute in place.
It returns integer positions [at most k] in the flattened weight (C order), sorted or not; or a boolean tensor of its shape.
A mask with an argument `gradient`, `squared_gradient` or `activations` needs `calibration`. Any other argument needs a default.
Set it with `functools.partial`, or in the mask's name as on the command line:

    shira.attach(model, mask=functools.partial(shira.masks.struct, direction="columns"))
    shira.attach(model, mask="block:by=snip,size=8", calibration=batches)
    shira.attach(model, mask=lambda weight, k: weight.flatten().abs().topk(k, largest=False).indices)

A mask with an argument `by` (a score) or `of` (masks) also gets, as further keywords, the inputs that these need.

Every mask of the catalogue returns at most k positions. Those with scores compute them in float32, take the first positions
among equal ones, and raise MaskError for NaN. struct, block, wanda and lift need a matrix, nm needs rows; the others take any
shape.
"""

import inspect
import re
from typing import NamedTuple

from ..sparse.positions import draw, frequency_of, lines, seed_of
from ..sparse.topk import top_k
from .activation import wanda
from .applying import options_of, ranked, score, score_of, select
from .budgets import BudgetPlan, Pool, budget, plan, share_out
from .catalogue import CATALOGUE, Mask, difference, intersection, needs, resolve, union
from .gradient import fisher, grad, snip
from .lowrank import lift
from .magnitude import wm
from .patterns import block, nm
from .scores import CALIBRATED, SCORES, Score
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
    """A line of the catalogue. needs: the inputs of the mask, except the budget and `avoid`; options: name -> default."""

    name: str
    meaning: str
    source: str
    needs: tuple[str, ...]
    options: dict[str, object]


def available() -> list[MaskInfo]:
    """The catalogue: each mask's name, what it selects, its source, what it needs except a budget, and its options."""
    return [_info(name, mask) for name, mask in CATALOGUE.items()]


def _info(name: str, mask: Mask) -> MaskInfo:
    """A line of the catalogue. The meaning is the first sentence of the mask's docstring, which ends with (source)."""
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
