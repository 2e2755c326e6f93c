"""Strengths that change from step to step of a pipeline's call, and adapters that take turns."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import AdapterError, SwitchError
from ..texts import described
from .diffusers_components import DENOISERS

__all__ = ["ByStep", "InTurn"]

Set = TypeVar("Set")


class ByStep(Generic[Set]):
    """What `PipelineAdapters.by_step` returns: a function for `callback_on_step_end`, and a `with` block around the call.

    set_step: activates what is wanted for a step of so many. now: what is set. again: sets this again.
    """

    def __init__(self, set_step: Callable[[int, int], None], now: Callable[[], Set], again: Callable[[Set], None]) -> None:
        self._set_step, self._now, self._again = set_step, now, again
        self._before = self._outside = now()
        self._called = False

    def __call__(self, pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._called = True
        if step == 0:
            self._before = self._now()
        steps = steps_of(pipe)
        if step + 1 < steps:
            self._set_step(step + 1, steps)
        else:
            self._again(self._before)
        return tensors

    def __enter__(self) -> "ByStep[Set]":
        self._before = self._outside = self._now()
        self._called = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._again(self._outside)
        if kind is None and not self._called:
            warnings.warn("the pipeline has not called back, so no strength has changed from step to step", stacklevel=2)


class InTurn(ByStep[Set]):
    """What `PipelineAdapters.in_turn` returns. each: activates one of the adapters. averaged: how many last steps have all."""

    def __init__(
        self, pipe: Any, each: Sequence[Callable[[], None]], averaged: int, now: Callable[[], Set], again: Callable[[Set], None]
    ) -> None:
        if len(each) < 2:
            raise AdapterError(f"expected two adapters or more, in_turn(['bluefire', 'paintings']); found {len(each)}")
        if type(averaged) is not int or averaged < 0:
            raise AdapterError(f"averaged must be a number of steps, a whole number from 0 on, found {described(averaged)}")
        if denoiser_of(pipe) is None:
            raise SwitchError(f"the pipeline has no {' or '.join(DENOISERS)}, whose steps adapters could share")
        super().__init__(lambda step, steps: self._activate(step % len(each)), now, again)
        self._pipe, self._each, self._averaged = pipe, each, averaged
        self._denoiser: nn.Module | None = None
        self._step = self._active = 0
        self._hook: RemovableHandle | None = None
        self._averaging = False

    def _activate(self, number: int) -> None:
        self._each[number]()
        self._active = number

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self._hook is None:
            raise SwitchError("in_turn works in its block: with adapters.in_turn(names) as at_step_end: pipe(…)")
        self._called, self._pipe = True, pipe
        if step == 0 and self._step != 0:
            ended, self._step = self._step, 0
            self._activate(0)
            raise SwitchError(
                f"the picture before ended after {ended} steps, so this one began with another adapter than the first, which "
                "is set now: call the pipeline again, and begin a new in_turn block after a picture that ends early"
            )
        self._follow()
        steps = steps_of(pipe)
        self._step = (step + 1) % steps  # 0: the next picture begins
        self._set_step(self._step, steps)
        return tensors

    def __enter__(self) -> "InTurn[Set]":
        if self._hook is not None:
            raise SwitchError("this in_turn block has begun already; for a block in it call in_turn(names) again")
        super().__enter__()
        self._step = 0
        try:
            self._activate(0)
            self._follow()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._denoiser = None
        super().__exit__(kind, error, where)

    def _follow(self) -> None:
        """Listen to the denoiser that the pipeline has now."""
        denoiser = denoiser_of(self._pipe)
        if denoiser is None or denoiser is self._denoiser:
            return
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._denoiser = denoiser.register_forward_hook(self._average, with_kwargs=True), denoiser

    def _average(self, denoiser: nn.Module, args: Any, options: Mapping[str, Any], predicted: Any) -> Any:
        """In the last steps, the mean of what the denoiser predicts with each adapter, as its output."""
        if self._averaging or denoiser is not self._denoiser or self._step < steps_of(self._pipe) - self._averaged:
            return predicted
        found, self._averaging = {self._active: predicted[0]}, True
        try:
            for number in set(range(len(self._each))) - found.keys():
                self._activate(number)
                found[number] = denoiser(*args, **options)[0]
        finally:
            self._averaging = False
        mean = torch.stack([found[number] for number in sorted(found)]).mean(0)
        return (mean, *predicted[1:]) if isinstance(predicted, tuple) else type(predicted)(mean)


def denoiser_of(pipe: Any) -> nn.Module | None:
    """The part of a pipeline that is called in each step, None if it has none."""
    return next((part for name in DENOISERS if isinstance(part := getattr(pipe, name, None), nn.Module)), None)


def steps_of(pipe: Any) -> int:
    """How many steps the scheduler of a pipeline has in the call that runs."""
    known = getattr(pipe, "num_timesteps", None)
    return len(pipe.scheduler.timesteps) if known is None else int(known)
