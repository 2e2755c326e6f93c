"""Adapters in vLLM without a server.

from shira.serving.vllm.offline import llm, sampling
engine, catalogue = llm("SmolLM2-135M", adapters="adapters")
engine.generate(prompts, sampling(catalogue, "poet:1.0+coder:0.5", max_tokens=32))
"""

import os
import time
from typing import Any

from ..catalogue import SETTLED, Catalogue, shapes_of
from ..selections import ServedSelection, UnknownAdapter
from ..settings import Settings
from .environment import FIELD, check_version, classes, installed_version, variables

__all__ = ["llm", "sampling"]


def llm(
    model: str,
    *,
    adapters: str | os.PathLike[str],
    quantum: int = Settings.quantum,
    patience: float = Settings.patience,
    ready: int = Settings.ready,
    **kwargs: Any,
) -> tuple[Any, Catalogue]:
    """A vllm.LLM that serves the adapters of a folder, and their catalogue.

    quantum, patience, ready: as the options of `shira serve` (docs/serving.md). kwargs: of vllm.LLM.
    The environment of this process is changed, because vLLM's other processes learn from it.
    Raises MissingExtra without vLLM; ShiraError for a version that was not tested, or a folder that is not there.
    """
    check_version(installed_version())
    catalogue = Catalogue(adapters, [model], shapes_of(model))
    catalogue.scan()
    chosen = Settings(model=model, adapters=os.fspath(adapters), quantum=quantum, patience=patience, ready=ready)
    os.environ.update(variables(chosen))
    from vllm import LLM

    return LLM(model, **classes(), **kwargs), catalogue


def sampling(catalogue: Catalogue, selection: str | None = None, **kwargs: Any) -> Any:
    """vllm.SamplingParams with a selection: "poet", "poet:1.0+coder:0.5", None for the base. kwargs: of SamplingParams.

    Raises UnknownAdapter and SelectionError.
    """
    from vllm import SamplingParams

    extra = dict(kwargs.pop("extra_args", None) or {})
    extra[FIELD] = "" if selection is None else _resolved(catalogue, selection).key
    return SamplingParams(extra_args=extra, **kwargs)


def _resolved(catalogue: Catalogue, selection: str) -> ServedSelection:
    """The selection of a text. For a name that is not known the folder is looked at again."""
    try:
        return catalogue.resolve(selection)
    except UnknownAdapter:
        time.sleep(SETTLED)
        catalogue.scan()
        return catalogue.resolve(selection)
