"""What a checkout of the source has beside the package, and an installed wheel has not: the benchmarks and the experiments."""

import importlib
import sys
from pathlib import Path
from typing import Any

__all__ = ["CHECKOUT", "has", "module"]

CHECKOUT = Path(__file__).parents[3]  # where this is one


def has(package: str) -> bool:
    """Whether this is a checkout with that package; one of the same name that is installed from elsewhere does not count."""
    return (CHECKOUT / package / "__init__.py").is_file()


def module(name: str) -> Any:
    """A module of the checkout. Raises ModuleNotFoundError for what it imports and is not installed."""
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(name)
