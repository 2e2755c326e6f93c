"""Diffusers: train an adapter on pictures with Accelerate. The loss is in `diffusion_losses`."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.pictures import Picture, image_of, pictures_in, square
from ..errors import DataError, MissingExtra, TuningError, did_you_mean
from ..masks.calibration import nan_advice
from ..texts import shown
from ..training.tuner import Tuner
from ..weights.modes import modes_kept
from ..weights.random_numbers import seeded
from .diffusers_checkpoints import Checkpoints
from .diffusers_sampling import sample
from .diffusion_losses import TrainedComponents
from .transformers import checkpointing_of

__all__ = ["Examples", "accelerator_for", "check_resolution", "check_schedule", "class_pictures", "train", "training_mode"]

CLIP = 1.0  # the largest norm of a step's gradient
MOST_BLACK = 5  # pictures of a class, beside as many as are found
Progress = Callable[[int, int], None]


def accelerator_for(mixed_precision: str, accumulate: int, *, unused: bool = False) -> Any:
    """An Accelerator of these settings. It takes the place of one that the process has already.

    unused: some entries may get no gradient, as in the last layer of a text encoder whose second last is read.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtra(f"this needs accelerate: pip install 'shira-adapters[image]' ({error})") from error
    AcceleratorState._reset_state()  # otherwise another precision is refused
    try:
        found = DistributedDataParallelKwargs(find_unused_parameters=unused)
        options = {"kwargs_handlers": [found], "mixed_precision": mixed_precision, "gradient_accumulation_steps": accumulate}
        return Accelerator(cpu=not torch.accelerator.is_available(), **options)  # it finds processes on the CPU only if asked
    except ValueError as error:
        raise DataError(f"mixed precision {mixed_precision!r} is not possible here: {error}") from error


def check_schedule(schedule: str) -> None:
    """Raise DataError for a schedule of the learning rate that Diffusers does not have, or that needs more settings."""
    from diffusers.optimization import SchedulerType

    known = [each.value for each in SchedulerType if each.value != "piecewise_constant"]
    if schedule not in known:
        raise DataError(f"unknown schedule {schedule!r}; {did_you_mean(schedule, known)}")


