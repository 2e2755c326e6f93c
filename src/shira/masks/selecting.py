"""From a mask's name or function to positions: what it needs, what it is told, and whether its answer can be used."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError, did_you_mean
from .budgets import without
from .topk import top_k

__all__ = [
    "CALIBRATED",
    "CATALOGUE",
    "SCORES",
    "Mask",
    "Score",
    "call",
    "find_score",
    "needs",
    "options_of",
    "ranked",
    "resolve",
    "score",
    "score_of",
    "seed_of",
    "select",
]

Mask = Callable[..., Tensor]
Score = Callable[..., Tensor]  # of a mask's inputs but k: float32 [the weight's shape], the larger the sooner an entry trains

CALIBRATED = ("gradient", "squared_gradient", "activations")
INPUTS = ("weight", "k", *CALIBRATED, "seed", "name", "avoid")

CATALOGUE: dict[str, Mask] = {}  # both are filled in __init__.py
SCORES: dict[str, Score] = {}


def resolve(mask: str | Mask) -> tuple[str, Mask]:
    """A mask's name and function. Raises MaskError for an unknown name, an unknown option or a function of another form.

    A name may carry options after a colon, as a command line does: "block:by=snip,size=8", "union:of=wm+rand".
    """
    if isinstance(mask, str):
        name, _, rest = mask.partition(":")
        if name not in CATALOGUE:
            raise MaskError(f"unknown mask {name!r}; {did_you_mean(name, CATALOGUE)}")
        return name, _with_options(CATALOGUE[name], name, rest) if rest else CATALOGUE[name]
    if not callable(mask):
        raise MaskError(f"mask must be a name or a function, found {type(mask).__name__}")
    needs(mask)
    inner = mask.func if isinstance(mask, partial) else mask
    return getattr(inner, "__name__", type(inner).__name__), mask


def needs(function: Mask | Score) -> tuple[str, ...]:
    """Which inputs a mask or a score asks for, those of its `by` and `of` included.

    Raises MaskError if it asks for anything else.
    """
    wanted: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in INPUTS:
            wanted.append(parameter.name)
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        elif parameter.default is parameter.empty:
            raise MaskError(f"a mask may ask for {', '.join(INPUTS)}; {function!r} asks for {parameter.name!r}")
        elif parameter.name == "by":
            wanted += needs(find_score(parameter.default))
        elif parameter.name == "of":
            wanted += [name for mask in parameter.default for name in needs(resolve(mask)[1])]
    return tuple(dict.fromkeys(wanted))


def call(function: Mask | Score, inputs: Mapping[str, Any]) -> Any:
    """A mask or a score of the inputs it asks for."""
    return function(**{name: inputs[name] for name in needs(function)})


def find_score(by: str | Score) -> Score:
    """A score by its mask's name, or as it is if it is a function. Raises MaskError for an unknown name."""
    if not isinstance(by, str):
        return by
    if by not in SCORES:
        raise MaskError(f"unknown score {by!r}; {did_you_mean(by, SCORES)}")
    return SCORES[by]


def score_of(mask: str | Mask) -> Score | None:
    """The score of which a mask of the catalogue, with its options, takes the top k; None for any other mask."""
    label, function = resolve(mask)
    inner, options = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    if label not in SCORES or inner is not CATALOGUE[label]:
        return None
    return partial(SCORES[label], **options) if options else SCORES[label]


def ranked(mask: str | Mask) -> Score:
    """The score of which a mask takes the top k. Raises MaskError for a mask that ranks no scores."""
    found = score_of(mask)
    if found is None:
        raise MaskError(
            f"mask {resolve(mask)[0]!r} ranks no scores, so entries of different tensors cannot be compared; use "
            f"scope='tensor', or one of {', '.join(SCORES)}"
        )
    return found


