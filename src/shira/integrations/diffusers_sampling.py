"""Diffusers: load a pipeline, and let it make pictures."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.pictures import check_caption
from ..data.quiet import quiet
from ..errors import DataError, MissingExtra
from ..weights.modes import evaluating
from .transformers import check_there

__all__ = ["load_pipeline", "modules_of", "sample", "to_the_accelerator", "version"]


def load_pipeline(name: str, dtype: str = "auto") -> Any:
    """A Diffusers pipeline: a folder, or a hub id. dtype: "float32", "bfloat16", "float16"; "auto" leaves it to Diffusers.

    Raises DataError if there is no such pipeline.
    """
    diffusers, transformers = _libraries()
    check_there(name, "model_index.json")
    try:
        with quiet(diffusers, transformers):
            return diffusers.DiffusionPipeline.from_pretrained(
                name, **({} if dtype == "auto" else {"dtype": getattr(torch, dtype)})
            )
    except (OSError, ValueError, AttributeError, ImportError) as error:
        what = "folder" if Path(name).exists() else "folder, or pipeline id that can be reached"
        said = " ".join(str(error).split())[:300]
        raise DataError(f"cannot load {name!r}: no Diffusers pipeline in that {what} ({said})") from error


def to_the_accelerator(pipe: Any) -> None:
    """Move a pipeline to the accelerator, if there is one."""
    device = torch.accelerator.current_accelerator()
    if device is not None and torch.accelerator.is_available():
        pipe.to(device)


def version() -> str:
    """The version of Diffusers."""
    return str(_libraries()[0].__version__)


@torch.no_grad()
def sample(
    pipe: Any,
    prompt: str,
    seed: int,
    *,
    steps: int = 30,
    guidance: float | None = None,
    resolution: int | None = None,
    on_step: Callable[[int], None] | None = None,
    at_step_end: Callable[..., Any] | None = None,
) -> Any:
    """One PIL image of a prompt. guidance, resolution (the side in pixels): by default the pipeline's own.

    on_step(number of the step, from 1) is called after each step; what it raises ends the work. at_step_end: in its place a
        `callback_on_step_end`, as `PipelineAdapters.in_turn` gives it.
    Raises DataError if the pipeline takes no prompt, or refuses these options.
    """
    taken = inspect.signature(pipe.__call__).parameters
    if "prompt" not in taken and not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        raise DataError(f"{type(pipe).__name__} makes no pictures of a prompt; take a text-to-image pipeline")
    check_caption("the prompt", prompt)
    options: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    options |= {} if resolution is None else {"height": resolution, "width": resolution}
    if at_step_end is not None:
        if "callback_on_step_end" not in taken:
            raise DataError(f"{type(pipe).__name__} calls nothing back after a step, so adapters cannot take turns")
        options["callback_on_step_end"] = at_step_end
    elif on_step is not None:
        options["callback_on_step_end"] = lambda _pipe, step, _time, tensors: (on_step(step + 1), tensors)[1]
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    start = torch.Generator().manual_seed(seed)
    try:
        with evaluating(modules_of(pipe)):
            return pipe(prompt=prompt, num_inference_steps=steps, generator=start, **options).images[0]
    except ValueError as error:  # a pipeline checks its inputs before the first step
        raise DataError(f"{type(pipe).__name__} makes no such picture: {error}") from error
    except RuntimeError as error:
        kinds = {name: next((p.dtype for p in part.parameters()), None) for name, part in modules_of(pipe).named_children()}
        if len(set(kinds.values()) - {None}) < 2:
            raise
        found = ", ".join(f"{name} {str(kind).removeprefix('torch.')}" for name, kind in kinds.items() if kind is not None)
        raise DataError(f"its parts have several dtypes: {found} ({error}); give them one: pipe.to(torch.float32)") from error
    finally:
        pipe.set_progress_bar_config(**(before or {}))


def modules_of(pipe: Any) -> nn.Module:
    """A module that holds the pipeline's models under their names, so that tensors are called "unet.conv_in.weight"."""
    return nn.ModuleDict({name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)})


def _libraries() -> tuple[Any, Any]:
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise MissingExtra(f"this needs diffusers: pip install 'shira-adapters[image]' ({error})") from error
    return diffusers, transformers
