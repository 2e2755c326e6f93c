"""Train a style on a pipeline with shira or with PEFT's LoRA, by the same steps, and draw with one or two of them."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

import shira
from shira.data.pictures import Picture
from shira.integrations.diffusers import PipelineAdapters
from shira.integrations.diffusers_steps import InTurn
from shira.integrations.diffusers_training import Examples, accelerator_for, train, training_mode
from shira.integrations.diffusion_losses import TrainedComponents

from .parts import mixed_precision

TARGETS = "(?i).*(attn|attention[.]|conv).*"  # attention and all convolutions, those from and to the latents included

FILE = "adapter.safetensors"
CALIBRATION = 4  # batches that masks and `stay_near` see
LEVELS = 4  # noise levels of each picture in the validation loss


def trained(
    method: Mapping[str, Any],
    pipe: StableDiffusionPipeline,
    pictures: Sequence[Picture],
    validation: Sequence[Picture],
    folder: Path,
    *,
    side: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    avoid: Sequence[Path] = (),
    general: Sequence[Picture] = (),
    priors: Sequence[Picture] = (),
) -> dict[str, Any]:
    """Train an adapter, save it in a folder, and return what it took. The pipeline is the base again.

    method: {"lora": rank}, or options of `shira.attach`. "near": the reach of `Tuner.stay_near`, with the pictures of general.
    priors: pictures of the whole class, for prior preservation (DreamBooth).
    """
    parts = TrainedComponents(pipe)
    examples = Examples(parts, pictures, priors, resolution=side)
    checks = Examples(parts, validation, resolution=side)
    options = {"steps": steps, "learning_rate": rate, "batch_size": batch, "seed": seed}

    def fit(tuner: Any) -> dict[str, Any]:
        with training_mode(parts, checkpointing=False):
            done = train(
                tuner,
                parts,
                lambda start: examples.batches(batch, seed, start=start),
                accelerator_for(mixed_precision(), 1),
                **options,
            )
        return done | {"validation_loss": loss_of(parts, checks)}

    if "lora" in method:
        summary = _with_lora(pipe, method["lora"], seed, fit, folder)
    else:
        method = dict(method)
        near = method.pop("near", None)
        chosen = {"targets": TARGETS, "seed": seed, "avoid": list(avoid), "loss_fn": lambda model, batch: model(batch)}
        with shira.attach(parts, calibration=_first(examples, batch, seed), **(chosen | method)) as tuner:
            if near is not None:
                tuner.stay_near(_first(Examples(parts, general, resolution=side), batch, seed), reach=near)
            summary = fit(tuner)
            tuner.adapter().save(folder / FILE)
    return summary | {"file_bytes": sum(file.stat().st_size for file in folder.iterdir())}


def _first(examples: Examples, batch: int, seed: int) -> list[Any]:
    return list(itertools.islice(examples.batches(batch, seed), CALIBRATION))


def _with_lora(pipe: Any, rank: int, seed: int, fit: Any, folder: Path) -> dict[str, Any]:
    """The same training on PEFT's layers, which Diffusers puts into the UNet and takes out again."""
    before = {parameter for parameter in pipe.unet.parameters() if parameter.requires_grad}
    pipe.unet.requires_grad_(False)
    torch.manual_seed(seed)
    try:
        pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_targets(pipe.unet)), "style")
        own = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
        summary: dict[str, Any] = fit(SimpleNamespace(parameters=lambda: own, nnz=sum(p.numel() for p in own)))
        layers = get_peft_model_state_dict(pipe.unet, adapter_name="style")
        about = pipe.unet.peft_config["style"].to_dict()  # without it α = r is assumed when the file is loaded
        pipe.save_lora_weights(
            folder, unet_lora_layers={k: v.contiguous() for k, v in layers.items()}, unet_lora_adapter_metadata=about
        )
    finally:
        pipe.unload_lora_weights()
        for parameter in before:
            parameter.requires_grad_(True)
    return summary


def lora_targets(unet: Any) -> list[str]:
    """The modules whose weights `TARGETS` names."""
    kinds = (nn.Linear, nn.Conv2d)
    return [
        name for name, module in unet.named_modules() if isinstance(module, kinds) and re.fullmatch(TARGETS, f"unet.{name}")
    ]


@torch.no_grad()
def loss_of(parts: TrainedComponents, examples: Examples) -> float:
    """The loss on all pictures, each at fixed noise levels: the lower the better."""
    batches = examples.batches(len(examples.pictures), 1)
    return sum(float(parts(next(batches))) for _ in range(LEVELS)) / LEVELS


@contextlib.contextmanager
def adapted(
    pipe: Any,
    folders: Sequence[Path],
    strengths: Sequence[float],
    fusion: str = "sum",
    averaged: int | None = None,
    **options: Any,
) -> Iterator[Callable[..., Any] | None]:
    """Inside, the pipeline draws with these adapters. fusion, options: as `PipelineAdapters.set` has them; LoRAs are summed.

    averaged: they take turns in place of it, as in `PipelineAdapters.in_turn`. What is yielded is for `callback_on_step_end`.
    """
    names = [f"style{number}" for number in range(len(folders))]
    if all((folder / FILE).exists() for folder in folders):
        adapters = PipelineAdapters(pipe)
        for name, folder in zip(names, folders, strict=True):
            adapters.load(folder / FILE, name)
        if averaged is not None:
            with adapters.in_turn(names, list(strengths), averaged=averaged) as at_step_end:
                yield at_step_end
            return
        adapters.set(names, list(strengths), method=fusion, **options)
        try:
            yield None
        finally:
            adapters.set([])
        return
    try:
        for name, folder in zip(names, folders, strict=True):
            pipe.load_lora_weights(folder, adapter_name=name)
        if averaged is not None:
            each = [partial(pipe.set_adapters, name, strength) for name, strength in zip(names, strengths, strict=True)]
            with InTurn(pipe, each, averaged, lambda: None, lambda _: None) as at_step_end:
                yield at_step_end
        else:
            pipe.set_adapters(names, list(strengths))
            yield None
    finally:
        pipe.unload_lora_weights()
