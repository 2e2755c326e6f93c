"""A live model with adapters in it. What can be wrong with them is found before the weights are read."""

import contextlib
import os
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..adapter import opened
from ..fusion.strengths import Strength, check_strengths, strengths_of
from ..integrations import transformers as hf
from ..sparse.tensor import dtype_name
from ..switching.switcher import Switcher
from ..weights.belonging import check_adapter, weight_of
from ..weights.model_tensors import named_tensors

__all__ = ["InSoftware", "check_files", "check_fit", "load_live", "warn_if_mixed_is_slow", "warn_if_slow"]

Files = Mapping[str, str | os.PathLike[str]]  # name -> file or folder


class InSoftware(UserWarning):
    """A half precision that was chosen is one that this CPU computes in software."""


def warn_if_slow(model: nn.Module, asked: str) -> None:
    """Warn (`InSoftware`) if a model has its checkpoint's dtype, as nobody asked for another, and this CPU lacks it."""
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if asked == "auto" and hf.in_software(found):
        warnings.warn(
            f"the checkpoint is {dtype_name(found)}, for which this processor has no instructions: --dtype float32 is several "
            "times as fast here and takes twice the memory; an adapter fits the model in either dtype",
            InSoftware,
            stacklevel=3,
        )


def warn_if_mixed_is_slow(mixed_precision: str) -> None:
    """Warn (`InSoftware`) if computing in "bf16" or "fp16" takes longer here than "no"."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    if hf.in_software(half):
        warnings.warn(
            f"this processor has no instructions for {dtype_name(half)}: --mixed-precision no is several times as fast here",
            InSoftware,
            stacklevel=3,
        )


def check_files(files: Files, strengths: Mapping[str, Strength]) -> None:
    """Check the adapters in files, all but their values, and their strengths.

    Raises FormatError or OSError for a file; AdapterError for a strength that is not possible, or that names no tensor.
    """
    fixed = check_strengths(strengths)
    for name, file in files.items():
        with opened(file) as adapter:
            check_adapter(str(file), adapter)
            if name in fixed:
                strengths_of(str(file), fixed[name], adapter.tensors)


def load_live(model: str, files: Files, dtype: str = "auto") -> tuple[nn.Module, Switcher]:
    """A causal language model, and a switcher with these adapters; the base is active. An accelerator is used if there is one.

    Before the weights are read, each adapter's values are checked, and its names and shapes are compared with the model's.
    Raises DataError if there is no such model; FormatError, OSError or BaseMismatch for an adapter. Warns as `warn_if_slow`.
    """
    check_fit(model, files)
    loaded = hf.load_model(model, dtype)
    warn_if_slow(loaded, dtype)
    if torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    switcher = Switcher(loaded)
    for name, file in files.items():
        switcher.add(name, file)
    return loaded, switcher


def check_fit(model: str, files: Files) -> None:
    """Compare the adapters' names and shapes with the model's configuration, without its weights.

    Raises DataError if there is no such model; FormatError, OSError or BaseMismatch for an adapter.
    """
    config = hf.load_config(model)
    tensors = {}
    if getattr(config, "quantization_config", None) is None:  # quantized weights have shapes of their own
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a model that needs data to be built
            tensors = named_tensors(hf.causal_skeleton(model))
    for file in files.values():
        with opened(file) as adapter:
            for name, sparse in adapter.tensors.items():
                if tensors:
                    weight_of(str(file), name, sparse, tensors)
