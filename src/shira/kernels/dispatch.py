"""Which backend serves: the fastest that can take the tensors, or the one that is forced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from . import native, reference, torch_ops

__all__ = ["BACKENDS", "backend", "backend_for"]

BACKENDS: dict[str, Any] = {"reference": reference, "torch": torch_ops}
if native.available():
    BACKENDS["native"] = native
_forced: ContextVar[str | None] = ContextVar("shira_backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend by name: "reference", "torch", or "native" (tensors on the CPU only) where it was built."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backend_for(*tensors: Tensor) -> Any:
    forced = _forced.get()
    return BACKENDS[forced] if forced else native if native.available(*tensors) else torch_ops