def check_resolution(parts: TrainedComponents, resolution: int) -> None:
    """Raise DataError unless pictures of this side, in pixels, go through the parts of the pipeline."""
    if resolution % parts.multiple:
        below, above = (parts.multiple * (resolution // parts.multiple + more) for more in (0, 1))
        near = f"{below} or {above}" if below else str(above)
        raise DataError(f"resolution must be a multiple of {parts.multiple} for this pipeline, found {resolution}; take {near}")


def class_pictures(
    pipe: Any, prompt: str, folder: str | Path | None, count: int, *, on_picture: Progress | None = None, **options: Any
) -> list[Picture]:
    """Pictures of a class for prior preservation: those in the folder, and what the pipeline makes to have `count` of them.

    A folder is filled with what was made, so that the next run finds it. Black ones, of safety checkers, are left out.
    options: for `sample`.
    Raises DataError, before any is made, if one in the folder cannot be read; and if most are black.
    """
    place = Path(folder) if folder is not None else None
    there = place is not None and place.is_dir() and any(not path.name.startswith(".") for path in place.iterdir())
    found = pictures_in(place, prompt) if place is not None and there else []
    for picture in found if len(found) < count else ():
        image_of(picture)
    seeds, black = itertools.count(), 0
    while len(found) < count:
        seed = next(seeds)
        file = place / f"class-{seed:05d}.png" if place is not None else None
        if file is not None and file.exists():
            continue
        image = sample(pipe, prompt, seed, **options)
        if image.getbbox() is None:
            black += 1
            if black > MOST_BLACK + len(found):
                raise DataError(
                    f"{black} pictures of {shown(prompt)} are black, by the pipeline's safety checker, or by an overflow in "
                    "float16; give pictures of the class in class_data"
                )
            continue
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
        found.append(Picture(file or image, prompt))
        if on_picture is not None:
            on_picture(len(found), count)
    return found


@contextlib.contextmanager
def training_mode(parts: TrainedComponents, checkpointing: bool) -> Iterator[None]:
    """Inside, the parts are in training mode, with gradient checkpointing if wanted. Afterwards they are as before."""
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(modes_kept(parts))
        for part in parts.children() if checkpointing else ():
            on, off = checkpointing_of(part)
            afterwards.callback(off)
            on()
        parts.train()
        yield


class Examples:
    """Pictures as batches of latents and text.

    Latents and text are computed once and kept in host memory, unless they change: with random crops, and if the text encoders
    train.
    """

    def __init__(
        self,
        parts: TrainedComponents,
        pictures: Sequence[Picture],
        priors: Sequence[Picture] = (),
        *,
        resolution: int,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        drop_captions: float = 0.0,
        prior_weight: float = 1.0,
        on_picture: Progress | None = None,
    ) -> None:
        check_resolution(parts, resolution)
        self.parts, self.resolution, self.crop, self.flip = parts, resolution, crop, flip
        self.drop_captions, self.prior_weight = drop_captions, prior_weight
        self.pictures, self.priors = list(pictures), list(priors)
        self._latents: dict[tuple[int, bool], tuple[Tensor, Any]] = {}
        self._text: dict[str, dict[str, Tensor]] = {}
        self._skipped: Tensor | None = None  # stands for the latents of random crops in batches that are left out
        everything = [*self.pictures, *self.priors]
        for number, picture in enumerate(everything, start=1):
            pixels, size = square(picture, resolution, crop, torch.Generator())  # also finds broken files before training
            for flipped in (False, True)[: 1 + flip] if crop == "center" else ():
                self._latents[id(picture), flipped] = self._encoded(pixels, flipped), size
            if on_picture is not None:
                on_picture(number, len(everything))

    def batches(
        self, size: int, seed: int, process: int = 0, processes: int = 1, *, start: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches without an end, of `size` pictures, and as many of the class. Each process takes its own share.

        start: so many batches are left out, after which the others are the same as without.
        """
        generator = torch.Generator().manual_seed((seed * processes + process) % 2**63)
        orders = [_order(len(each), seed, process, processes) for each in (self.pictures, self.priors) if each]
        for number in itertools.count():
            chosen = [self.pictures[next(orders[0])] for _ in range(size)]
            weights = [1 / size] * size
            captions = [
                ""
                if self.drop_captions and float(torch.rand((), generator=generator, device="cpu")) < self.drop_captions
                else picture.caption
                for picture in chosen
            ]
            if self.priors:
                more = [self.priors[next(orders[1])] for _ in range(size)]
                chosen, captions = chosen + more, captions + [picture.caption for picture in more]
                weights += [self.prior_weight / size] * size
            batch = self._batch(chosen, captions, weights, generator, skip=number < start)
            if number >= start:
                yield batch

    def _batch(
        self, chosen: list[Picture], captions: list[str], weights: list[float], generator: torch.Generator, *, skip: bool
    ) -> dict[str, Any]:
        found = [self._draw(picture, generator, skip) for picture in chosen]
        latents = torch.stack([each for each, _ in found])
        text: Any = captions if self.parts.trains_text else self._text_of(captions)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator, device="cpu"),
            "level": self.parts.draw(len(chosen), generator),
            "weight": torch.tensor(weights),
            "text": text,
            "sizes": [size for _, size in found],
        }

    def _draw(self, picture: Picture, generator: torch.Generator, skip: bool) -> tuple[Tensor, Any]:
        flipped = self.flip and float(torch.rand((), generator=generator, device="cpu")) < 0.5
        if self.crop == "center":
            return self._latents[id(picture), flipped]
        pixels, size = square(picture, self.resolution, self.crop, generator)
        if not skip or self._skipped is None:
            self._skipped = self._encoded(pixels, flipped)
        return self._skipped, size

    def _encoded(self, pixels: Tensor, flipped: bool) -> Tensor:
        return self.parts.latents((pixels.flip(-1) if flipped else pixels)[None])[0].cpu()

    @torch.no_grad()
    def _text_of(self, captions: list[str]) -> dict[str, Tensor]:
        for caption in captions:
            if caption not in self._text:
                self._text[caption] = {key: value.cpu() for key, value in self.parts.encode([caption]).items()}
        return {key: torch.cat([self._text[caption][key] for caption in captions]) for key in self._text[captions[0]]}


def _order(count: int, seed: int, process: int, processes: int) -> Iterator[int]:
    """Numbers below `count` without an end, each once before any comes again. All processes draw the same, and share them."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    place = 0
    while True:
        for number in torch.randperm(count, generator=generator, device="cpu").tolist():
            if place % processes == process:
                yield number
            place += 1


@torch.inference_mode(False)
@torch.enable_grad()  # the caller may have turned gradients off, to make pictures
def train(
    tuner: Tuner,
    parts: TrainedComponents,
    batches: Callable[[int], Iterator[dict[str, Any]]],
    accelerator: Any,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 4,
    accumulate: int = 1,
    schedule: str = "linear",
    warmup: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, float, float], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    save_every: int = 0,
    save_folder: Path | None = None,
) -> dict[str, Any]:
    """Train the tuner's parts with AdamW, for a number of optimizer steps.

    batches: `Examples.batches` as a function of `start`. accelerator: from `accelerator_for`, with the same `accumulate`.
    schedule: any of Diffusers' ("linear", "cosine", "constant", …). warmup: the share of the steps in which the rate rises.
    on_step(step, loss, pictures per second) and after_step(step) are called after each step.
    save_every: a checkpoint is saved each time after so many steps, but not after the last one, in save_folder. If a checkpoint
        is there already, training goes on from it, and the result is the same to the bit. 0: never.
    Returns a summary for the adapter's file. Raises TuningError if the loss becomes infinite or NaN.
    """
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW(tuner.parameters(), lr=learning_rate, weight_decay=0.0)
    rates = get_scheduler(schedule, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    model, prepared = accelerator.prepare(parts, optimizer)
    saved = None if save_folder is None else Checkpoints(accelerator, tuner, rates, save_folder)
    losses: list[float] = [] if saved is None else saved.losses
    try:
        with seeded(seed, model.parameters()):  # for dropout, if a part has any
            if saved is not None:
                saved.load()
            before, started = len(losses), time.perf_counter()
            coming = batches(before * accumulate)
            for step in range(before + 1, steps + 1):
                total = 0.0
                for _ in range(accumulate):
                    with accelerator.accumulate(model):
                        loss = model(next(coming))
                        accelerator.backward(loss)
                        total += float(loss.detach()) / accumulate
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(tuner.parameters(), CLIP)
                        prepared.step()
                        prepared.zero_grad()
                if not math.isfinite(total):
                    advice = nan_advice(loss.device)
                    raise TuningError(f"the loss became {total} at step {step}; try a lower learning rate{advice}")
                rates.step()
                losses.append(total)
                if on_step is not None:
                    done = (step - before) * batch_size * accumulate * accelerator.num_processes
                    on_step(step, total, done / (time.perf_counter() - started))
                if after_step is not None:
                    after_step(step)
                if saved is not None and save_every and step % save_every == 0 and step < steps:
                    saved.save()
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "batch_size": batch_size * accumulate * accelerator.num_processes,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "prediction": parts.prediction,
        "loss": round(sum(losses[-tenth:]) / tenth, 4),
        "parameters": tuner.nnz,
        "seed": seed,
    }
