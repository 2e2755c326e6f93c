"""A language model to play with."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import DataError
from ..fusion.strengths import Strength
from ..integrations.generation import Prompt, answer, is_chat
from ..switching.sources import AdapterSource
from ..switching.switcher import Switcher
from ..weights.model_tensors import named_tensors
from .asking import Setting, Words
from .local import Local

__all__ = ["Language", "layer_groups"]

LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.")  # "model.layers.12." of "model.layers.12.mlp.up_proj.weight"
PARTS = 3


def layer_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Thirds of a model's layers, by the names of its tensors: "layers 0–9" -> patterns of names, and "other".

    Nothing for a model with fewer than three layers.
    """
    names = list(names)
    numbers = sorted({int(found[1]) for name in names if (found := LAYER.match(name))})
    if len(numbers) < PARTS:
        return {}
    ends = [round(len(numbers) * part / PARTS) for part in range(PARTS + 1)]
    thirds = [numbers[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    titles = [f"layers {third[0]}–{third[-1]}" if len(third) > 1 else f"layer {third[0]}" for third in thirds]
    labels = {number: title for title, third in zip(titles, thirds, strict=True) for number in third}
    groups: dict[str, list[str]] = {title: [] for title in titles}
    for prefix, number in sorted({(found[0], int(found[1])) for name in names if (found := LAYER.match(name))}):
        groups[labels[number]].append(f"{prefix}*")
    return groups | {"other": ["*"]} if any(not LAYER.match(name) for name in names) else groups


class Language(Local):
    """A causal language model of Transformers, its tokenizer, and a switcher that has the adapters in `files` already."""

    makes = "text"

    def __init__(
        self, title: str, model: nn.Module, tokenizer: Any, switcher: Switcher, files: Mapping[str, Path | str], folder: Path
    ) -> None:
        self.title = title
        self.is_chat = is_chat(tokenizer)
        self._model, self._tokenizer, self._switcher = model, tokenizer, switcher
        self._files = {name: AdapterSource(file) for name, file in files.items()}
        self._groups = layer_groups(named_tensors(model))
        self.blocks = list(self._groups)
        super().__init__(folder)

    def names(self) -> list[str]:
        return self._switcher.names

    def _watched(self) -> Mapping[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _weights(self) -> Mapping[str, Tensor]:
        return named_tensors(self._model)

    def _use(self, given: Mapping[str, Strength]) -> None:
        self._switcher.use(given)

    def _given(self, name: str, setting: Setting) -> Strength:
        if setting.is_even:
            return setting.strength
        factors = dict(setting.blocks)
        there = list(self._adapter(name).tensors)
        found = {"*": setting.strength * factors.get("other", 1.0)}
        for label, patterns in self._groups.items():
            for pattern in patterns:
                if pattern != "*" and any(tensor.startswith(pattern[:-1]) for tensor in there):
                    found[pattern] = setting.strength * factors.get(label, 1.0)
        return found

    _strength = _given

    def _make(self, asked: Words, show: Callable[[Any, str], None]) -> str:
        if not asked.raw and not self.is_chat:
            raise DataError("this model has no chat template: let it continue the text as it is")
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            show("".join(pieces), "")

        prompt: Prompt = asked.prompt if asked.raw else [{"role": "user", "content": asked.prompt}]
        return answer(
            self._model,
            self._tokenizer,
            prompt,
            max_new_tokens=int(asked.most_tokens),
            temperature=asked.temperature,
            seed=int(asked.seed),
            on_text=take,
        )

    def _register(self, name: str, file: Path) -> None:
        self._switcher.add(name, file)
        self._files[name] = AdapterSource(file)

    def _adapter(self, name: str) -> Adapter:
        return self._files[name].read(self._weights())[0]
