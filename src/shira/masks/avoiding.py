"""Positions that must not train, because other adapters hold them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, load
from ..errors import TuningError
from ..weights.belonging import weight_of

__all__ = ["Avoid", "count_of", "entries_of"]

Avoid = Adapter | str | os.PathLike[str]


def entries_of(
    avoid: Avoid | Iterable[Avoid], tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The positions that adapters, or files of them, hold in the targets: tensor name -> int64 [n], sorted, unique; and what
    the adapters are called.

    tensors: all of the model's, by every name they have.
    Raises BaseMismatch if an adapter names another tensor or shape; FormatError or OSError for a file.
    """
    adapters: Any = [avoid] if isinstance(avoid, Adapter | str | os.PathLike) else avoid
    adapters = list(adapters) if isinstance(adapters, Iterable) and not isinstance(adapters, Mapping) else [adapters]
    for given in adapters:
        if not isinstance(given, Adapter | str | os.PathLike):
            kind = type(given).__name__
            raise TuningError(
                f'avoid must be adapters or files of them, avoid=["poet.safetensors"], found {kind} {given!r:.60}'
            )
    held: dict[int, list[Tensor]] = {}  # by identity: a tied weight has several names
    labels = []
    for number, given in enumerate(adapters, start=1):
        adapter = given if isinstance(given, Adapter) else load(given)
        label = adapter.name or (f"number {number}" if isinstance(given, Adapter) else Path(given).name)
        labels.append(label)
        for name, sparse in adapter.tensors.items():
            weight = weight_of(f"adapter {label!r} to avoid", name, sparse, tensors)
            held.setdefault(id(weight), []).append(sparse.indices.cpu().long())
    return {name: torch.cat(held[id(weight)]).unique() for name, weight in targets.items() if id(weight) in held}, labels


def count_of(positions: Mapping[str, Tensor]) -> dict[str, int]:
    """How many positions there are in each tensor."""
    return {name: indices.numel() for name, indices in positions.items()}
