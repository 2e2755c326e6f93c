"""Where a switcher's adapters come from: memory, or files that are read again when they are needed again."""

import os
from pathlib import Path

from .adapter import Adapter
from .format import load

__all__ = ["Source"]


class Source:
    """Where an adapter comes from: memory, or a file, which is read again when it is needed again."""

    def __init__(self, adapter: Adapter | str | os.PathLike[str]) -> None:
        self._content = adapter if isinstance(adapter, Adapter) else Path(adapter)
        self._found: tuple[int, ...] = ()  # the file's state when it was last read
        self._checked: tuple[int, ...] | None = None  # and when it was last found to belong to the model

    def label(self, name: str) -> str:
        return repr(name) if isinstance(self._content, Adapter) else str(self._content)

    def read(self) -> tuple[Adapter, bool]:
        """The adapter, and whether it is another than the one that was checked."""
        if isinstance(self._content, Adapter):
            return self._content, self._checked is None
        status = self._content.stat()
        self._found = (status.st_ino, status.st_size, status.st_mtime_ns)
        return load(self._content), self._found != self._checked

    def is_checked(self) -> None:
        self._checked = self._found

    def check_again(self) -> None:
        """The model is another now."""
        self._checked = None
