"""A mask that moves during training: new entries replace some trained ones, and the optimizer's state follows.

Moving masks are known from sparse training (RigL, arXiv 1911.11134) and sparse fine-tuning (SpIEL, arXiv 2401.16405).
Here each tensor keeps its number of entries, and the optimizer keeps its parameters. Only the values in them are rearranged.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TuningError
from ..masks import BudgetPlan
from ..masks.calibration import check_arguments
from ..masks.selector import Selector
from ..sparse.positions import overlap
from ..weights.undo import Undo
from .masters import Masters
from .steps import ignoring

__all__ = ["move", "select"]


def check_kinds(optimizer: object, calibration: object, cap: object) -> None:
    """Raise TuningError unless cap is a finite number, at least 1, and the other arguments are what they are called."""
    if isinstance(cap, bool) or not isinstance(cap, int | float) or not 1 <= cap < math.inf:
        raise TuningError(f"cap must be a number from 1 on, in budgets: 1 holds the budget, 2 twice that; found {cap!r}")
    if not hasattr(optimizer, "param_groups") or isinstance(optimizer, type):
        raise TuningError(f"expected the optimizer that trains, tuner.refresh(optimizer), found {optimizer!r:.60}")
    check_arguments(calibration)


def select(
    model: nn.Module,
    masters: Mapping[str, Masters],
    whole: Collection[str],
    selector: Selector,
    optimizer: torch.optim.Optimizer,
    calibration: Iterable[Any] | None,
    cap: float,
    undo: Undo,
) -> list[tuple[Masters, Tensor, list[Tensor]]]:
    """Select again on the present weights; returns (masters, new positions, optimizer state) of each tensor, for `move`.

    whole: names of the tensors that train whole, without a mask.
    Raises TuningError, or what a mask raises, before anything has changed.
    """
    masked = {name: each for name, each in masters.items() if name not in whole}
    fixed = next((each for each in masked.values() if not each.can_move), None)
    if fixed is not None and fixed.piece is not None:
        raise TuningError("a mask cannot move on weights that are sharded; train without refresh, or with DDP")
    if fixed is not None:
        raise TuningError("a tuner with decompose, low_rank or a quantized base cannot be refreshed")
    check_kinds(optimizer, calibration, cap)
    states = _movable(optimizer, masked)
    weights = {name: each.weight for name, each in masked.items()}
    counts = {name: each.indices.numel() for name, each in masked.items()}
    with ignoring(masters.values(), undo) as steps:
        chosen = selector.select(model, weights, BudgetPlan(counts, 0, {}), calibration, undo=steps).indices
    for name, indices in chosen.items():
        if indices.numel() != counts[name]:
            raise TuningError(
                f"the mask now chose {indices.numel()} entries of '{name}', and {counts[name]} train; a mask that is to be "
                "refreshed must always return as many"
            )
    return [(masked[name], indices, states[name]) for name, indices in chosen.items()]


def _movable(optimizer: torch.optim.Optimizer, masters: Mapping[str, Masters]) -> dict[str, list[Tensor]]:
    """Tensor name -> the optimizer's state that has one number for each entry of the masters, tensors [k].

    Raises TuningError if masters are not finite, or if the optimizer does not train them. Raises it, too, for state that has
    neither one number for each entry nor one for all. 8-bit optimizers have such state: blocks of entries share a scale.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, list[Tensor]] = {}
    for name, each in masters.items():
        (values,) = each.parameters.values()
        if id(values) not in trained:
            raise TuningError(f"this optimizer does not train '{name}'; pass the one that was made with tuner.parameters()")
        if not bool(torch.isfinite(values).all()):
            raise TuningError(f"training of '{name}' went wrong: values are not finite; try a lower learning rate")
        found[name] = []
        state: Mapping[str, Any] = optimizer.state.get(values, {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape != values.shape or not value.is_floating_point():
                raise TuningError(
                    f"the optimizer's state {key!r} of '{name}', {value.dtype} {list(value.shape)}, is not one number for each "
                    f"of the {values.numel()} entries and cannot move with them; use another optimizer, or no refresh"
                )
            found[name].append(value)
    return found


def move(masters: Masters, indices: Tensor, state: list[Tensor], cap: float) -> int:
    """Train the entries at `indices` [k] instead of the present ones; returns the number of new entries.

    Masters, gradient and optimizer state (state: tensors [k]) remain the same tensors. The numbers of an entry that stays move
    with it, bit for bit. The gradient and state of a new entry are zero. If no entry is new, nothing changes.
    """
    if torch.equal(masters.indices, indices):
        return 0
    in_old, in_new = overlap(masters.indices, indices)
    count = indices.numel()
    masters.move(indices, math.floor(cap * count) - count)
    (values,) = masters.parameters.values()
    for each in state if values.grad is None else [*state, values.grad]:
        moved = torch.zeros_like(each)
        moved[in_new] = each[in_old]
        each.copy_(moved)
    return count - in_new.numel()
