"""Calls of a switcher take turns, and none begins in the middle of another; and the blocks of `Switcher.using`."""

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import SwitchError
from .ready import BASE, CheckedSelection

__all__ = ["Block", "Blocks", "Turn"]

HERE = str(Path(__file__).parent)


class Turn:
    """The lock of a switcher: with turn(): …"""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()

    def is_taken_here(self) -> bool:
        """Whether this thread is in the middle of a call: then a signal handler runs, or a finalizer.

        That the thread owns the lock is not enough: an interrupt at the end of a call may have left it owned.
        """
        if not self._lock._is_owned():
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith(HERE):  # of the call that asks
            frame = frame.f_back
        while frame is not None:
            if frame.f_code.co_filename.startswith(HERE) and getattr(frame.f_locals.get("self"), "_turn", None) is self:
                return True
            frame = frame.f_back
        return False

    def __call__(self) -> Any:
        """The lock itself. Raises SwitchError in the middle of a call of this thread."""
        if self.is_taken_here():
            raise SwitchError(
                "this call came in the middle of another one of the same switcher, from a signal handler or a finalizer: let "
                "that set a flag, and switch after the call"
            )
        return self._lock


class Block:
    """A block of `using`. after: what will be active after it. is_left: it has ended, and `Blocks.end` was not called since."""

    after: CheckedSelection = BASE
    is_left = False


class Blocks:
    """The open blocks, in the order in which they began."""

    def __init__(self) -> None:
        self._open: list[Block] = []

    def begin(self, block: Block) -> None:
        self._open = [*self._open, block]

    def any_left(self) -> bool:
        return any(block.is_left for block in self._open)

    def end(self) -> CheckedSelection | None:
        """Forget the blocks that are left. Returns what is to be active now; None if a later block does that at its end."""
        still: list[Block] = []
        after: CheckedSelection | None = None
        for block in self._open:
            if block.is_left:
                after = block.after if after is None else after
            else:
                block.after, after = (block.after if after is None else after), None
                still.append(block)
        self._open = still
        return after
