"""Which backend runs for which tensors: C on the CPU, Triton on a GPU, torch's operators where these are missing."""

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from . import reference, torch_ops
from .cpu import native
from .gpu import ops as gpu
from .plan import WritePlan

__all__ = ["BACKENDS", "NotCompiled", "backend", "backend_for", "backend_of"]

BACKENDS: dict[str, Any] = {"reference": reference, "torch": torch_ops}
if native.available():
    BACKENDS["native"] = native
_warned = False  # of missing kernels in C
_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


class NotCompiled(UserWarning):
    """The kernels in C were not built, so torch's operators do their work on the CPU, more slowly."""


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
    """The backend for tensors of one device. Warns (`NotCompiled`) once in a process where the kernels in C are missing."""
    global _warned
    forced = _forced.get()
    if forced:
        return gpu if forced == "triton" else BACKENDS[forced]
    if native.available(*tensors):
        return native
    if gpu.available(*tensors):
        return gpu
    if not native.built() and not _warned and all(tensor.device.type == "cpu" for tensor in tensors):
        _warned = True
        warnings.warn(
            "shira was installed without its kernels in C, so torch's operators do their work: the results are the same, and "
            "switching and training are slower; to have the kernels, install a C compiler and then shira again",
            NotCompiled,
            stacklevel=3,
        )
    return torch_ops


def backend_of(plan: WritePlan) -> Any:
    """The backend of a plan."""
    if _forced.get() is None and plan.on_cpu and native.available():
        return native
    return backend_for(*(write.weight for write in plan.writes))
