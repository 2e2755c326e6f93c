"""Warn if Transformers' Trainer saves the whole model while a tuner is attached, which it does without `ShiraCallback`."""

import sys
import warnings
from typing import Any

from torch import nn

__all__ = ["CheckpointWatch", "FullCheckpoint"]


class FullCheckpoint(UserWarning):
    """A Trainer saves all weights of the model, although few of their entries train."""


class CheckpointWatch:
    """A hook for `register_state_dict_pre_hook` of the model. It warns once, when a Trainer that saves asks for all weights.

    With `ShiraCallback` the model has a `save_pretrained` of its own, which asks for none.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        self.warned = False

    def __call__(self, model: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        if self.warned or "save_pretrained" in model.__dict__ or not _in_a_trainer():
            return
        self.warned = True
        whole = sum(parameter.numel() for parameter in model.parameters())
        warnings.warn(
            f"the Trainer saves the whole model, {whole:,} values, although {self.entries:,} entries train, and a run cannot "
            "resume exactly from such a checkpoint; to save adapters instead, pass callbacks=[ShiraCallback(tuner)], from "
            "shira.integrations.trainer, to the Trainer; to save none, save_strategy='no'",
            FullCheckpoint,
            stacklevel=2,
        )


def _in_a_trainer() -> bool:
    """Whether a method of Transformers' Trainer, or of a subclass such as TRL's, is running in this thread."""
    library = sys.modules.get("transformers.trainer")
    kind = getattr(library, "Trainer", None)
    frame: Any = sys._getframe(1)
    while kind is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            return True
        frame = frame.f_back
    return False
