"""A pipeline of Diffusers to play with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..fusion.strengths import Strength
from ..integrations.block_strengths import UNET_BLOCKS, by_block
from ..integrations.diffusers import PipelineAdapters
from ..integrations.diffusers_components import present_in
from ..integrations.diffusers_sampling import modules_of, sample
from ..weights.model_tensors import named_tensors
from .asking import Drawing, Setting
from .local import Local

__all__ = ["Pictures"]


class Pictures(Local):
    """A pipeline, and its adapters."""

    makes = "pictures"

    def __init__(self, title: str, pipe: Any, adapters: PipelineAdapters, folder: Path) -> None:
        self.title = title
        self._pipe, self._adapters = pipe, adapters
        self._parts = present_in(pipe)
        self._places: dict[str, tuple[str, str | None]] = {}  # label -> component, and part of it
        for name, module in self._parts.items():
            inner: list[str | None] = [part for part, full in UNET_BLOCKS.items() if getattr(module, full, None) is not None]
            for part in inner or [None]:
                self._places[f"{name}, {part}" if part else name] = (name, part)
        self.blocks = list(self._places)
        super().__init__(folder)

    def names(self) -> list[str]:
        return self._adapters.names

    def _watched(self) -> Mapping[str, Tensor]:
        modules = modules_of(self._pipe)
        return {**dict(modules.named_parameters()), **dict(modules.named_buffers())}

    def _weights(self) -> Mapping[str, Tensor]:
        return {f"{part}.{name}": each for part, module in self._parts.items() for name, each in named_tensors(module).items()}

    def _given(self, name: str, setting: Setting) -> Any:
        """A setting as `PipelineAdapters.set` takes it."""
        if setting.is_even:
            return setting.strength
        changed = {tensor.partition(".")[0] for tensor in self._adapter(name).tensors}
        found: dict[str, Any] = {"*": setting.strength}
        for label, factor in setting.blocks:
            component, part = self._places[label]
            if component not in changed:
                continue
            if part is None:
                found[component] = setting.strength * factor
            else:
                found.setdefault(component, {"*": setting.strength})[part] = setting.strength * factor
        return found

    def _use(self, given: Mapping[str, Any]) -> None:
        self._adapters.set(given)

    def _strength(self, name: str, setting: Setting) -> Strength:
        return by_block(name, self._given(name, setting), self._parts, list(self._adapter(name).tensors))

    def _make(self, asked: Drawing, show: Callable[[Any, str], None]) -> Any:
        return sample(
            self._pipe,
            asked.prompt,
            int(asked.seed),
            steps=int(asked.steps),
            guidance=asked.guidance or None,
            on_step=lambda step: show(None, f", step {step} of {int(asked.steps)}"),
        )

    def _register(self, name: str, file: Path) -> None:
        self._adapters.load(file, name)

    def _adapter(self, name: str) -> Adapter:
        return self._adapters.adapter(name)
