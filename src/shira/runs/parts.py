"""The options that several kinds of recipe share, as dataclasses to inherit from: those of the mask, and those of a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from .. import masks
from ..adapter import opened
from ..errors import TargetError
from ..texts import strict_json
from ..weights.targets import Target, by_pattern, is_conv1d, resolve
from .options import option, parse_layers, parse_targets

__all__ = ["Masked", "Run", "check_mask", "describe_targets"]

LARGEST_TRIAL = 2**22  # entries of a weight on which a mask is tried
MANY_NAMES = 8  # that a line lists
LARGER = (2**31, 2**31)  # a shape larger than that of any matrix


@dataclasses.dataclass(frozen=True)
class Masked:
    """Which entries train: mask, budgets and targets."""

    mask: str = option("wm", "The mask: wm, snip, block:by=snip,size=8, …; see `shira masks`.", "attach", group="Mask")
    density: float | None = option(None, "Share of each target's entries that train; 0.01 by default.", "attach", gt=0, le=1)
    rank: int | None = option(None, "In place of --density: the entries of a LoRA of this rank.", "attach", ge=1)
    total: int | None = option(None, "In place of --density: so many entries in all targets together.", "attach", ge=1)
    scope: Literal["tensor", "model"] = option("tensor", "model ranks the entries of all targets in one list.", "attach")
    floor: float = option(0.0, "With --scope model, each target keeps this share of its budget.", "attach", ge=0, le=1)
    overrides: dict[str, Any] | None = option(
        None, """Budgets by name, as JSON: '{"down_proj": 0.02, "q_proj": {"rank": 4}}'.""", "attach", parse=strict_json
    )
    avoid: list[str] | None = option(None, "No entry of this adapter's file trains. May be given more than once.", "attach")
    targets: str | list[str] = option(
        "all-linear",
        "Names with commas, all-linear, attention, mlp, auto, or a regular expression.",
        "attach",
        parse=parse_targets,
    )
    exclude: list[str] | None = option(None, "Names to leave out, with commas.", "attach", parse=lambda text: text.split(","))
    layers: list[int] | None = option(None, "Numbers of the layers: 3, or 4-11, or 0,2,4-7.", "attach", parse=parse_layers)


@dataclasses.dataclass(frozen=True)
class Run:
    """The steps of a run, and what its file says."""

    accumulate: int = option(1, "The number of batches a step.", "trainer", ge=1)
    schedule: str = option("linear", "The learning rate schedule of Transformers: linear, cosine and others.", "trainer")
    warmup: float = option(0.0, "Share of the steps in which the learning rate rises.", "trainer", ge=0, le=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "The model's dtype. auto: the checkpoint's.")
    seed: int = option(0, "The seed of the mask and of the order of the examples.", "attach, trainer", ge=0)
    name: str = option("", "The adapter's name. It is the data's if none is given.", group="Results")
    license: str | None = option(None, "The adapter's licence. The file holds it.")


def describe_targets(recipe: Masked, model: nn.Module, density: float = 0.01) -> str:
    """What a recipe trains of a model, in a line. The model may be without data. density: where the recipe gives no budget.

    Raises what `attach` would raise for targets and budgets.
    """
    names: dict[str, Any] = {"exclude": recipe.exclude or (), "layers": recipe.layers}
    chosen = resolve(model, recipe.targets, **names)
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
    return f"{'; '.join(told)}; {sum(plan.counts.values()) + plan.shared:,} of their {entries:,} entries"


def _try_mask(recipe: Masked, chosen: list[Target], counts: Mapping[str, int]) -> None:
    """Raise the MaskError of a mask whose options do not fit: it is tried on random values of the smallest target's shape."""
    _, function = masks.resolve(recipe.mask)
    if recipe.scope == "model" and function is not masks.rand:
        masks.ranked(recipe.mask)
    smallest = min(chosen, key=lambda target: target.weight.numel())
    rows, columns = smallest.matrix
    count = counts.get(smallest.name, 0)
    if not count or rows * columns > LARGEST_TRIAL:
        return
    values = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(0))
    of_inputs = torch.ones(rows, 1) if any(is_conv1d(module) for module in smallest.modules) else torch.ones(columns)
    statistics = {name: of_inputs if name == "activations" else values[1] for name in masks.CALIBRATED}
    wanted: dict[str, Any] = {name: statistics[name] for name in masks.needs(function) if name in statistics}
    masks.select(recipe.mask, smallest.name, values[0] - 0.5, count, **wanted)


def check_mask(recipe: Masked) -> None:
    """Check mask, budgets, and the files to avoid before a model is loaded: raise what `attach` would raise later."""
    masks.resolve(recipe.mask)
    density = recipe.density or (None if recipe.rank or recipe.total else 0.01)
    masks.plan({"any": LARGER}, density=density, rank=recipe.rank, total=recipe.total, scope=recipe.scope, floor=recipe.floor)
    overrides = {f"overrides: {name}": budget for name, budget in (recipe.overrides or {}).items()}
    masks.plan(dict.fromkeys(overrides, LARGER), density=0.01, overrides=overrides)
    for file in recipe.avoid or ():
        with opened(file):
            pass
