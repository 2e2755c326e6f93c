"""Training a diffusion model on named pictures. It is the same for the same settings, also if it was stopped and resumed."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from shira.errors import DataError
from shira.files.paths import temporary_file

from .parts import scheduler, unet

FALL = 0.4  # the share of the steps, at the end, in which the learning rate falls


@dataclass(frozen=True)
class Settings:
    """All that decides the trained weights, beside the pictures and names."""

    concepts: int
    passes: int = 400  # pictures seen of each concept
    batch: int = 48
    rate: float = 1e-3
    seed: int = 0
    side: int = 32
    widths: tuple[int, int] = (96, 192)
    autocast: bool = True  # computes in bfloat16

    @property
    def steps(self) -> int:
        return max(1, self.concepts * self.passes // self.batch)

    def rate_at(self, step: int) -> float:
        """50 steps of warm-up, then constant; over the last 40 % it falls to 0."""
        left = (self.steps - step) / (FALL * self.steps)
        return self.rate * min(1.0, (step + 1) / 50, left)

    def go_on_from(self, kept: dict[str, Any], step: int) -> bool:
        """Whether a training with these other settings can go on here. `passes` may differ until the rate falls in one."""
        falls = (1 - FALL) * min(self.steps, replace(self, passes=kept["passes"]).steps)
        return kept | {"passes": self.passes} == asdict(self) and (kept["passes"] == self.passes or step <= falls)

    def average_at(self, step: int) -> float:
        """How much the moving average keeps. It looks back over about the last twentieth of the training."""
        return min(1 - min(1.0, 20 / self.steps), (1 + step) / (10 + step))


class Training:
    """A UNet in training, with its average and its optimizer.

    latents: [concepts, 48, side/4, side/4]; texts: [concepts, tokens, width]; no_text: [1, tokens, width], of an empty name.
    """

    def __init__(self, settings: Settings, latents: Tensor, texts: Tensor, no_text: Tensor) -> None:
        self.settings, self.latents, self.texts, self.no_text = settings, latents, texts, no_text
        self.step, self.seconds = 0, 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = unet(settings.side, settings.widths).to(memory_format=torch.channels_last)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        self._noise = scheduler()

    def run(self, seconds: float = math.inf) -> Iterator[tuple[int, float]]:
        """Train up to the last step or for so many seconds. Yields (steps done, loss) after each step."""
        start, before = time.monotonic(), self.seconds
        self.model.train()
        while self.step < self.settings.steps and time.monotonic() - start < seconds:
            loss = self._one_step()
            self.seconds = before + time.monotonic() - start
            if not math.isfinite(loss):
                raise DataError(f"the loss is {loss} at step {self.step}; try a lower learning rate")
            yield self.step, loss

    def _one_step(self) -> float:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate_at(self.step)
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step + 1)
        which = self._concepts()
        pictures, texts = self.latents[which], self.texts[which].clone()
        texts[torch.rand(s.batch, generator=generator) < 0.1] = self.no_text  # for guidance
        spread = (
            torch.arange(s.batch) + torch.rand(s.batch, generator=generator)
        ) / s.batch  # one time in each part of the range
        times = (spread * len(self._noise.alphas_cumprod)).long()
        noise = torch.randn(pictures.shape, generator=generator)
        noisy = self._noise.add_noise(pictures, noise, times).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=s.autocast):
            predicted = self.model(noisy, times, texts).sample
        variance = (1 - self._noise.alphas_cumprod[times]).clamp(min=0.05).view(-1, 1, 1, 1)
        loss = ((predicted.float() - pictures) ** 2 / variance).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - s.average_at(self.step))
        self.step += 1
        return float(loss.detach())

    def _concepts(self) -> Tensor:
        """The concepts of this step's batch: all in turn, in an order that changes with each pass over them."""
        s = self.settings
        first, found = self.step * s.batch, []
        while sum(map(len, found)) < s.batch:
            turn, at = divmod(first + sum(map(len, found)), s.concepts)
            order = torch.randperm(s.concepts, generator=torch.Generator().manual_seed(s.seed * 1_000_003 + turn))
            found.append(order[at:])
        return torch.cat(found)[: s.batch]

    def averaged(self) -> UNet2DConditionModel:
        """A UNet with the averaged weights, rounded to bfloat16 as they are published, held in float32."""
        model = unet(self.settings.side, self.settings.widths)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.average, strict=True):
                parameter.copy_(value.bfloat16())
        return model.eval()

    def save(self, path: Path) -> None:
        """All that resuming needs, 160 MB for 10 M weights."""
        state = {"settings": asdict(self.settings), "step": self.step, "seconds": self.seconds, "average": self.average}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path.parent) as (temporary, file):
            torch.save(state, file)
            file.flush()
            temporary.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a saved state. Raises DataError if it was trained with other settings (see `Settings.go_on_from`)."""
        state = torch.load(path, weights_only=True)
        if not self.settings.go_on_from(state["settings"], state["step"]):
            raise DataError(
                f"{path} was trained with {state['settings']}, not {asdict(self.settings)}; start anew with --again"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]


def train(training: Training, seconds: float, every: float, on_look: Callable[[int, float, float], None]) -> bool:
    """Run it, with on_look(step, mean loss, pictures a second) every so many seconds. Returns whether it is finished."""
    losses: list[float] = []
    looked, step_then = time.monotonic(), training.step
    for step, loss in training.run(seconds):
        losses.append(loss)
        elapsed = time.monotonic() - looked
        if elapsed > every:
            on_look(step, sum(losses) / len(losses), (step - step_then) * training.settings.batch / elapsed)
            losses, looked, step_then = [], time.monotonic(), step
    return training.step >= training.settings.steps
