"""A mask that moves while it trains: other entries take the place of some, and the optimizer's state follows.

Masks that move are known from sparse training (RigL, arXiv 1911.11134) and sparse fine-tuning (SpIEL, arXiv 2401.16405).
Here each tensor keeps its number of entries, and the optimizer its parameters: only what stands in them is rearranged.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import TuningError
from ..sparse.positions import overlap
from .masters import Masters

__all__ = ["check_cap", "movable", "move"]


def check_cap(cap: float) -> None:
    """Raise TuningError unless cap is a finite number from 1 on."""
    if isinstance(cap, bool) or not isinstance(cap, int | float) or not 1 <= cap < math.inf:
        raise TuningError(f"cap must be a number from 1 on, in budgets: 1 holds the budget, 2 twice that; found {cap!r}")


def movable(optimizer: torch.optim.Optimizer, masters: Mapping[str, Masters]) -> dict[str, list[Tensor]]:
    """Tensor name -> what the optimizer keeps for each entry of its masters, tensors [k].

    Raises TuningError if masters are not finite, or the optimizer does not train them or keeps something that is neither one
    number an entry nor one for all (as 8-bit optimizers do, whose blocks of entries share a scale).
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, list[Tensor]] = {}
    for name, entries in masters.items():
        if id(entries.values) not in trained:
            raise TuningError(f"this optimizer does not train '{name}'; pass the one that was made with tuner.parameters()")
        if not bool(torch.isfinite(entries.values).all()):
            raise TuningError(f"training of '{name}' went wrong: values are not finite; try a lower learning rate")
        found[name] = []
        state: Mapping[str, Any] = optimizer.state.get(entries.values, {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape != entries.values.shape or not value.is_floating_point():
                raise TuningError(
                    f"the optimizer's state {key!r} of '{name}', {value.dtype} {list(value.shape)}, is not one number for each "
                    f"of the {entries.values.numel()} entries and cannot move with them; use another optimizer, or no refresh"
                )
            found[name].append(value)
    return found


def move(masters: Masters, indices: Tensor, state: list[Tensor], cap: float) -> int:
    """Train the entries at `indices` [k] instead of the present ones; returns how many are new.

    Masters, gradient and optimizer state stay the tensors they are: what belongs to an entry that stays moves with it, bit
    for bit; that of a new entry is zero. If none is new, nothing is touched.
    """
    if torch.equal(masters.indices, indices):
        return 0
    in_old, in_new = overlap(masters.indices, indices)
    count = indices.numel()
    masters.move(indices, math.floor(cap * count) - count)
    if masters.values.grad is not None:
        state = [*state, masters.values.grad]
    for values in state:
        moved = torch.zeros_like(values)
        moved[in_new] = values[in_old]
        values.copy_(moved)
    return count - in_new.numel()
