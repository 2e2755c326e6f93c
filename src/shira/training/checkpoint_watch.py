"""Warn if the whole model is saved while a tuner is attached, where the file will not be what the user wants."""

import sys
import warnings
from typing import Any

from torch import nn

__all__ = ["CheckpointWatch", "FullCheckpoint", "LowRankLeftOut", "warn_of_low_rank"]


class FullCheckpoint(UserWarning):
    """A Trainer saves all weights of the model, although few of their entries train."""


class LowRankLeftOut(UserWarning):
    """The low-rank part of a hybrid training is not in what is saved or kept."""


class CheckpointWatch:
    """A hook for `register_state_dict_pre_hook` of the model. It warns once, when a Trainer that saves asks for all weights.

    With `ShiraCallback` the model has a `save_pretrained` of its own, which asks for none.
    low_rank: whether a low-rank part trains, which is in no weight: then it also warns of `save_pretrained`.
    """

    def __init__(self, entries: int, *, low_rank: bool) -> None:
        self.entries, self.low_rank = entries, low_rank
        self.warned = False

    def __call__(self, model: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        if self.low_rank and _in("save_pretrained"):
            warn_of_low_rank("save_pretrained writes")
        if self.warned or "save_pretrained" in model.__dict__ or not _in_a_trainer():
            return
        self.warned = True
        whole = sum(parameter.numel() for parameter in model.parameters())
        warnings.warn(
            f"the Trainer saves the whole model, {whole:,} values, although {self.entries:,} entries train, and a run cannot "
            "resume exactly from such a checkpoint, nor load its best one (load_best_model_at_end); to save adapters instead, "
            "pass callbacks=[ShiraCallback(tuner)], from shira.integrations.trainer, to the Trainer; to save none, "
            "save_strategy='no'",
            FullCheckpoint,
            stacklevel=2,
        )


def warn_of_low_rank(what: str) -> None:
    """what: begins the sentence, "save_pretrained writes"."""
    warnings.warn(
        f"{what} the weights with their trained entries, without the low-rank part, which is in no weight; "
        "tuner.save_hybrid(folder) saves both",
        LowRankLeftOut,
        stacklevel=4,
    )


def _in(name: str) -> bool:
    """Whether a function of this name is running in this thread."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back
    return False


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
