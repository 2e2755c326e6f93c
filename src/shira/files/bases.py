"""The base that a file names, where it is on this machine: the names and shapes of its tensors. Nothing is downloaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, device, nn

from .checkpoint import Checkpoint
from .hub import MODEL, cached

__all__ = ["named_base", "skeleton_of"]

CONFIG = "config.json"


def named_base(name: str) -> Mapping[str, Tensor] | None:
    """The tensors of a base by its name: a path, or a hub id in the cache of huggingface_hub; None if it is neither.

    Of a hub id only the configuration is read: the tensors are on the meta device, with their names in memory.
    Raises CheckpointError and OSError for a checkpoint that is there and cannot be read.
    """
    if "\0" in name:
        return None
    if os.path.exists(name):
        return Checkpoint(name)
    try:
        folder = cached(name) if MODEL.fullmatch(name) else None
    except (ImportError, OSError):  # no huggingface_hub, so no cache either; or too long a name
        return None
    return _described(folder) if folder is not None and (folder / CONFIG).is_file() else None


def skeleton_of(config: Any) -> nn.Module | None:
    """The model that a configuration of Transformers describes, on the meta device; None if it names no class of it."""
    import transformers

    named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or [])
    kind = next((each for each in named if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel)), None)
    if kind is None:
        return None
    with device("meta"):
        built: nn.Module = kind(config)
    return built.eval()


def _described(folder: Path) -> Mapping[str, Tensor] | None:
    """The tensors that a folder's configuration describes; None if Transformers cannot make the model, or is not installed."""
    try:
        from transformers import AutoConfig

        model = skeleton_of(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except Exception:  # Transformers raises whatever a configuration brings it to
        return None
    return None if model is None else model.state_dict()
