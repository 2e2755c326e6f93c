"""The benchmarks and the experiments: a checkout of the source has them, an installed wheel does not."""

import importlib
import sys
from pathlib import Path
from typing import Any

__all__ = ["CHECKOUT", "has", "module"]

CHECKOUT = Path(__file__).parents[3]  # the root folder, if this is a checkout


def has(package: str) -> bool:
    """Whether this is a checkout with that package. An installed package of the same name does not count."""
    return (CHECKOUT / package / "__init__.py").is_file()


def module(name: str) -> Any:
    """Import a module of the checkout. Raises ModuleNotFoundError if something that it imports is not installed."""
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(name)
