"""Which entries train. A mask is any function that returns the positions of at most `k` entries of one tensor.

It says what it needs by the names of its arguments, and is called with just those:

    weight      Tensor, the base weight, [out, in]
    k           int, the budget: how many entries may train
    gradient    Tensor, of the loss summed over the calibration batches, the weight's shape (makes `calibration` a must)
    seed        int, one for each (seed, tensor name), so that two layers of one shape differ

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
from .gradient import grad, grad_scores, snip, snip_scores
from .magnitude import wm, wm_scores
from .structured import frequencies, lines, struct
from .topk import top_k
from .uniform import draw, rand

__all__ = [
    "SCORES",
    "Mask",
    "MaskInfo",
    "Score",
    "available",
    "budget",
    "draw",
    "frequencies",
    "grad",
    "lines",
    "needs",
    "rand",
    "resolve",
    "seed_of",
    "select",
    "snip",
    "struct",
    "top_k",
    "wm",
]

Mask = Callable[..., Tensor]
Score = Callable[
    ..., Tensor
]  # a function of the same inputs but k; float32 of the weight's shape, the larger the sooner it trains

INPUTS = ("weight", "k", "gradient", "seed")
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
            name, (inspect.getdoc(mask) or "").split("\n\n")[0].replace("\n", " "), tuple(n for n in needs(mask) if n != "k")
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


def budget(shape: tuple[int, ...], *, density: float | None = None, rank: int | None = None) -> int:
    """How many entries of a tensor may train: density · entries, or the rank · (out + in) of a LoRA of that rank.

    Raises MaskError unless exactly one is given, 0 < density ≤ 1, rank ≥ 1, and the rank's count fits the tensor.
    """
    if (density is None) == (rank is None):
        raise MaskError(f"give density or rank, one of them; found density={density}, rank={rank}")
    numel = torch.Size(shape).numel()
    if rank is not None:
        if rank < 1 or len(shape) != 2 or rank * sum(shape) > numel:
            raise MaskError(f"rank must be from 1 to {numel // max(1, sum(shape))} for shape {list(shape)}, found {rank}")
        return rank * sum(shape)
    if not 0 < float(density or 0) <= 1:
        raise MaskError(f"density must be above 0 and at most 1, found {density}")
    return max(1, round(float(density or 0) * numel))


def select(mask: str | Mask, name: str, weight: Tensor, k: int, *, gradient: Tensor | None = None, seed: int = 0) -> Tensor:
    """Run a mask on one tensor and check what it returns.

    name: the tensor's name; with `seed` it seeds the mask. Returns int64 [at most k], sorted, on the weight's device.
    Raises MaskError that names the tensor.
    """
    label, function = resolve(mask)
    wanted = needs(function)
    if "gradient" in wanted and gradient is None:
        raise MaskError(f"mask {label!r} needs gradients: pass calibration=, an iterable of batches")
    inputs: dict[str, Any] = {"weight": weight, "k": k, "gradient": gradient, "seed": seed_of(seed, name)}
    try:
        with torch.no_grad():
            return _positions(function(**{key: inputs[key] for key in wanted}), weight, k)
    except MaskError as error:
        raise MaskError(f"mask {label!r} on tensor '{name}': {error}") from error


def _positions(answer: Any, weight: Tensor, k: int) -> Tensor:
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
    return indices


def seed_of(seed: int, name: str) -> int:
    """A seed from 0 to 2⁶³ - 1 for one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "big") >> 1
