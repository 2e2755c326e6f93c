"""Every error that shira raises on purpose.

    ShiraError
    ├── AdapterError        positions and values that are not a valid adapter
    │   └── FormatError     a file that is not a readable shira adapter
    ├── BaseMismatch        an adapter that does not belong to this model
    ├── CheckpointError     a model checkpoint that cannot be read, compared or merged into
    ├── TargetError         target names that match nothing that can be trained
    ├── MaskError           a mask or budget that is not possible
    ├── TuningError         a call of a tuner that is not possible now, or a training run that went wrong
    ├── SwitchError         an unknown, duplicate or busy adapter in a switcher
    ├── HubError            an adapter or model that the Hugging Face Hub does not have, does not permit, or cannot be asked for
    ├── DataError           training, calibration or evaluation data, or a recipe, that cannot be used
    └── MissingExtra        an optional dependency that is not installed

Failures of the operating system (a full disk, a missing folder) stay OSError.
"""

import difflib
from collections.abc import Iterable

from .texts import visible

__all__ = [
    "AdapterError",
    "BaseMismatch",
    "CheckpointError",
    "DataError",
    "FormatError",
    "HubError",
    "MaskError",
    "MissingExtra",
    "ShiraError",
    "SwitchError",
    "TargetError",
    "TuningError",
    "did_you_mean",
]


class ShiraError(Exception):
    """The root: catch this to catch everything that shira raises on purpose.

    A message may quote files from others. It shows them as plain text, which does not control the terminal.
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class AdapterError(ShiraError):
    """Positions and values that are not a valid adapter."""


class FormatError(AdapterError):
    """A file that is not a readable shira adapter."""


class BaseMismatch(ShiraError):
    """An adapter that does not belong to this model."""


class CheckpointError(ShiraError):
    """A model checkpoint that cannot be read, compared or merged into."""


class TargetError(ShiraError):
    """Target names that match nothing that can be trained."""


class MaskError(ShiraError):
    """A mask or budget that is not possible."""


class TuningError(ShiraError):
    """A call of a tuner that is not possible now, or a training run that went wrong."""


class SwitchError(ShiraError):
    """An unknown, duplicate or busy adapter in a switcher."""


class HubError(ShiraError):
    """An adapter or model that the Hugging Face Hub does not have, does not permit, or cannot be asked for."""


class DataError(ShiraError):
    """Training, calibration or evaluation data, or a recipe, that cannot be used."""


class MissingExtra(ShiraError):
    """An optional dependency that is not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """For a mistyped word: "did you mean 'x' or 'y'?", the nearest known words; if none is near, "known: 'x', 'y', …"."""
    choices = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if not near:  # it may be near in other letters: 'WM'
        lowered = {choice.lower(): choice for choice in reversed(choices)}
        near = [lowered[each] for each in difflib.get_close_matches(word.lower(), lowered, n=3, cutoff=0.5)]
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    shown = ", ".join(repr(c) for c in choices[:12]) or "none"
    return f"known: {shown}{', …' if len(choices) > 12 else ''}"
