"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796) on the trained entries.

A quadratic penalty pulls each entry back to the base. Its strength is the entry's importance for what the model can already
do: F, the mean squared gradient on general text. docs/masks/README.md describes its effect on adapters that are added.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TuningError
from ..masks.calibration import LossFn, Progress, calibrate, check_arguments
from ..masks.selector import LEAST_MEMORY
from ..texts import plain_number
from ..weights.undo import Undo, hooks_of, set_hook
from .masters import Masters

__all__ = ["hold"]

STILL_FREE = 12  # bytes per entry for a gradient and AdamW's two moments, which do not exist before training


def hold(
    model: nn.Module,
    masters: Mapping[str, Masters],
    batches: Iterable[Any],
    reference: AbstractContextManager[None],
    reach: float,
    passes: int,
    loss_fn: LossFn | None,
    progress: Progress | None,
    undo: Undo,
) -> dict[str, Any]:
    """Add pull · (value − base) / passes to each gradient of the masters, until `undo`; returns a record for the metadata.

    pull = F / (reach · √(mean of the tensor's F)), float32 [k]. For an entry of mean F, a change of `reach` pulls as strongly
    as a typical gradient of the batches.
    reference: a context manager in which the model is its base. passes: backward passes for each optimizer step.
    Raises TuningError if reach is not above 0, passes is below 1, or the masters are not plain entries of whole weights; or
    what `calibrate` raises.
    """
    reach, passes = plain_number(reach), plain_number(passes)
    if isinstance(reach, bool) or not isinstance(reach, int | float) or not 0 < reach < float("inf"):
        raise TuningError(f"reach must be a number above 0, in units of the weights; found {reach!r}")
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise TuningError(f"passes must be a whole number from 1 on, found {passes!r}")
    if batches is None:
        raise TuningError("expected batches of general text, tuner.stay_near(batches), found None")
    check_arguments(batches, loss_fn, progress, option="batches")
    if not all(each.can_stay_near for each in masters.values()):
        raise TuningError("stay_near needs plain entries of whole weights: no decompose, low_rank, quantized or sharded base")
    pulls: dict[str, Tensor] = {}

    def receive(name: str, statistics: Mapping[str, Tensor]) -> None:
        importance = statistics["squared_gradient"].reshape(-1)[masters[name].indices]
        mean = importance.mean()
        pulls[name] = importance / (reach * mean.sqrt()) if mean > 0 else torch.zeros_like(importance)

    weights = {name: each.weight for name, each in masters.items()}
    memory = max(LEAST_MEMORY, STILL_FREE * sum(each.indices.numel() for each in masters.values()))
    wanted = ["squared_gradient"]
    with reference:
        done = calibrate(
            model, weights, batches, receive, statistics=wanted, loss_fn=loss_fn, memory=memory, progress=progress, undo=undo
        )
    for name, each in masters.items():
        (values,) = each.parameters.values()
        set_hook(undo, hooks_of(values, "_backward_hooks"), values.register_hook, _pull_hook(each, pulls[name] / passes))
    return {"reach": reach, "calibration": done}


def _pull_hook(masters: Masters, pull: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that adds the pull [k] to the masters' gradient [k]."""

    def add(gradient: Tensor) -> Tensor:
        away = masters.current().detach() - masters.base.to(gradient.device, torch.float32)
        return gradient + masters.scale * pull.to(gradient.device) * away

    return add
