"""Scores of entries, by name. A mask chooses the entries with the largest scores."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import MaskError, did_you_mean
from .activation import wanda_scores
from .gradient import fisher_scores, grad_scores, snip_scores
from .lowrank import lift_scores
from .magnitude import wm_scores

__all__ = ["CALIBRATED", "INPUTS", "SCORES", "Score", "call_score", "find_score", "inputs_of", "is_ours"]

Score = Callable[..., Tensor]  # takes a mask's inputs except k, returns float32 [the weight's shape]

CALIBRATED = ("gradient", "squared_gradient", "activations")  # inputs that calibration computes
INPUTS = ("weight", "k", *CALIBRATED, "seed", "name", "avoid")  # what a mask or a score may ask for

SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "wm": wm_scores,
        "grad": grad_scores,
        "snip": snip_scores,
        "fisher": fisher_scores,
        "wanda": wanda_scores,
        "lift": lift_scores,
    }
)


def find_score(by: str | Score) -> Score:
    """The score of the mask with this name; a function is returned as it is. Raises MaskError for an unknown name."""
    if callable(by):
        return by
    if not isinstance(by, str) or by not in SCORES:
        raise MaskError(f"unknown score {by!r}; {did_you_mean(str(by), SCORES)}")
    return SCORES[by]


def call_score(score: Score, inputs: Mapping[str, Any]) -> Any:
    """Call a score with the inputs that it asks for."""
    return score(**inputs_of(score, (name for name in inspect.signature(score).parameters if name in INPUTS), inputs))


def is_ours(function: Callable[..., Any]) -> bool:
    """Whether a mask or a score is of this package."""
    inner = function.func if isinstance(function, partial) else function
    return (getattr(inner, "__module__", None) or "").partition(".")[0] == __name__.partition(".")[0]


def inputs_of(function: Callable[..., Any], names: Iterable[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of these names for a mask or a score. One of a user gets copies of tensors: it may compute in place."""
    found = {name: inputs[name] for name in names}
    if is_ours(function):
        return found
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}
