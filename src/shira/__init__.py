"""Sparse High Rank Adapters (SHiRA, arXiv 2406.13175): train, store, switch and fuse 1-2 % of a model's own weights."""

from . import masks
from .adapter import Adapter, load
from .analysis.comparison import compare
from .checkpoints.extraction import extract
from .checkpoints.merging import merge
from .errors import (
    AdapterError,
    BaseMismatch,
    CheckpointError,
    DataError,
    FormatError,
    HubError,
    MaskError,
    MissingExtra,
    ShiraError,
    SwitchError,
    TargetError,
    TuningError,
)
from .fusion.fusing import fuse
from .sparse.tensor import SparseTensor
from .switching.switcher import Switcher
from .training.tuner import Tuner
from .training.tuning import attach
from .version import __version__ as __version__

__all__ = [
    "Adapter",
    "AdapterError",
    "BaseMismatch",
    "CheckpointError",
    "DataError",
    "FormatError",
    "HubError",
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
