"""Which entries train. A mask is any function that returns the positions of at most `k` entries of one tensor.

It says what it needs by the names of its arguments, and is called with just those:

    weight      Tensor, the base weight, [out, in]
    k           int, the budget: how many entries may train
    gradient    Tensor, of the loss summed over the calibration batches, the weight's shape (makes `calibration` a must)
    seed        int, one for each (seed, tensor name), so that two layers of one shape differ
    avoid       int64 [any], sorted flat positions that must not train, because other adapters hold them; mostly empty

and returns positions, integers [at most k] in any order, flat in C order; or a boolean tensor of the weight's shape.
Other arguments need defaults; set them with `functools.partial`:

    shira.attach(model, mask=functools.partial(shira.masks.struct, direction="columns"))
    shira.attach(model, mask=lambda weight, k: weight.flatten().abs().topk(k, largest=False).indices)
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MaskError, did_you_mean
from .budgets import Plan, Pool, budget, plan, share_out, without
from .gradient import grad, grad_scores, snip, snip_scores
from .magnitude import wm, wm_scores
from .structured import frequencies, lines, struct
from .topk import top_k
from .uniform import draw, rand

__all__ = [
    "SCORES",
    "Mask",
    "MaskInfo",
    "Plan",
    "Pool",
    "Score",
    "available",
    "budget",
    "draw",
    "frequencies",
    "grad",
    "lines",
    "needs",
    "plan",
    "rand",
    "ranked",
    "resolve",
    "score",
    "seed_of",
    "select",
    "share_out",
    "snip",
    "struct",
    "top_k",
    "wm",
]

Mask = Callable[..., Tensor]
Score = Callable[..., Tensor]  # of the same inputs but k; float32 of the weight's shape, the larger the sooner it trains

INPUTS = ("weight", "k", "gradient", "seed", "avoid")
CATALOGUE: dict[str, Mask] = {"struct": struct, "rand": rand, "wm": wm, "grad": grad, "snip": snip}
SCORES: dict[str, Score] = {"wm": wm_scores, "grad": grad_scores, "snip": snip_scores}  # what some masks take the top k of


class MaskInfo(NamedTuple):
    """A line of the catalogue."""

    name: str
    meaning: str
    needs: tuple[str, ...]


def available() -> list[MaskInfo]:
    """The catalogue: each mask's name, what it selects with its source, and what it needs beside a budget."""
    return [
        MaskInfo(
            name,
            (inspect.getdoc(mask) or "").split("\n\n")[0].replace("\n", " "),
            tuple(n for n in needs(mask) if n not in ("k", "avoid")),
        )
        for name, mask in CATALOGUE.items()
    ]


def resolve(mask: str | Mask) -> tuple[str, Mask]:
    """A mask's name and function. Raises MaskError for an unknown name or a function of another form."""
    if isinstance(mask, str):
        if mask not in CATALOGUE:
            raise MaskError(f"unknown mask {mask!r}; {did_you_mean(mask, CATALOGUE)}")
        return mask, CATALOGUE[mask]
    if not callable(mask):
        raise MaskError(f"mask must be a name or a function, found {type(mask).__name__}")
    needs(mask)
    inner = mask.func if isinstance(mask, partial) else mask
    return getattr(inner, "__name__", type(inner).__name__), mask


def needs(mask: Mask) -> tuple[str, ...]:
    """Which of weight, k, gradient and seed a mask asks for. Raises MaskError if it asks for anything else."""
    wanted = []
    for parameter in inspect.signature(mask).parameters.values():
        if parameter.name in INPUTS:
            wanted.append(parameter.name)
        elif parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise MaskError(f"a mask may ask for {', '.join(INPUTS)}; {mask!r} asks for {parameter.name!r}")
    return tuple(wanted)


def ranked(mask: str | Mask) -> Score:
    """The function whose largest scores a mask selects. Raises MaskError for a mask that ranks no scores."""
    label, function = resolve(mask)
    score = _score_of(label, function)
    if score is None:
        raise MaskError(
            f"mask {label!r} ranks no scores, so entries of different tensors cannot be compared; use scope='tensor', or one "
            f"of {', '.join(SCORES)}"
        )
    return score


