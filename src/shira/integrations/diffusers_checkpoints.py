"""Checkpoints of training with Accelerate: what has been trained, and all that decides how it goes on, without the base."""

import pickle
import shutil
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files.paths import CHECKPOINT
from ..training.tuner import Tuner

__all__ = ["Checkpoints"]


class Checkpoints:
    """Saves checkpoints in a folder, and loads the last one. A new one replaces that before it once it is whole.

    accelerator: has prepared the optimizer. rates: the schedule of the learning rate.
    losses: those of all steps so far.
    """

    def __init__(self, accelerator: Any, tuner: Tuner, rates: Any, folder: Path) -> None:
        self.losses: list[float] = []
        self._accelerator, self._folder = accelerator, folder
        accelerator.register_for_checkpointing(rates, tuner, self)
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())  # the tuner has its own
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses[:] = state["losses"]

    def load(self) -> None:
        """Load the last checkpoint, if there is one. Raises TuningError or BaseMismatch if it is of other weights or a mask."""
        self._accelerator.wait_for_everyone()
        if found := self._found():
            try:
                self._accelerator.load_state(str(found[-1]))
            except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                said = " ".join(str(error).split())[:300]
                raise DataError(f"{found[-1]} cannot be read ({said}); remove {self._folder} to begin anew") from error

    def save(self) -> None:
        """Save a checkpoint after the present step."""
        unfinished = self._folder / "unfinished"
        if self._accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(unfinished))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            before = self._found()
            unfinished.rename(self._folder / f"checkpoint-{len(self.losses)}")
            for old in before:
                shutil.rmtree(old)

    def _found(self) -> list[Path]:
        """The checkpoints in the folder, the last one at the end."""
        found = {int(name[1]): path for path in self._folder.iterdir() if (name := CHECKPOINT.fullmatch(path.name))}
        return [found[step] for step in sorted(found)]
