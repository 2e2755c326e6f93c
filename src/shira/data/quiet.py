"""Progress bars and retries of the libraries that we call: hidden while our own progress bars and errors are shown."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

__all__ = ["quiet"]

LOGGERS = ("huggingface_hub.utils._http", "diffusers.pipelines.pipeline_utils")
RETRIES = ("thrown while requesting", "Retrying in", "Couldn't connect to the Hub")  # our error follows if none succeeds


@contextlib.contextmanager
def quiet(*libraries: Any) -> Iterator[None]:
    """Inside, these libraries (transformers, datasets, diffusers) show no progress bars, and the hub's library no retries.

    Afterwards they do what they did: the settings belong to the whole process.
    """
    shown = [library.utils.logging for library in libraries if library.utils.logging.is_progress_bar_enabled()]
    try:
        for each in shown:
            each.disable_progress_bar()
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_is_no_retry)
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(_is_no_retry)
        for each in shown:
            each.enable_progress_bar()


def _is_no_retry(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in RETRIES)
