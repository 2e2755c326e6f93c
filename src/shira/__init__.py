"""Sparse High Rank Adapters (SHiRA, arXiv 2406.13175): train, store, switch and fuse 1-2 % of a model's own weights."""

from . import masks
from .adapter import Adapter, SparseTensor
from .analysis import compare
from .errors import (
    AdapterError,
    BaseMismatch,
    DataError,
    FormatError,
    MaskError,
    MissingExtra,
    ShiraError,
    SwitchError,
    TargetError,
    TuningError,
)
from .format import load
from .fusion import fuse
from .switching import Switcher
from .tuning import Tuner, attach

__all__ = [
    "Adapter",
    "AdapterError",
    "BaseMismatch",
    "DataError",
    "FormatError",
    "MaskError",
    "MissingExtra",
    "ShiraError",
    "SparseTensor",
    "SwitchError",
    "Switcher",
    "TargetError",
    "Tuner",
    "TuningError",
    "attach",
    "compare",
    "fuse",
    "load",
    "masks",
]
__version__ = "0.1.0"
