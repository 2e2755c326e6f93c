"""Slow work in a thread of its own, as an iterator of what is known so far."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

__all__ = ["Stopped", "Turn", "streamed"]

Item = TypeVar("Item")
LOOK = 0.1  # seconds between two looks at whether someone who waits has left


class Stopped(Exception):
    """The person has stopped the work, or has left."""


class _End(NamedTuple):
    error: BaseException | None


def streamed(work: Callable[[Callable[[Item], None]], None], stop: threading.Event) -> Iterator[Item]:
    """Run work(show) in a thread, and yield what it shows. If more is shown than is taken, only the newest is yielded.

    The thread goes on until `work` returns, so what it has to restore is restored. stop is set if nobody takes the rest. When
    `work` finds stop set it raises Stopped, and the iterator ends. Any other exception of `work` is raised here.
    """
    shown: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()

    def run() -> None:
        error: BaseException | None = None
        try:
            work(shown.put)
        except Stopped:
            pass
        except BaseException as raised:  # it belongs to the one who waits
            error = raised
        shown.put(_End(error))

    threading.Thread(target=run, name="shira play", daemon=True).start()
    try:
        while True:
            taken = [shown.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    taken.append(shown.get_nowait())
            items = [each for each in taken if not isinstance(each, _End)]
            if items:
                yield items[-1]
            if isinstance(end := taken[-1], _End):
                if end.error is not None:
                    raise end.error
                return
    finally:
        stop.set()


class Turn:
    """One after the other: a lock that somebody who waits for it can give up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def taken(self, stop: threading.Event, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Take the turn. waiting() is called once if it is not free. Raises Stopped if stop is set before it is."""
        if not self._lock.acquire(blocking=False):
            waiting()
            while not self._lock.acquire(timeout=LOOK):
                if stop.is_set():
                    raise Stopped
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def if_free(self) -> Iterator[bool]:
        """Take the turn only if it is free at once; says whether it was."""
        free = self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()
