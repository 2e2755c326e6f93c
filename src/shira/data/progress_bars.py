"""Progress bars of the libraries that we call: hidden while ours are shown."""

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["without_bars"]


@contextlib.contextmanager
def without_bars(*libraries: Any) -> Iterator[None]:
    """Inside, these libraries (transformers, datasets, diffusers) show no progress bars; afterwards they do what they did.

    The setting belongs to the whole process, so it is not left changed.
    """
    shown = [library.utils.logging for library in libraries if library.utils.logging.is_progress_bar_enabled()]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()
