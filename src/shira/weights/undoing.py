"""What is to be done to have something as it was: steps, written down before the act, that may be taken any number of times.

An interrupt can come between any two lines, in the undoing too. So a step stays written down until all of them were taken, and
each must be harmless when there is nothing, or nothing any more, to undo.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Undo", "hooks_of", "set_hook"]


class Undo:
    """Steps, the last one first."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []
        self._parts: list[Undo] = []
        self._inside = False  # of the `with` that it is a part in

    def callback(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Write down a step, before what it undoes is done."""
        self._steps.append(functools.partial(step, *arguments))

    @contextlib.contextmanager
    def part(self) -> "Iterator[Undo]":
        """Steps that are taken at the end of the `with`; if an interrupt does not let them be taken, they are some of these."""
        part = Undo()
        part._inside = True
        self._parts = [*(each for each in self._parts if each._inside or each._is_left()), part]
        try:
            try:
                yield part
            finally:
                part._inside = False
                part.close()
        except BaseException:  # an interrupt may come in the lines above, of all places; a step bears to be taken again
            part._inside = False
            part.close()
            raise

    def _is_left(self) -> bool:
        return bool(self._steps) or any(part._is_left() for part in self._parts)

    def finish_parts(self) -> None:
        """Take the steps of parts that were left by an interrupt before all were taken."""
        for part in reversed(self._parts):
            if not part._inside:
                part.close()

    def close(self) -> None:
        """Take all steps. Whoever is interrupted calls it again."""
        for part in reversed(self._parts):
            part.close()
        for step in reversed(self._steps):
            step()
        self._steps = []


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
    ours = [number for number, other in list(known.items()) if other is hook or getattr(other, "hook", None) is hook]
    for number in ours:
        known.pop(number, None)
