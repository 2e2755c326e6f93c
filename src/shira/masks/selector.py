"""Choose the entries of a model that train: by a mask, within a budget, without the entries that other adapters hold."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import masks
from ..sparse.positions import index_dtype
from ..sparse.topk import top_k
from ..weights.distributed import full, groups_of, is_sharded, same_everywhere
from ..weights.quantized import dense
from ..weights.undo import Undo
from .budgets import scores_without
from .calibration import LossFn, Progress, calibrate

__all__ = ["LEAST_MEMORY", "Indices", "Selected", "Selector"]

TRAINING_BYTES = 16  # for each entry in training: a float32 master, its gradient and AdamW's two moments
POOL_BYTES = 16  # for each entry that tensors compete for: `masks.Pool` holds up to two positions and scores for it
LEAST_MEMORY = 2**20  # bytes that sums may always take, because the peak of a process is not known more exactly

Indices = dict[str, Tensor]  # tensor name -> positions [k], sorted


class Selected(NamedTuple):
    """The chosen entries.

    indices: the positions of each weight that gets any, on its device, in the `index_dtype` of its size.
    calibrated: what `calibrate` returned; None if the mask needs no calibration.
    share: Σ |gradient| over the chosen entries, as a share of the sum over all entries of the weights, above 0 and at most 1.
        It is estimated from what the mask was shown. A mask that saw no data is taken to choose as a random one does. If it was
        not asked for, it is the share of the entries.
    """

    indices: Indices
    calibrated: dict[str, Any] | None
    share: float


@dataclass(frozen=True, eq=False)
class Selector:
    """Everything that decides a selection, except the budgets, the weights and the calibration batches that `select` takes.

    matrix_shapes: tensor name -> (rows, columns) of the matrix that the mask sees, which is a view of the weight.
    avoided: tensor name -> int64 positions that must not train, sorted and unique.
    """

    mask: str | masks.Mask
    seed: int
    matrix_shapes: Mapping[str, tuple[int, int]]
    avoided: Mapping[str, Tensor]
    loss_fn: LossFn | None

    def select(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        plan: masks.BudgetPlan,
        calibration: Iterable[Any] | None,
        progress: Progress | None = None,
        undo: Undo | None = None,
        *,
        with_share: bool = False,
    ) -> Selected:
        """Choose the entries. with_share: whether `Selected.share` is wanted. Raises MaskError, or what the model raises."""
        plan = self._that_mask_can_fill(plan)
        pool = masks.Pool(plan.shared, plan.floors)
        chosen: Indices = {}
        sums = [0.0, 0.0]  # taken, whole
        competing = sum(math.prod(self.matrix_shapes[name]) for name in weights if name not in plan.counts)

        def receive(name: str, statistics: Mapping[str, Tensor]) -> None:
            shape, avoid, count = self.matrix_shapes[name], self.avoided.get(name), plan.counts.get(name)
            weight = (full if is_sharded(weights[name]) else dense)(weights[name]).reshape(shape)
            statistics = {what: found if what == "activations" else found.reshape(shape) for what, found in statistics.items()}
            found = weight.new_empty(0, dtype=torch.int64)
            if count is None:
                scores = masks.score(self.mask, name, weight, seed=self.seed, **statistics)
                if with_share:  # of its proportion of the budget; which entries it gets is not known before all have competed
                    free = weight.numel() - (0 if avoid is None else avoid.numel())
                    found = top_k(scores_without(scores, avoid), min(free, round(plan.shared * weight.numel() / competing)))
                pool.add(name, scores, avoid)
            elif count:  # a tensor's share of a small total may be 0
                found = masks.select(self.mask, name, weight, count, seed=self.seed, avoid=avoid, **statistics)
                chosen[name] = found.to(index_dtype(weight.numel()))
            if with_share:
                sums[:] = (total + part for total, part in zip(sums, _of_gradient(statistics, shape, found), strict=True))

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
                indices = chosen[name].to(weight.device, index_dtype(math.prod(self.matrix_shapes[name])))
                placed[name] = same_everywhere(indices, groups_of(weight)) if is_sharded(weight) else indices
        share = torch.tensor([_share(sums[0], sums[1], chosen, self.matrix_shapes)], dtype=torch.float64, device="cpu")
        sharded = next((weight for weight in weights.values() if is_sharded(weight)), None)
        if with_share and sharded is not None:  # one share for all processes, as the positions are
            share = same_everywhere(share.to(sharded.device), groups_of(sharded))
        return Selected(placed, calibrated, float(share))

    def _that_mask_can_fill(self, plan: masks.BudgetPlan) -> masks.BudgetPlan:
        """The plan, if the mask can rank the entries of all tensors that share a count. Raises MaskError if it cannot.

        `rand` ranks nothing. For it the shared count is divided in proportion to the entries that may train, as in a uniform
        draw over the model.
        """
        if not plan.floors:
            return plan
        if masks.resolve(self.mask)[1] is masks.rand:
            free = {name: math.prod(self.matrix_shapes[name]) for name in plan.floors}
            free |= {name: free[name] - indices.numel() for name, indices in self.avoided.items() if name in free}
            return masks.BudgetPlan(plan.counts | masks.share_out(plan.shared, free, plan.floors), 0, {})
        masks.ranked(self.mask)
        return plan


def _share(taken: float, whole: float, chosen: Indices, shapes: Mapping[str, tuple[int, int]]) -> float:
    """taken / whole. If no gradient was seen, or sums overflow, the entries' share of all entries."""
    if 0 < whole < math.inf and taken < math.inf:
        return taken / whole
    return sum(map(Tensor.numel, chosen.values())) / max(1, sum(map(math.prod, shapes.values())))


def _of_gradient(statistics: Mapping[str, Tensor], shape: Sequence[int], found: Tensor) -> tuple[float, float]:
    """Σ |gradient| over these positions of a matrix, and over all of it, in a unit that all tensors of a selection share."""
    rows, columns = shape
    found = found.long()
    for name, size in (("gradient", torch.abs), ("squared_gradient", torch.sqrt)):
        if name in statistics:
            values = statistics[name]
            return float(size(values.reshape(-1)[found]).sum(dtype=torch.float64)), float(size(values).sum(dtype=torch.float64))
    if "activations" in statistics:  # a gradient's entry is proportional to its input; tensors count by their sizes
        norms = statistics["activations"].reshape(-1).to(found.device, torch.float64)
        inputs = norms[found % columns if norms.numel() == columns else found // columns]
        return (float(inputs.sum() / norms.mean()), float(rows * columns)) if float(norms.sum()) > 0 else (0.0, 0.0)
    return float(found.numel()), float(rows * columns)
