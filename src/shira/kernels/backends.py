"""Which backend runs for which tensors: C on the CPU, Triton on a GPU, torch's operators where these are missing."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from . import reference, torch_ops
from .cpu import native
from .gpu import ops as gpu
from .plan import WritePlan

__all__ = ["BACKENDS", "backend", "backend_for", "backend_of"]

BACKENDS: dict[str, Any] = {"reference": reference, "torch": torch_ops}
if native.available():
    BACKENDS["native"] = native
_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend by name: "reference", "torch", "native" or "triton".

    "native" exists only where it was built, and takes tensors on the CPU. "triton" takes tensors on a GPU; in Triton's
    interpreter it takes tensors on any device.
    """
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backend_for(*tensors: Tensor) -> Any:
    """The backend for tensors of one device."""
    forced = _forced.get()
    if forced:
        return gpu if forced == "triton" else BACKENDS[forced]
    return native if native.available(*tensors) else gpu if gpu.available(*tensors) else torch_ops


def backend_of(plan: WritePlan) -> Any:
    """The backend of a plan."""
    if _forced.get() is None and plan.on_cpu and native.available():
        return native
    return backend_for(*(part.weight for part in plan.parts))
