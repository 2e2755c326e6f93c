"""A figure that is drawn inside a `with`, in a window that needs no screen, and saved as a PNG at its end."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["figure"]


@contextlib.contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Yields the axes, as `matplotlib.pyplot.subplots` does with these options."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(rows, columns, layout="constrained", **options)
    try:
        yield axes
        for each in made.axes:
            each.spines[["top", "right"]].set_visible(False)
        made.savefig(path, dpi=120)
    finally:
        plt.close(made)
