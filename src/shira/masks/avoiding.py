"""Positions that must not train, because other adapters hold them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, load
from ..errors import TuningError
from ..texts import is_several
from ..weights.belonging import check_adapter, weight_of
from ..weights.model_tensors import named_tensors

__all__ = ["Avoid", "positions_to_avoid"]

Avoid = Adapter | str | os.PathLike[str]


def positions_to_avoid(
    avoid: Avoid | Iterable[Avoid], model: nn.Module, targets: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The positions that the adapters to avoid hold in the targets, and the labels of these adapters.

    avoid: adapters, or files of them. targets: tensor name -> weight.
    Returns tensor name -> int64 [n], sorted and unique; and a label for each adapter.
    Raises BaseMismatch if the model lacks a tensor of an adapter, or has it in another shape; TuningError if `avoid` holds
    anything else; FormatError or OSError for a file.
    """
    adapters: Any = [avoid] if isinstance(avoid, Adapter | str | os.PathLike) else avoid
    adapters = list(adapters) if is_several(adapters) else [adapters]
    for given in adapters:
        if not isinstance(given, Adapter | str | os.PathLike):
            kind = type(given).__name__
            raise TuningError(
                f'avoid must be adapters or files of them, avoid=["poet.safetensors"], found {kind} {given!r:.60}'
            )
    tensors = named_tensors(model) if adapters else {}
    held: dict[int, list[Tensor]] = {}  # keyed by identity, because a tied weight has several names
    labels = []
    for number, given in enumerate(adapters, start=1):
        adapter = given if isinstance(given, Adapter) else load(given)
        label = adapter.name or (f"number {number}" if isinstance(given, Adapter) else Path(given).name)
        check_adapter(f"adapter {label!r} to avoid", adapter)
        labels.append(label)
        for name, sparse in adapter.tensors.items():
            weight = weight_of(f"adapter {label!r} to avoid", name, sparse, tensors)
            held.setdefault(id(weight), []).append(sparse.indices.cpu().long())
    return {name: torch.cat(held[id(weight)]).unique() for name, weight in targets.items() if id(weight) in held}, labels
