"""Notification of the steps of torch's optimizers, which change weights.

One pair of hooks serves the whole process. It is registered once and never removed, because torch fails if a hook is removed
while hooks run.
"""

import weakref
from typing import Any, Protocol

import torch
from torch.optim import optimizer as torch_optimizer

__all__ = ["Steps", "forget", "tell", "watch"]


class Steps(Protocol):
    """An object that is notified of steps."""

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """May raise; then the step does not happen."""

    def after(self, optimizer: torch.optim.Optimizer) -> None: ...


_told: "list[weakref.ref[Steps]]" = []  # without callbacks: an interrupt inside a callback would be lost
_on: list[Any] = []


def watch() -> None:
    """Observe steps from now on. For fused optimizers, which do not increment version counters, this increments them."""
    if not _on:
        _on.append(torch_optimizer.register_optimizer_step_post_hook(_after))
        torch_optimizer.register_optimizer_step_pre_hook(_before)


def tell(steps: Steps) -> None:
    """Notify an object of every step, until `forget`, or until the object is gone."""
    watch()
    _told[:] = [known for known in _told if known() is not None] + [weakref.ref(steps)]


def forget(steps: Steps) -> None:
    """Stop notifying an object."""
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
