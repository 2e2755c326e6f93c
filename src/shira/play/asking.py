"""What a person asks for on the page, and what the page shows of the answer. It knows no model."""

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import AdapterError, DataError
from ..texts import shown

__all__ = ["MOST", "Chosen", "Drawing", "Place", "Setting", "Shown", "Words", "chosen_from"]

MOST = 1.5  # the end of a slider


@dataclass(frozen=True)
class Setting:
    """The strength of one adapter, and a factor on it for each block that has one."""

    strength: float
    blocks: tuple[tuple[str, float], ...] = ()

    @property
    def is_even(self) -> bool:
        """Whether all blocks have the same strength."""
        return all(factor == 1 for _, factor in self.blocks)


Chosen = Mapping[str, Setting]  # name of an adapter -> its setting


def chosen_from(strengths: Mapping[str, Any], blocks: Mapping[str, Mapping[str, Any]]) -> dict[str, Setting]:
    """The adapters that have an effect, from the values of the sliders.

    Raises AdapterError unless each strength, and each factor of a block, is a number from 0 to 1.5.
    """
    found = {}
    for name, strength in strengths.items():
        factors = tuple((block, _slid(f"{name}, {block}", value)) for block, value in blocks.get(name, {}).items())
        setting = Setting(_slid(name, strength), factors)
        if setting.strength and (setting.is_even or any(factor for _, factor in factors)):
            found[name] = setting
    return found


def _slid(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
        raise AdapterError(f"the strength of {shown(what)} must be a number from 0 to {MOST}, found {shown(value)}")
    return float(value)


def _within(what: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if wrong or not least <= value <= most or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise DataError(f"{what} must be {kind} from {least:,} to {most:,}, found {shown(value)}")


def _written(prompt: Any) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("there is no prompt: write one first")


@dataclass(frozen=True)
class Words:
    """A text that is asked for. raw: continue the prompt as it is, without a chat template. Raises DataError."""

    prompt: str
    raw: bool = False
    most_tokens: int = 80
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _written(self.prompt)
        _within("the number of tokens", self.most_tokens, 1, 4096, whole=True)
        _within("the temperature", self.temperature, 0, 2)
        _within("the seed", self.seed, 0, 2**31 - 1, whole=True)


@dataclass(frozen=True)
class Drawing:
    """A picture that is asked for. guidance 0: the pipeline's own. Raises DataError."""

    prompt: str
    steps: int = 20
    guidance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _written(self.prompt)
        _within("the number of steps", self.steps, 1, 1000, whole=True)
        _within("the guidance", self.guidance, 0, 30)
        _within("the seed", self.seed, 0, 2**31 - 1, whole=True)


@dataclass(frozen=True)
class Shown:
    """What is known of both sides so far: texts, or pictures. milliseconds: of the switch to the adapters."""

    base: Any = None
    adapted: Any = None
    note: str = ""
    milliseconds: float | None = None


class Place(Protocol):
    """A model with adapters, here or on a server. Several people may use it at a time; each call brings its own settings.

    title: of the model. makes: "text" or "pictures". is_chat: whether the model takes messages of a chat, None if that is not
    known. blocks: names of the parts that may have a strength of their own.
    """

    title: str
    makes: str
    is_chat: bool | None
    blocks: list[str]

    def names(self) -> list[str]:
        """The names of the adapters that can be chosen now."""
        ...

    def run(self, asked: Any, chosen: Chosen, stop: threading.Event) -> Iterator[Shown]:
        """What base and adapted model make, as it comes. Set stop to end it."""
        ...
