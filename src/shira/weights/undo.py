"""Steps that undo something. Each step is recorded before the act that it undoes, and may run any number of times.

An interrupt can come between any two lines, also while steps run. So steps stay recorded until all of them have run. A step
must be harmless if its act has not happened, or is already undone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Undo", "hooks_of", "set_hook"]


class Undo:
    """A list of steps, which run in reverse order."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []
        self._inner: list[Undo] = []
        self._inside = False  # whether the `with` of this inner list is still running

    def callback(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Record a step. Call this before the act that the step undoes."""
        self._steps.append(functools.partial(step, *arguments))

    @contextlib.contextmanager
    def inner(self) -> "Iterator[Undo]":
        """Steps that run at the end of the `with`. If an interrupt prevents that, they remain steps of this object."""
        inner = Undo()
        inner._inside = True
        self._inner = [*(each for each in self._inner if each._inside or each._has_steps()), inner]
        try:
            try:
                yield inner
            finally:
                inner._inside = False
                inner.close()
        except BaseException:  # an interrupt may come inside the `finally` above, too; steps may run again
            inner._inside = False
            inner.close()
            raise

    def _has_steps(self) -> bool:
        return bool(self._steps) or any(inner._has_steps() for inner in self._inner)

    def finish_inner(self) -> None:
        """Run the steps of inner lists whose `with` an interrupt ended before all of them had run."""
        for inner in reversed(self._inner):
            if not inner._inside:
                inner.close()

    def close(self) -> None:
        """Run all steps. After an interrupt, call it again."""
        for inner in reversed(self._inner):
            inner.close()
        for step in reversed(self._steps):
            step()
        self._steps = []


def set_hook(undo: Undo, hooks: Callable[[], Mapping[int, Any] | None], register: Callable[[Any], Any], hook: Any) -> None:
    """Register a hook that `undo` removes.

    hooks: returns the dictionary in which torch keeps hooks of this kind. torch's handle cannot be used, because it exists only
    after the hook is registered, which is too late to record the step.
    """
    undo.callback(_drop, hooks, hook)
    register(hook)


def hooks_of(owner: nn.Module | Tensor, kind: str) -> Callable[[], Mapping[int, Any] | None]:
    """A function that returns the dictionary of a module's or tensor's hooks: "_forward_hooks", …"""
    return functools.partial(getattr, owner, kind, None)


def _drop(hooks: Callable[[], MutableMapping[int, Any] | None], hook: Any) -> None:
    known = hooks() or {}
    ours = [number for number, other in list(known.items()) if other is hook or getattr(other, "hook", None) is hook]
    for number in ours:
        known.pop(number, None)
