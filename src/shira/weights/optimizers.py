"""Notification of the steps of torch's optimizers, which change weights.

One pair of hooks serves the whole process. It is registered once and never removed, because torch fails if a hook is removed
while hooks run.
"""

import contextlib
import weakref
from typing import Any, Protocol

import torch
from torch.optim import optimizer as torch_optimizer

__all__ = ["subscribe", "unsubscribe", "watch"]


class Listener(Protocol):
    """An object that is notified of steps."""

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """May raise; then the step does not happen."""

    def after(self, optimizer: torch.optim.Optimizer) -> None: ...


_listeners: "list[weakref.ref[Listener]]" = []  # without callbacks: an interrupt inside a callback would be lost
_registered: list[Any] = []


def watch() -> None:
    """Observe steps from now on. For fused optimizers, which do not increment version counters, this increments them."""
    hooks = [
        (torch_optimizer.register_optimizer_step_post_hook, _after),
        (torch_optimizer.register_optimizer_step_pre_hook, _before),
    ]
    for register, hook in hooks[len(_registered) :]:  # the second alone, if an interrupt came between them
        _registered.append(register(hook))


def subscribe(listener: Listener) -> None:
    """Notify an object of every step, until `unsubscribe`, or until the object is gone."""
    watch()
    _listeners.append(weakref.ref(listener))
    _drop([known for known in list(_listeners) if known() is None])


def unsubscribe(listener: Listener) -> None:
    """Stop notifying an object."""
    _drop([known for known in list(_listeners) if known() is listener])


def _drop(gone: "list[weakref.ref[Listener]]") -> None:
    """One at a time: meanwhile another thread may add a listener, or remove the same."""
    for known in gone:
        with contextlib.suppress(ValueError):
            _listeners.remove(known)


def _before(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for known in list(_listeners):
        listener = known()
        if listener is not None:
            listener.before(optimizer)


def _after(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([each for each in group["params"] if each.grad is not None])
    for known in list(_listeners):
        listener = known()
        if listener is not None:
            listener.after(optimizer)