def _score_of(label: str, function: Mask) -> Score | None:
    """The score of a mask of the catalogue, with the same options; None for another's."""
    if isinstance(function, partial):
        score = _score_of(label, function.func)
        return partial(score, *function.args, **function.keywords) if score else None
    return SCORES.get(label) if CATALOGUE.get(label) is function else None


def select(
    mask: str | Mask,
    name: str,
    weight: Tensor,
    k: int,
    *,
    gradient: Tensor | None = None,
    seed: int = 0,
    avoid: Tensor | None = None,
) -> Tensor:
    """Run a mask on one tensor and check what it returns.

    name: the tensor's name; with `seed` it seeds the mask. avoid: sorted flat positions that must not train; of a mask of
    the catalogue that ranks scores, theirs then count as absent.
    Returns int64 [at most k], sorted, on the weight's device. Raises MaskError that names the tensor.
    """
    label, function = resolve(mask)
    taken = _avoid_of(weight, avoid)
    inputs: dict[str, Any] = {"weight": weight, "k": k, "gradient": gradient, "seed": seed_of(seed, name), "avoid": taken}
    try:
        scores = _score_of(label, function)
        if not taken.numel() or "avoid" in needs(function):
            return _positions(_call(label, function, inputs), weight, k, taken)
        if scores is None:
            raise MaskError(
                "it does not know of positions to avoid: give it an argument `avoid`, the sorted flat positions that must not "
                "train, and let it return none of them"
            )
        return _positions(top_k(without(_call(label, scores, inputs), taken), k), weight, k, taken)
    except MaskError as error:
        raise MaskError(f"mask {label!r} on tensor '{name}': {error}") from error


def score(mask: str | Mask, name: str, weight: Tensor, *, gradient: Tensor | None = None, seed: int = 0) -> Tensor:
    """The scores, of the weight's shape, by which a mask ranks a tensor's entries. Raises MaskError if it ranks none."""
    scores: Tensor = _call(
        resolve(mask)[0], ranked(mask), {"weight": weight, "gradient": gradient, "seed": seed_of(seed, name)}
    )
    return scores


def _call(label: str, function: Mask, inputs: dict[str, Any]) -> Any:
    """Call a mask or a score with the inputs it names."""
    wanted = needs(function)
    if "gradient" in wanted and inputs["gradient"] is None:
        raise MaskError(f"mask {label!r} needs gradients: pass calibration=, an iterable of batches")
    with torch.no_grad():
        return function(**{key: inputs[key] for key in wanted})


def _avoid_of(weight: Tensor, avoid: Tensor | None) -> Tensor:
    none = torch.empty(0, dtype=torch.int64)
    return (none if avoid is None else avoid).to(weight.device, torch.int64)


def _positions(answer: Any, weight: Tensor, k: int, avoid: Tensor) -> Tensor:
    """Positions in the one form, int64 and sorted, from a mask's answer."""
    if not isinstance(answer, Tensor) or answer.dtype not in (torch.bool, torch.int32, torch.int64):
        found = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise MaskError(f"expected a tensor of integer positions or a boolean mask, found {found}")
    if answer.dtype == torch.bool:
        if answer.shape != weight.shape:
            raise MaskError(f"expected a boolean mask of shape {list(weight.shape)}, found {list(answer.shape)}")
        answer = answer.reshape(-1).nonzero()
    indices: Tensor = answer.to(weight.device, torch.int64).reshape(-1).sort().values
    if indices.numel() > k:
        raise MaskError(f"the budget is {k} positions, it returned {indices.numel()}")
    if indices.numel() == 0:
        raise MaskError("it returned no position; raise the density")
    if bool((indices[1:] == indices[:-1]).any()):
        raise MaskError("it returned a position twice")
    if int(indices[0]) < 0 or int(indices[-1]) >= weight.numel():
        raise MaskError(f"positions must be from 0 to {weight.numel() - 1}, found {int(indices[0])} to {int(indices[-1])}")
    if avoid.numel() and bool((met := torch.isin(indices, avoid, assume_unique=True)).any()):
        raise MaskError(f"it returned {int(met.sum())} positions to avoid, the first is {int(indices[met][0])}")
    return indices


def seed_of(seed: int, name: str) -> int:
    """A seed from 0 to 2⁶³ - 1 for one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "big") >> 1
