"""What is to be done to have something as it was: steps, written down before the act, that may be taken any number of times.

An interrupt can come between any two lines, in the undoing too. So a step stays written down until all of them were taken, and
each must be harmless when there is nothing, or nothing any more, to undo.
"""

import functools
from collections.abc import Callable, Mapping, MutableMapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

__all__ = ["Undo", "hooks_of", "set_hook"]


class Undo:
    """Steps, the last one first. Also a context manager that takes them at its end."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def callback(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Write down a step, before what it undoes is done."""
        self._steps.append(functools.partial(step, *arguments))

    def part(self) -> "Undo":
        """Steps that can be taken by themselves; while they were not, they are some of these."""
        part = Undo()
        self.callback(part.close)
        return part

    def close(self) -> None:
        """Take all steps. Whoever is interrupted calls it again."""
        for step in reversed(self._steps):
            step()
        self._steps = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def set_hook(undo: Undo, hooks: Callable[[], Mapping[int, Any] | None], register: Callable[[Any], Any], hook: Any) -> None:
    """Register a hook that `undo` removes. hooks: where torch keeps those of its kind; a handle would come too late to be
    written down."""
    undo.callback(_drop, hooks, hook)
    register(hook)


def hooks_of(owner: nn.Module | Tensor, kind: str) -> Callable[[], Mapping[int, Any] | None]:
    """Where torch keeps hooks of a module or a tensor: "_forward_hooks", "_post_accumulate_grad_hooks", …"""
    return functools.partial(getattr, owner, kind, None)


def _drop(hooks: Callable[[], MutableMapping[int, Any] | None], hook: Any) -> None:
    known = hooks() or {}
    for number in [number for number, other in list(known.items()) if other is hook]:
        known.pop(number, None)
