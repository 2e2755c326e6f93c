"""Run a mask, given by name or as a function, on one tensor, and check the positions that it returns."""

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError
from ..sparse.positions import seed_of
from ..sparse.topk import top_k
from .budgets import scores_without
from .catalogue import CATALOGUE, Mask, call, needs, resolve
from .scores import CALIBRATED, SCORES, Score
from .sets import positions_in

__all__ = ["options_of", "ranked", "score", "score_of", "select"]


def score_of(mask: str | Mask) -> Score | None:
    """The score whose top k a mask of the catalogue takes, with the mask's options; None for any other mask."""
    label, function = resolve(mask)
    inner, options = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    if label not in SCORES or inner is not CATALOGUE[label]:
        return None
    return partial(SCORES[label], **options) if options else SCORES[label]


def ranked(mask: str | Mask) -> Score:
    """The score whose top k a mask takes. Raises MaskError for a mask that ranks no scores."""
    found = score_of(mask)
    if found is None:
        raise MaskError(
            f"mask {resolve(mask)[0]!r} ranks no scores, so entries of different tensors cannot be compared; use "
            f"scope='tensor', or one of {', '.join(SCORES)}"
        )
    return found


def options_of(mask: Mask) -> dict[str, Any]:
    """The options of a `functools.partial` as JSON: functions by name, other values that JSON cannot hold by type."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        if callable(value):
            return getattr(value, "__name__", type(value).__name__)
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            return type(value).__name__

    return {key: plain(value) for key, value in mask.keywords.items()} if isinstance(mask, partial) else {}


def select(
    mask: str | Mask,
    name: str,
    weight: Tensor,
    k: int,
    *,
    seed: int = 0,
    avoid: Tensor | None = None,
    **statistics: Tensor | None,
) -> Tensor:
    """Run a mask on one tensor and check what it returns.

    name: the tensor's name; together with `seed` it seeds the mask. statistics: those of `CALIBRATED` that the mask needs.
    avoid: sorted flat positions that must not train. A mask that has no argument `avoid` must rank scores; it then takes the
        top k of the other positions.
    Returns int64 [at most k], sorted, on the weight's device.
    Raises MaskError; it names the tensor, unless the mask is unknown or its statistics are missing.
    """
    label, function = resolve(mask)
    taken = torch.empty(0, dtype=torch.int64, device="cpu") if avoid is None else avoid.long()
    inputs = _inputs(name, weight, seed, statistics) | {"k": k, "avoid": taken.to(weight.device)}
    _check_calibrated(label, function, inputs)
    with _named_in_errors(label, name), torch.no_grad():
        if not taken.numel() or "avoid" in inspect.signature(function).parameters:
            answer = call(function, inputs)
        else:
            answer = _top_k_without(mask, inputs)
        return _positions(answer, weight, k, inputs["avoid"])


def score(mask: str | Mask, name: str, weight: Tensor, *, seed: int = 0, **statistics: Tensor | None) -> Tensor:
    """The scores whose top k a mask takes, of the weight's shape. Raises MaskError, as `select` does."""
    label, function = resolve(mask)[0], ranked(mask)
    inputs = _inputs(name, weight, seed, statistics)
    _check_calibrated(label, function, inputs)
    with _named_in_errors(label, name), torch.no_grad():
        scores: Tensor = call(function, inputs)
        return scores


@contextlib.contextmanager
def _named_in_errors(label: str, name: str) -> Iterator[None]:
    """A context in which a MaskError gets the names of the mask and the tensor."""
    try:
        yield
    except MaskError as error:
        raise MaskError(f"mask {label!r} on tensor '{name}': {error}") from error


def _inputs(name: str, weight: Tensor, seed: int, statistics: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The inputs that masks and scores may ask for, except `k` and `avoid`."""
    return dict.fromkeys(CALIBRATED) | {"weight": weight, "seed": seed_of(seed, name), "name": name} | dict(statistics)


def _check_calibrated(label: str, function: Mask | Score, inputs: Mapping[str, Any]) -> None:
    """Raise MaskError if the function asks for an input that calibration computes, and it is missing."""
    for wanted in needs(function):
        if inputs[wanted] is None:
            words = {"gradient": "gradients", "squared_gradient": "squared gradients"}.get(wanted, wanted)
            raise MaskError(f"mask {label!r} needs {words}: pass calibration=, an iterable of batches")


def _top_k_without(mask: str | Mask, inputs: Mapping[str, Any]) -> Tensor:
    """The top k of a mask's scores outside of the positions to avoid. Raises MaskError if it ranks no scores."""
    function = score_of(mask)
    if function is None:
        raise MaskError(
            f"it cannot leave out positions that are to be avoided; use rand, struct, {', '.join(SCORES)}, or a function with "
            "an argument `avoid`, the sorted positions that it must not return"
        )
    return top_k(scores_without(call(function, inputs), inputs["avoid"]), inputs["k"])


def _positions(answer: Any, weight: Tensor, k: int, avoid: Tensor) -> Tensor:
    """`sets.positions_in`, at least one, and none to avoid. Raises MaskError otherwise."""
    indices = positions_in(answer, weight, k)
    if indices.numel() == 0:
        raise MaskError("it returned no position; raise the density")
    if avoid.numel() and bool((met := torch.isin(indices, avoid, assume_unique=True)).any()):
        raise MaskError(f"it returned {int(met.sum())} positions to avoid, the first is {int(indices[met][0])}")
    return indices
