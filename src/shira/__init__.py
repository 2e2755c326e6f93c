"""Sparse High Rank Adapters (SHiRA, arXiv 2406.13175): train, store, switch and fuse 1-2 % of a model's own weights."""

from . import masks
from .adapter import Adapter, SparseTensor
from .analysis import compare
from .errors import (
    AdapterError,
    BaseMismatch,
    CheckpointError,
    DataError,
    FormatError,
    MaskError,
    MissingExtra,
    ShiraError,
    SwitchError,
    TargetError,
    TuningError,
)
from .extraction import extract
from .format import load
from .fusion import fuse
from .merging import merge
from .switching import Switcher
from .tuning import Tuner, attach

__all__ = [
    "Adapter",
    "AdapterError",
    "BaseMismatch",
    "CheckpointError",
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
    "extract",
    "fuse",
    "load",
    "masks",
    "merge",
]
__version__ = "0.1.0"
