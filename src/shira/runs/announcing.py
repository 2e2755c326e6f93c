"""What a recipe will train, found on a model without data, and said before the weights are read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import masks
from ..adapter import opened
from ..errors import TargetError
from ..weights.targets import Target, by_pattern, is_conv1d, resolve
from .recipes import PAPERS, usual_targets
from .shared_options import Masked

__all__ = ["what_trains"]

LARGEST_TRIAL = 2**22  # entries of a weight on which a mask is tried
MANY_NAMES = 8  # that a line lists


def what_trains(recipe: Masked, model: nn.Module, density: float = 0.01) -> str:
    """What a recipe trains of a model, in a line. The model may be without data. density: where the recipe gives no budget.

    Raises what `attach` would raise for targets and budgets.
    """
    if recipe.start is not None:
        with opened(recipe.start) as adapter:
            return f"the {adapter.nnz:,} entries of {recipe.start}, from its values, in {len(adapter.tensors):,} tensors"
    names: dict[str, Any] = {"exclude": recipe.exclude or (), "layers": recipe.layers}
    targets = usual_targets(model) if recipe.targets is None else recipe.targets
    chosen = resolve(model, targets, **names)
    shapes = {target.name: target.budget_shape for target in chosen}
    budgets = {name: getattr(recipe, name) for name in ("density", "rank", "total", "scope", "floor")}
    if not (recipe.density or recipe.rank or recipe.total):
        budgets["density"] = density
    plan = masks.plan(shapes, overrides=by_pattern(shapes, recipe.overrides or {}), **budgets)
    _try_mask(recipe, chosen, plan.counts)
    try:
        linear = {target.name for target in resolve(model, "all-linear")}
    except TargetError:  # a model without any
        linear = set()
    found: dict[bool, dict[str, None]] = {True: {}, False: {}}  # the last parts of the names
    for target in chosen:
        parts = target.name.removesuffix(".weight").split(".")
        while len(parts) > 1 and parts[-1].isdigit():
            parts.pop()
        found[target.name in linear][parts[-1]] = None
    of_linear = sum(target.name in linear for target in chosen)
    told = [f"{of_linear} of {len(linear)} linear layers: {', '.join(found[True])}"] if of_linear else []
    if found[False]:
        others = list(found[False])
        few = ", ".join(others[:MANY_NAMES]) + ", …" * (len(others) > MANY_NAMES)
        told.append(f"{len(chosen) - of_linear} other tensors: {few}")
    entries = sum(target.weight.numel() for target in chosen)
    if recipe.targets is None and targets != PAPERS:
        told.insert(0, f"all-linear, as the model does not have all of {', '.join(PAPERS)}")
    return f"{'; '.join(told)}; {sum(plan.counts.values()) + plan.shared:,} of their {entries:,} entries"


def _try_mask(recipe: Masked, chosen: list[Target], counts: Mapping[str, int]) -> None:
    """Raise the MaskError of a mask whose options do not fit: it is tried on random values of the smallest target's shape."""
    _, function = masks.resolve(recipe.mask)
    if recipe.scope == "model" and function is not masks.rand:
        masks.ranked(recipe.mask)
    smallest = min(chosen, key=lambda target: target.weight.numel())
    rows, columns = smallest.matrix_shape
    count = counts.get(smallest.name, 0)
    if not count or rows * columns > LARGEST_TRIAL:
        return
    values = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(0))
    of_inputs = torch.ones(rows, 1) if any(is_conv1d(module) for module in smallest.modules) else torch.ones(columns)
    statistics = {name: of_inputs if name == "activations" else values[1] for name in masks.CALIBRATED}
    wanted: dict[str, Any] = {name: statistics[name] for name in masks.needs(function) if name in statistics}
    masks.select(recipe.mask, smallest.name, values[0] - 0.5, count, **wanted)
