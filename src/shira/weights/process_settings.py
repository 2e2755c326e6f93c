"""Settings that belong to the whole process, and that a library sets for a while, also where calls overlap in threads."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

__all__ = ["for_all_inside"]


def for_all_inside(
    setting: Callable[[], AbstractContextManager[None]],
) -> Callable[[], AbstractContextManager[None]]:
    """A context manager of a setting: of calls that overlap, the first one sets it, and the last one sets it back.

    If each call set back what it had found, then a call that began inside another one, and ended after it, would leave what
    the other one had set.
    """
    lock, inside, last = threading.Lock(), 0, contextlib.ExitStack()

    @functools.wraps(setting)
    @contextlib.contextmanager
    def shared() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                last.enter_context(setting())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    last.close()

    return shared
