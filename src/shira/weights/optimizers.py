"""What optimizers of torch do to weights, seen from their steps: one pair of hooks for the whole process, put on once and never
taken off, since to take one off while others run is an error of torch's."""

import weakref
from typing import Any, Protocol

import torch
from torch.optim import optimizer as torch_optimizer

__all__ = ["Steps", "forget", "tell", "watch"]


class Steps(Protocol):
    """Who wants to know of steps."""

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """May raise, and the step is not taken."""

    def after(self, optimizer: torch.optim.Optimizer) -> None: ...


_told: "list[weakref.ref[Steps]]" = []  # without callbacks, in which an interrupt would be lost
_on: list[Any] = []


def watch() -> None:
    """See steps from now on: fused ones, which move no version counter, move it."""
    if not _on:
        _on.append(torch_optimizer.register_optimizer_step_post_hook(_after))
        torch_optimizer.register_optimizer_step_pre_hook(_before)


def tell(steps: Steps) -> None:
    """Tell somebody of every step, until `forget`, or until they are gone."""
    watch()
    _told[:] = [known for known in _told if known() is not None] + [weakref.ref(steps)]


def forget(steps: Steps) -> None:
    """Tell them no more."""
    _told[:] = [known for known in _told if known() is not steps]


def _before(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for known in list(_told):
        steps = known()
        if steps is not None:
            steps.before(optimizer)


def _after(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([each for each in group["params"] if each.grad is not None])
    for known in list(_told):
        steps = known()
        if steps is not None:
            steps.after(optimizer)
