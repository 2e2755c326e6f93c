"""What touches weights, behind one dispatch: `reference` says what is right, the others say it faster.

Switching works on a plan, a flat list of `Write`s over all tensors of a model, so that a device may do it all in one
launch. `backend("reference")` forces a backend inside a `with`; the tests run every backend on the same cases.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import cpu, reference

__all__ = ["Write", "backend", "gather", "overwrite_", "sampled_gradient"]

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}
_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


class Write(NamedTuple):
    """One tensor's part of a plan."""

    weight: Tensor  # any shape, contiguous
    indices: Tensor  # [k], on the weight's device
    values: Tensor  # [k], the weight's dtype and device


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend by name: "reference" or "cpu"."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _implementation() -> ModuleType:
    return BACKENDS[_forced.get() or "cpu"]


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """The entries of `weight` at `indices` [k], as a new tensor [k]."""
    values: Tensor = _implementation().gather(weight, indices)
    return values


def overwrite_(plan: Iterable[Write]) -> None:
    """Write every part of a plan in place, bit for bit, in its order."""
    for write in plan:
        _implementation().overwrite_(*write)


def sampled_gradient(grad_output: Tensor, input: Tensor, indices: Tensor) -> Tensor:
    """(grad_outputᵀ · input) at flat positions; grad_output [tokens, out], input [tokens, in]; float32 [k]."""
    gradient: Tensor = _implementation().sampled_gradient(grad_output, input, indices)
    return gradient
