"""The base that a command is given by a name: a language model, or a Diffusers pipeline."""

from collections.abc import Collection
from pathlib import Path

from torch import nn

from ..errors import DataError
from ..files import hub
from ..integrations.transformers import load_model

__all__ = ["is_pipeline", "load_base", "pipeline_part"]

INDEX = "model_index.json"  # of a pipeline's folder


def is_pipeline(name: str) -> bool:
    """Whether a folder, or what the hub has under a name, is a Diffusers pipeline. Of the hub one small file is asked for."""
    if Path(name).exists() or not hub.MODEL.fullmatch(name):
        return (Path(name) / INDEX).is_file()
    known = hub.cached(name)
    return (known is not None and (known / INDEX).is_file()) or hub.downloaded(name, INDEX) is not None


def load_base(name: str, dtype: str, tensors: Collection[str]) -> nn.Module:
    """The base of adapters that change these tensors: `pipeline_part`, or a language model.

    dtype: as for `load_model`, and for `load_pipeline`. Raises DataError if there is no such model or pipeline.
    """
    part = pipeline_part(name, dtype, tensors)
    return load_model(name, dtype) if part is None else part


def pipeline_part(name: str, dtype: str, tensors: Collection[str]) -> nn.Module | None:
    """The part of a pipeline that the names of these tensors are of; None if no pipeline has this name.

    Names that begin with a component ("unet.…") are of the pipeline as a whole, others of its denoiser.
    dtype: as for `load_pipeline`. Raises DataError if the pipeline cannot be loaded, or has no denoiser.
    """
    from ..integrations.diffusers_components import COMPONENTS, DENOISERS

    starts = {tensor.partition(".")[0] for tensor in tensors}
    if not (Path(name) / INDEX).is_file() and (starts.isdisjoint(COMPONENTS) or not is_pipeline(name)):
        return None
    from ..integrations.diffusers_sampling import load_pipeline, modules_of

    parts = modules_of(load_pipeline(name, dtype))
    if not starts.isdisjoint(COMPONENTS):
        return parts
    for each, part in parts.named_children():
        if each in DENOISERS:
            return part
    raise DataError(f"{name} has no {' or '.join(DENOISERS)}, which the adapters' tensors could be of")