def options_of(mask: Mask) -> dict[str, Any]:
    """The options of a `functools.partial` as JSON: functions by their names, what else JSON cannot hold by its type."""

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

    name: the tensor's name; with `seed` it seeds the mask. statistics: of `CALIBRATED`.
    avoid: sorted flat positions that must not train; where a mask of the catalogue ranks scores, theirs count as absent.
    Returns int64 [at most k], sorted, on the weight's device. Raises MaskError that names the tensor.
    """
    label, function = resolve(mask)
    taken = torch.empty(0, dtype=torch.int64, device="cpu") if avoid is None else avoid.long()
    inputs = _inputs(name, weight, seed, statistics) | {"k": k, "avoid": taken.to(weight.device)}
    _check_calibrated(label, function, inputs)
    try:
        with torch.no_grad():
            if not taken.numel() or "avoid" in inspect.signature(function).parameters:
                answer = call(function, inputs)
            else:
                answer = _top_k_without(mask, inputs)
            return _positions(answer, weight, k, inputs["avoid"])
    except MaskError as error:
        raise MaskError(f"mask {label!r} on tensor '{name}': {error}") from error


def score(mask: str | Mask, name: str, weight: Tensor, *, seed: int = 0, **statistics: Tensor | None) -> Tensor:
    """The scores, of the weight's shape, of which a mask takes the top k. Raises MaskError that names the tensor."""
    label, function = resolve(mask)[0], ranked(mask)
    inputs = _inputs(name, weight, seed, statistics)
    _check_calibrated(label, function, inputs)
    try:
        with torch.no_grad():
            scores: Tensor = call(function, inputs)
    except MaskError as error:
        raise MaskError(f"mask {label!r} on tensor '{name}': {error}") from error
    return scores


def _inputs(name: str, weight: Tensor, seed: int, statistics: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """What masks and scores may ask for, but a budget."""
    return dict.fromkeys(CALIBRATED) | {"weight": weight, "seed": seed_of(seed, name), "name": name} | dict(statistics)


def _check_calibrated(label: str, function: Mask | Score, inputs: Mapping[str, Any]) -> None:
    """Raise MaskError if something that calibration finds is asked for and missing."""
    for wanted in needs(function):
        if inputs[wanted] is None:
            words = {"gradient": "gradients", "squared_gradient": "squared gradients"}.get(wanted, wanted)
            raise MaskError(f"mask {label!r} needs {words}: pass calibration=, an iterable of batches")


def _top_k_without(mask: str | Mask, inputs: Mapping[str, Any]) -> Tensor:
    """The top k of a mask's scores beside the positions to avoid. Raises MaskError if it ranks none."""
    function = score_of(mask)
    if function is None:
        raise MaskError(
            f"it cannot leave out positions that are to be avoided; rand, struct, {', '.join(SCORES)} can, and so can a "
            "function with an argument `avoid`, these positions, sorted, of which it returns none"
        )
    return top_k(without(call(function, inputs), inputs["avoid"]), inputs["k"])


def seed_of(seed: int, name: str) -> int:
    """A seed from 0 to 2⁶³ - 1 for one tensor."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:8], "big") >> 1


def _positions(answer: Any, weight: Tensor, k: int, avoid: Tensor) -> Tensor:
    """Positions in the one form, int64 and sorted, from a mask's answer."""
    if not isinstance(answer, Tensor) or answer.dtype not in (torch.bool, torch.int32, torch.int64):
        found = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise MaskError(f"expected a tensor of integer positions or a boolean mask, found {found}")
    if answer.is_meta:
        raise MaskError("it returned positions without data, on the meta device")
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


def _with_options(mask: Mask, name: str, text: str) -> Mask:
    """A mask with the options of "by=snip,size=8": whole numbers, true, false, words, and words joined by '+'."""
    known = [p for p in inspect.signature(mask).parameters if p not in INPUTS and p != "inputs"]
    options: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known or not equals:
            raise MaskError(f"mask {name!r}: {part!r} is no option=value; {did_you_mean(key, known)}")
        options[key] = _value(value) if key != "of" else tuple(value.split("+"))
    changed = partial(mask, **options)
    needs(changed)
    return changed


def _value(text: str) -> int | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        return text
