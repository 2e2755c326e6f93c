"""Which entries of which weights train: a mask, within a budget, without the entries that other adapters hold."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import masks
from .adapter import Adapter, index_dtype
from .calibration import LossFn, stream_gradients
from .errors import BaseMismatch, did_you_mean
from .format import load
from .masks import Mask, Plan

__all__ = ["Avoid", "Selector", "count_of", "entries_of"]

Avoid = Adapter | str | os.PathLike[str]
Indices = dict[str, Tensor]  # tensor name -> positions [k], sorted


@dataclass(frozen=True, eq=False)
class Selector:
    """All that decides a selection beside the budgets, the weights and the calibration batches of the moment.

    avoided: tensor name -> int64 positions that must not train, sorted, unique.
    """

    mask: str | Mask
    seed: int
    avoided: Mapping[str, Tensor]
    loss_fn: LossFn | None

    def select(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], plan: Plan, calibration: Iterable[Any] | None
    ) -> Indices:
        """Positions for each weight that gets any, from one pass over the calibration batches (if the mask needs them).

        They lie on the weight's device, in the dtype of positions in it. Raises MaskError, or what the model does.
        """
        plan = self._settled(weights, plan)
        pool = masks.Pool(plan.shared, plan.floors)
        chosen: Indices = {}

        def receive(name: str, gradient: Tensor | None) -> None:
            avoid = self.avoided.get(name)
            if plan.counts.get(name) == 0:
                return  # its proportion of a small number
            if name in plan.counts:
                chosen[name] = masks.select(
                    self.mask, name, weights[name], plan.counts[name], gradient=gradient, seed=self.seed, avoid=avoid
                )
            else:
                pool.add(name, masks.score(self.mask, name, weights[name], gradient=gradient, seed=self.seed), avoid)

        if "gradient" in masks.needs(masks.resolve(self.mask)[1]) and calibration is not None:
            stream_gradients(model, weights, calibration, receive, self.loss_fn)
        else:
            for name in weights:
                receive(name, None)
        chosen |= pool.positions()
        return {
            name: chosen[name].to(weight.device, index_dtype(weight.numel()))
            for name, weight in weights.items()
            if name in chosen
        }

    def _settled(self, weights: Mapping[str, nn.Parameter], plan: Plan) -> Plan:
        """The plan, if the mask can rank the entries of all tensors that share a count. `rand` ranks none: uniformly over
        the model is in proportion to the entries that may train."""
        if not plan.floors:
            return plan
        if masks.resolve(self.mask)[1] is masks.rand:
            avoided = count_of(self.avoided)
            free = {name: weights[name].numel() - avoided.get(name, 0) for name in plan.floors}
            return Plan(plan.counts | masks.share_out(plan.shared, free, plan.floors), 0, {})
        masks.ranked(self.mask)
        return plan


def entries_of(
    avoid: Avoid | Iterable[Avoid], tensors: Mapping[str, Tensor], targets: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The positions that adapters, or files of them, hold in the targets: tensor name -> int64 [n], sorted, unique; and what
    the adapters are called.

    tensors: all of the model's, by name. Raises BaseMismatch if an adapter names another tensor or shape; FormatError or
    OSError for a file.
    """
    adapters = [avoid] if isinstance(avoid, Adapter | str | os.PathLike) else list(avoid)
    held: dict[str, list[Tensor]] = {}
    labels = []
    for number, given in enumerate(adapters, start=1):
        adapter = given if isinstance(given, Adapter) else load(given)
        label = adapter.name or (f"number {number}" if isinstance(given, Adapter) else Path(given).name)
        labels.append(label)
        for name, sparse in adapter.tensors.items():
            misfit = f"adapter {label!r} to avoid does not fit this model"
            if name not in tensors:
                raise BaseMismatch(f"{misfit}: it has no tensor '{name}'; {did_you_mean(name, tensors)}")
            if tuple(tensors[name].shape) != sparse.shape:
                found = list(tensors[name].shape)
                raise BaseMismatch(f"{misfit}: '{name}' has shape {found}, the adapter expects {list(sparse.shape)}")
            held.setdefault(name, []).append(sparse.indices.cpu().long())
    return {name: torch.cat(held[name]).unique() for name in targets if name in held}, labels


def count_of(positions: Mapping[str, Tensor]) -> dict[str, int]:
    """How many positions there are in each tensor."""
    return {name: indices.numel() for name, indices in positions.items()}
