"""What a tuner holds of each weight that trains, in either of the paper's two ways (§3.3)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .masters import Held, Masters
from .targets import Target

__all__ = ["Entry", "with_hook", "with_values"]


@dataclass(eq=False)
class Entry:
    """One weight in training."""

    name: str
    weight: nn.Parameter
    count: int  # how many of its entries train
    parameter: nn.Parameter  # float32 masters [k], or the weight itself
    held: Callable[[], Held]  # all entries that may differ from the base
    masters: Masters | None = None  # with the method "values"
    undo: list[Callable[[], Any]] = field(default_factory=list)


def with_values(target: Target, masters: Masters) -> Entry:
    """The sparse-values way: masters, with which the modules compute until the tuner is detached."""
    first = next(iter(masters.parameters().values()))
    entry = Entry(target.name, target.weight, masters.indices.numel(), first, masters.held, masters)
    entry.undo.append(masters.restore)
    return entry


def with_hook(target: Target, indices: Tensor) -> Entry:
    """The gradient-hook way: the weight trains, its gradient is cleared off the mask."""
    weight, full_base = target.weight, target.weight.detach().clone()
    seen = [weight._version]

    def clear_off_mask(parameter: Tensor) -> None:
        if parameter.grad is not None:
            kept = kernels.gather(parameter.grad, indices)
            parameter.grad.zero_()
            kernels.overwrite_(parameter.grad, indices, kept)

    def keep_off_mask(*_: Any) -> None:
        """Weight decay shrinks entries that have no gradient, too: put those back."""
        if weight._version != seen[0]:
            kept = kernels.gather(weight, indices)
            with torch.no_grad():
                weight.copy_(full_base)
            kernels.overwrite_(weight, indices, kept)
            seen[0] = weight._version

    def restore() -> None:
        with torch.no_grad():
            weight.copy_(full_base)
        weight.grad = None

    weight.requires_grad_(True)
    base = kernels.gather(weight, indices)
    entry = Entry(target.name, weight, indices.numel(), weight, lambda: Held(indices, base, kernels.gather(weight, indices)))
    entry.undo.append(weight.register_post_accumulate_grad_hook(clear_off_mask).remove)
    for module in target.modules:
        entry.undo.append(module.register_forward_pre_hook(keep_off_mask).remove)
    entry.undo.append(restore)
    return entry
