"""The version, and warnings about names that a later one will not have."""

import sys
import warnings

__all__ = ["__version__", "deprecated"]

__version__ = "0.1.0"


def deprecated(old: str, new: str, gone_in: str) -> None:
    """Give a DeprecationWarning, at the line outside of shira that led here, that something old still works.

    old, new: what was used, and what to use, in words. gone_in: the release in which the old one is an error, "0.3.0".
    The old one goes in that release: a test fails from then on as long as the call is there.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "shira":
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{old} is deprecated, and gone in shira {gone_in}; use {new}", DeprecationWarning, stacklevel=level)
