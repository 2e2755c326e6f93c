"""The source of a switcher's adapter: memory, or a file, which is read again when it is needed again.

An adapter of the hub is such a file, in the cache.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, prefixed, read
from ..errors import AdapterError
from ..files.hub import repository
from ..files.paths import State, path_of
from ..files.suggestions import adapter_in
from ..weights.quantized import shape_of

__all__ = ["AdapterSource"]

SETTLED = 50_000_000  # nanoseconds after a change to a file; a further change is then certain to get another time stamp


class AdapterSource:
    """An adapter, or the file or the hub's name of one. Raises AdapterError for anything else.

    prefix: what is put before each name in a file, "unet." if the model is a part of the switcher's model.
    """

    def __init__(self, adapter: Adapter | str | os.PathLike[str], prefix: str = "") -> None:
        call = "switcher.add('poet', 'poet.safetensors')"
        self._content = adapter if isinstance(adapter, Adapter) else path_of(adapter, call, AdapterError)
        self._label = str(self._content) if isinstance(self._content, Path) else ""
        if isinstance(self._content, Path) and repository(self._content.as_posix()):
            self._content = adapter_in(self._content)  # this commit, also if the hub gets another one
        if isinstance(self._content, Path):
            self._content = self._content.absolute()  # it is read again later, when the working folder may be another one
        self._prefix = prefix
        self._found: tuple[Any, ...] | None = ()  # the state of files or tensors when last read; None if it proves nothing
        self._checked: tuple[Any, ...] | None = None  # their state when they were last checked against the model

    def label(self, name: str) -> str:
        """The adapter's name in messages."""
        return repr(name) if isinstance(self._content, Adapter) else self._label

    def read(self, weights: Mapping[str, Tensor]) -> tuple[Adapter, bool]:
        """The adapter, and whether its content may differ from the content that was checked.

        weights: of the switcher's model, for files that hold no shapes.
        The state is that of the opened file, so it does not matter if another file takes its name meanwhile. A file that was
        changed just before may change again with the same time stamp, so it is checked the next time as well.
        """
        if isinstance(self._content, Adapter):
            self._found = self._content.check()
            is_new = self._found != self._checked
            return prefixed(self._content, self._prefix) if self._prefix else self._content, is_new
        now = time.time_ns()
        is_first = self._checked is None
        adapter, found = read(self._content, model=lambda: self._shapes(weights), decoded=is_first)  # kernels also take gaps
        self.accept(found)
        is_settled = all(state.changed < now - SETTLED for state in found)
        is_new = found != self._checked
        if is_new and not is_first:
            for tensor in adapter.tensors.values():
                _ = tensor.indices  # decoded and checked now
        self._found = found if is_settled else None
        return prefixed(adapter, self._prefix) if self._prefix else adapter, is_new

    def accept(self, found: tuple[State, ...]) -> None:
        """Called with the states of the files that were read. A subclass may refuse them with an error."""

    def _shapes(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a file for this model may name, without data: the weights may hold another adapter's values now."""
        found: dict[int, Tensor] = {}  # one for all names of a tied weight
        for weight in weights.values():
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            found[id(weight)] = torch.empty(shape_of(weight), dtype=dtype, device="meta")
        mine = ((name, weight) for name, weight in weights.items() if name.startswith(self._prefix))
        return {name.removeprefix(self._prefix): found[id(weight)] for name, weight in mine}

    def note_checked(self) -> None:
        """Record that the content that was read last belongs to the model."""
        self._checked = self._found

    def forget_check(self) -> None:
        """Let the content be checked again, because the model has changed."""
        self._checked = None
