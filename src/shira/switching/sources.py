"""Where an adapter of a switcher comes from: memory, or a file, which is read again when it is needed again."""

import os
import time

from ..adapter import Adapter, read
from ..errors import AdapterError
from ..files.paths import State, path_of

__all__ = ["AdapterSource"]

SETTLED = 50_000_000  # nanoseconds after which a further change to a file is sure to get another time


class AdapterSource:
    """An adapter, or the file of one. Raises AdapterError for anything else."""

    def __init__(self, adapter: Adapter | str | os.PathLike[str]) -> None:
        call = "switcher.add('poet', 'poet.safetensors')"
        self._content = adapter if isinstance(adapter, Adapter) else path_of(adapter, call, AdapterError)
        self._found: tuple[State, ...] | None = ()  # the files' state when they were last read; None if it tells nothing
        self._checked: tuple[State, ...] | None = None  # and when they were last found to belong to the model

    def label(self, name: str) -> str:
        """What to call it in a message."""
        return repr(name) if isinstance(self._content, Adapter) else str(self._content)

    def read(self) -> tuple[Adapter, bool]:
        """The adapter, and whether it may be another than the one that was checked.

        The state is that of what was opened, so it does not matter what takes the file's name meanwhile. A file that had only
        just been changed may be changed again without another time, so it is checked the next time as well.
        """
        if isinstance(self._content, Adapter):
            return self._content, self._checked is None
        now = time.time_ns()
        adapter, found = read(self._content)
        is_settled = all(state[-1] < now - SETTLED for state in found)
        is_new = found != self._checked
        self._found = found if is_settled else None
        return adapter, is_new

    def is_checked(self) -> None:
        """What was read last belongs to the model."""
        self._checked = self._found

    def check_again(self) -> None:
        """The model is another now."""
        self._checked = None
