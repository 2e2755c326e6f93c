"""Sparse High Rank Adapters (SHiRA, arXiv 2406.13175): train, store, switch and fuse 1-2 % of a model's own weights.

All names are imported when one is first used, so that `import shira` and the help of the commands do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import masks
    from .adapter import Adapter, load
    from .analysis.comparison import compare
    from .checkpoints.extraction import extract
    from .checkpoints.merging import merge
    from .fusion.fusing import fuse
    from .sparse.tensor import SparseTensor
    from .switching.switcher import Switcher
    from .training.tuner import Tuner
    from .training.tuning import attach

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

PLACES = {  # of the names that are imported when they are used
    "Adapter": "adapter",
    "SparseTensor": "sparse.tensor",
    "Switcher": "switching.switcher",
    "Tuner": "training.tuner",
    "attach": "training.tuning",
    "compare": "analysis.comparison",
    "extract": "checkpoints.extraction",
    "fuse": "fusion.fusing",
    "load": "adapter",
    "masks": "masks",
    "merge": "checkpoints.merging",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'shira' has no attribute {name!r}")
    if name == "masks":  # our own modules ask for it, while others are half imported
        return import_module(".masks", __name__)
    for each, place in PLACES.items():  # all together, so that shira.checkpoints.extraction and others are there, too
        globals()[each] = getattr(import_module(f".{place}", __name__), each) if each != "masks" else __getattr__(each)
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
