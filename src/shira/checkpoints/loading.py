"""The names that Transformers gives to a checkpoint's tensors when it loads them. No weights are loaded for it.

`from_pretrained` adds or removes the prefix of the model without a head, renames tensors of older layouts, and joins some, such
as those of experts. Which names result depends on the model's class. The checkpoint's configuration names one, and lists of
Transformers say which others can load it.
"""

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Loaded", "loaded_as", "ways_to_load"]

HEADS = (  # Transformers' lists of classes that a checkpoint may be loaded as, beside the one that its configuration names
    *("MODEL", "MODEL_FOR_MASKED_LM", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"),
    *("MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION"),
    *("MODEL_FOR_QUESTION_ANSWERING", "MODEL_FOR_IMAGE_CLASSIFICATION"),
)


class Loaded(NamedTuple):
    """A checkpoint as one class of Transformers loads it.

    kind: the name of the class. shapes: tensor name in memory -> its shape.
    sources: tensor name in memory -> the names in the checkpoint that it is made of: one that is renamed, or several that are
        joined. A tensor without any is new. changed: names in memory of tensors that are more than renamed.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, list[str]]
    changed: frozenset[str]


def ways_to_load(folder: Path, names: list[str]) -> Iterator[Loaded]:
    """A checkpoint as each class of Transformers that can load it, that of its configuration first.

    folder: with a config.json. names: the tensors in the checkpoint. Nothing is yielded without Transformers (5 or newer), for
    a configuration that it does not know, and for code in the checkpoint, which is not run.
    """
    if not (folder / "config.json").is_file():
        return
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # without Transformers, or for whatever a configuration of another version raises there
        return
    for kind in _classes(config):
        try:
            with torch.device("meta"), _silent():
                model = kind(config)
        except Exception:  # a class that needs another library, or another configuration, tells nothing of the names
            continue
        loaded = loaded_as(model, names)
        if loaded is not None:
            yield loaded


def loaded_as(model: nn.Module, names: Iterable[str]) -> Loaded | None:
    """A checkpoint with these tensors as Transformers loads it into a model. None for a model that is not of Transformers.

    Each is renamed as in its `convert_and_load_state_dict_in_model`.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    if not isinstance(model, PreTrainedModel):
        return None
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, list[str]] = {}
    changed = set()
    for name in names:
        there, converted = rename_source_key(name, renamings, converters, prefix, state)
        if there not in state and name in state:
            there, converted = rename_source_key(name, [], [], prefix, state)
        if there in state:
            sources.setdefault(there, []).append(name)
            if converted is not None:
                changed.add(there)
    changed |= {there for there, parts in sources.items() if len(parts) > 1}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Loaded(type(model).__name__, shapes, sources, frozenset(changed))


def _classes(config: Any) -> Iterator[Any]:
    """The classes that may load a checkpoint of this configuration, each once."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = [getattr(transformers, str(name), None) for name in getattr(config, "architectures", None) or ()]
    listed = [_listed(getattr(modeling_auto, f"{head}_MAPPING", {}), config) for head in HEADS]
    yield from dict.fromkeys(kind for kind in (*named, *listed) if isinstance(kind, type))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the advice that a class gives when a model of it is made. What other threads log is not touched."""
    here = threading.get_ident()

    def wanted(record: logging.LogRecord) -> bool:
        return record.thread != here or record.levelno >= logging.ERROR

    handlers = [handler for name in ("transformers", None) for handler in logging.getLogger(name).handlers]
    try:
        for handler in handlers:
            handler.addFilter(wanted)
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(wanted)


def _listed(mapping: Any, config: Any) -> Any:
    found = mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple | list) else found
