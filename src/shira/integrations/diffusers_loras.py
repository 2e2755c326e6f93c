"""Diffusers: a sparse adapter of a LoRA file, the largest entries of what it adds to the weights of a pipeline.

Diffusers itself reads the file (its own keys, PEFT's, kohya's) and fuses it. Before that, `lora_layers` compares what it has
read with the file. Then the pipeline gets its weights back.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from ..checkpoints import extraction
from ..errors import DataError, FormatError, ShiraError
from ..files.metadata import base_facts
from ..files.paths import path_of
from ..sparse.tensor import dtype_name
from ..texts import shown
from ..weights.model_tensors import unwrapped
from ..weights.owners import claim
from .diffusers_components import COMPONENTS
from .diffusers_sampling import modules_of
from .lora_layers import LoraLayer, as_in_the_file, check_encoders, layers_of

__all__ = ["check", "convert"]

FILE = "pytorch_lora_weights.safetensors"  # Diffusers' name for one in a folder
NAME = "converted"  # Diffusers' name for the LoRA, while it is in the pipeline


@torch.no_grad()
def convert(
    file: str | os.PathLike[str],
    pipe: Any,
    *,
    density: float | None = None,
    keep: float | None = None,
    scope: extraction.Scope = "tensor",
    name: str | None = None,
    license: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Adapter:
    """The largest entries of what a LoRA adds to a pipeline's denoiser and text encoders, as an adapter of deltas in float32.

    file: a .safetensors file that `pipe.load_lora_weights` takes, or a folder with pytorch_lora_weights.safetensors. Each layer
        has the scale that the file says, alpha / rank, also where Diffusers takes that of another layer.
    pipe: the pipeline, best in float32, since Diffusers adds the LoRA in the dtype of the weights. A copy of its weights is
        kept meanwhile. Afterwards it is the same, bit for bit.
    density, keep, scope: as in `shira.extract`: the share of entries to take, or the share of ‖ΔW‖ to keep. One of the first
        two is needed, since the change of a LoRA is dense.

    Each name of a tensor begins with its component, as `PipelineAdapters.load` takes it.
    Raises MaskError without density or keep; DataError for what Diffusers cannot load, for DoRA of kohya, LoHa, LoKr and others
    that are no plain LoRA, if layers of the file are not in the pipeline, if it is compiled, or if it holds a LoRA already.

        shira.integrations.diffusers_loras.convert("bluefire-lora.safetensors", pipe, keep=0.9).save("bluefire.safetensors")
    """
    path = path_of(file, "convert('lora.safetensors', pipe, keep=0.9)", FormatError)
    check(path, density, keep, scope, name, license)
    if not hasattr(pipe, "load_lora_weights") or not hasattr(pipe, "fuse_lora"):
        raise DataError(f"{type(pipe).__name__} takes no LoRA; give the pipeline that it was trained on")
    if any(pipe.get_list_adapters().values()):
        raise DataError("the pipeline holds a LoRA already; call pipe.unload_lora_weights() first")
    model = _components(pipe)
    _check_plain(model)
    file_in = _file_in(path)
    layers = layers_of(file_in)
    check_encoders(file_in, layers, dict(model.named_children()))
    claim(model, "", DataError)  # with an adapter in it, it is not the base
    before = {tensor: weight.clone() for tensor, weight in model.state_dict().items()}
    try:
        _fuse(file_in, pipe, layers, model)
        options: dict[str, Any] = {"density": density, "keep": keep, "scope": scope, "license": license}
        extracted = extraction.extract(
            before, model.state_dict(), kind="delta", name=name or path.stem, on_progress=on_progress, **options
        )
    finally:
        pipe.unload_lora_weights()
        for tensor, weight in model.state_dict().items():
            weight.copy_(before[tensor])
    facts = extracted.metadata
    base = base_facts(pipe.config.get("_name_or_path") or None, {dtype_name(before[each].dtype) for each in extracted.tensors})
    return Adapter(extracted.tensors, facts | {"base": base, "training": {"lora": path.name}})


def check(
    path: Path,
    density: float | None,
    keep: float | None,
    scope: extraction.Scope = "tensor",
    name: str | None = None,
    license: str | None = None,
) -> None:
    """Check what `convert` is given beside the pipeline, and raise what it raises."""
    extraction.check_options(density, keep, scope, "delta", name, license, dense=f"{path} is a LoRA")
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")


def _file_in(path: Path) -> Path:
    """The file that a path means. Raises DataError for a folder without one of Diffusers' name."""
    if not path.is_dir() or (path / FILE).is_file():
        return path / FILE if path.is_dir() else path
    others = [shown(file.name) for file in sorted(path.glob("*.safetensors"))][:5]
    found = f"give one of its files: {', '.join(others)}" if others else "and no other .safetensors file"
    raise DataError(f"there is no {FILE} in the folder {path}; {found}")


def _check_plain(model: nn.Module) -> None:
    """Raise DataError for parts where Diffusers does not find the layers of a LoRA, or weights to add it to."""
    compiled = next((name for name, part in model.named_modules() if part is not unwrapped(part)), None)
    if compiled is not None:
        raise DataError(
            f"pipe.{compiled} is compiled, where Diffusers finds no layer of a LoRA; give the pipeline without that"
        )
    absent = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if absent is not None:
        raise DataError(
            f"'{absent}' has no data here, as after enable_sequential_cpu_offload; call pipe.remove_all_hooks() first"
        )


def _fuse(path: Path, pipe: Any, layers: Mapping[str, LoraLayer], model: nn.Module) -> None:
    """Let Diffusers add the LoRA to the weights. Raises DataError if it cannot, or if it adds another."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise it warns of each component that the LoRA does not change
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # of PEFT, about scales that `as_in_the_file` mends
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=NAME, local_files_only=True)
        if not any(NAME in each for each in pipe.get_list_adapters().values()):
            raise DataError(f"Diffusers found no LoRA for {type(pipe).__name__} in {path}")
        as_in_the_file(path, layers, model, NAME)
        pipe.fuse_lora(components=list(pipe.get_list_adapters()))
        pipe.unload_lora_weights()
    except (ShiraError, MemoryError):
        raise
    except Exception as error:  # files are of many makers, and Diffusers fails in many ways
        raise DataError(
            f"Diffusers cannot put {path} into {type(pipe).__name__}: "
            f"{' '.join(str(error).split())[:300] or type(error).__name__}; give the pipeline that it was trained on"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _components(pipe: Any) -> nn.Module:
    """A module with what `PipelineAdapters` changes."""
    return nn.ModuleDict({name: part for name, part in modules_of(pipe).named_children() if name in COMPONENTS})
