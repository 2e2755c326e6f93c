"""Strengths that change from step to step of a pipeline's call."""

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = ["ByStep"]

Set = TypeVar("Set")


class ByStep(Generic[Set]):
    """What `PipelineAdapters.by_step` returns: a function for `callback_on_step_end`, and a `with` block around the call.

    set_step: activates what is wanted for a step of so many. now: what is set. again: sets this again.
    """

    def __init__(self, set_step: Callable[[int, int], None], now: Callable[[], Set], again: Callable[[Set], None]) -> None:
        self._set_step, self._now, self._again = set_step, now, again
        self._before, self._called = now(), False

    def __call__(self, pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._called = True
        if step == 0:
            self._before = self._now()
        known = getattr(pipe, "num_timesteps", None)
        steps = len(pipe.scheduler.timesteps) if known is None else known
        if step + 1 < steps:
            self._set_step(step + 1, steps)
        else:
            self._again(self._before)
        return tensors

    def __enter__(self) -> "ByStep[Set]":
        self._before, self._called = self._now(), False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._again(self._before)
        if kind is None and not self._called:
            warnings.warn("the pipeline has not called back, so no strength has changed from step to step", stacklevel=2)
