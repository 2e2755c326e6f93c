"""Which entries of which weights train: a mask, within a budget, without the entries that other adapters hold."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import masks
from .adapter import Adapter, index_dtype
from .calibration import LossFn, Progress, calibrate
from .distributed import full, groups_of, is_sharded, same_everywhere
from .errors import BaseMismatch, TuningError, did_you_mean
from .format import load
from .masks import Mask, Plan
from .quantized import dense, shape_of
from .undoing import Undo

__all__ = ["Avoid", "Selector", "count_of", "entries_of"]

TRAINING_BYTES = 16  # of an entry in training: a float32 master, its gradient and AdamW's two moments
POOL_BYTES = 16  # of an entry that tensors compete for: `masks.Pool` holds up to two positions and scores for it
LEAST_MEMORY = 2**20  # bytes that sums may always take: the peak of a process is not known any closer
Avoid = Adapter | str | os.PathLike[str]
Indices = dict[str, Tensor]  # tensor name -> positions [k], sorted


@dataclass(frozen=True, eq=False)
class Selector:
    """All that decides a selection beside the budgets, the weights and the calibration batches of the moment.

    matrices: tensor name -> the matrix [rows, columns] that the mask is told of, the weight's entries in their order.
    avoided: tensor name -> int64 positions that must not train, sorted, unique.
    """

    mask: str | Mask
    seed: int
    matrices: Mapping[str, tuple[int, int]]
    avoided: Mapping[str, Tensor]
    loss_fn: LossFn | None

    def select(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        plan: Plan,
        calibration: Iterable[Any] | None,
        progress: Progress | None = None,
        undo: Undo | None = None,
    ) -> tuple[Indices, dict[str, Any] | None]:
        """Positions for each weight that gets any, and what was calibrated (None if the mask needs nothing of that kind).

        Positions lie on the weight's device, in the dtype of positions in it. Raises MaskError, or what the model does.
        """
        plan = self._settled(weights, plan)
        pool = masks.Pool(plan.shared, plan.floors)
        chosen: Indices = {}

        def receive(name: str, statistics: Mapping[str, Tensor]) -> None:
            matrix, avoid, count = self.matrices[name], self.avoided.get(name), plan.counts.get(name)
            weight = (full if is_sharded(weights[name]) else dense)(weights[name]).view(matrix)
            statistics = {what: found if what == "activations" else found.view(matrix) for what, found in statistics.items()}
            if count is None:
                pool.add(name, masks.score(self.mask, name, weight, seed=self.seed, **statistics), avoid)
            elif count:  # the proportion of a small number may be none
                found = masks.select(self.mask, name, weight, count, seed=self.seed, avoid=avoid, **statistics)
                chosen[name] = found.to(index_dtype(weight.numel()))

        calibrated = None
        wanted = [name for name in masks.needs(masks.resolve(self.mask)[1]) if name in masks.CALIBRATED]
        if wanted and calibration is not None:
            memory = TRAINING_BYTES * sum(plan.counts.values()) + (TRAINING_BYTES - POOL_BYTES) * plan.shared
            calibrated = calibrate(
                model,
                weights,
                calibration,
                receive,
                statistics=wanted,
                loss_fn=self.loss_fn,
                memory=max(LEAST_MEMORY, memory),
                progress=progress,
                undo=undo,
            )
        else:
            for name in weights:
                receive(name, {})
        chosen |= pool.positions()
        placed = {}
        for name, weight in weights.items():
            if name in chosen:
                indices = chosen[name].to(weight.device, index_dtype(math.prod(self.matrices[name])))
                placed[name] = same_everywhere(indices, groups_of(weight)) if is_sharded(weight) else indices
        return placed, calibrated

    def _settled(self, weights: Mapping[str, nn.Parameter], plan: Plan) -> Plan:
        """The plan, if the mask can rank the entries of all tensors that share a count. `rand` ranks none: uniformly over
        the model is in proportion to the entries that may train."""
        if not plan.floors:
            return plan
        if masks.resolve(self.mask)[1] is masks.rand:
            avoided = count_of(self.avoided)
            free = {name: math.prod(self.matrices[name]) - avoided.get(name, 0) for name in plan.floors}
            return Plan(plan.counts | masks.share_out(plan.shared, free, plan.floors), 0, {})
        masks.ranked(self.mask)
        return plan


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
            misfit = f"adapter {label!r} to avoid does not fit this model"
            if name not in tensors:
                raise BaseMismatch(f"{misfit}: it has no tensor '{name}'; {did_you_mean(name, tensors)}")
            if shape_of(tensors[name]) != sparse.shape:
                found = list(shape_of(tensors[name]))
                raise BaseMismatch(f"{misfit}: '{name}' has shape {found}, the adapter expects {list(sparse.shape)}")
            held.setdefault(id(tensors[name]), []).append(sparse.indices.cpu().long())
    return {name: torch.cat(held[id(weight)]).unique() for name, weight in targets.items() if id(weight) in held}, labels


def count_of(positions: Mapping[str, Tensor]) -> dict[str, int]:
    """How many positions there are in each tensor."""
    return {name: indices.numel() for name, indices in positions.items()}
