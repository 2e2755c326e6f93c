"""The options that several kinds of recipe share, as dataclasses to inherit from: those of the mask, and those of a run."""

import dataclasses
from typing import Any, Literal

from ..errors import DataError
from ..texts import strict_json
from .options import option, parse_layers, parse_targets, passed_to

__all__ = ["TARGETS_HELP", "Dtype", "Masked", "Run", "attach_options", "check_mask"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TARGETS_HELP = "Names with commas, all-linear, attention, mlp, auto, or a regular expression."
MASKS = "struct, rand, wm, grad, snip, fisher, wanda, lift, block, nm, union, intersection, difference"
LARGER = (2**31, 2**31)  # a shape larger than that of any matrix


@dataclasses.dataclass(frozen=True)
class Masked:
    """Which entries train: mask, budgets and targets."""

    start: str | None = option(
        None, "An adapter whose training goes on: its entries train, from its values.", "attach", group="Mask"
    )
    mask: str = option("wm", f"The mask: {MASKS}; with options, as block:by=snip,size=8. See `shira masks`.", "attach")
    density: float | None = option(None, "Share of each target's entries that train.", "attach", usual="0.01", gt=0, le=1)
    rank: int | None = option(None, "In place of --density: the entries of a LoRA of this rank.", "attach", ge=1)
    total: int | None = option(None, "In place of --density: so many entries in all targets together.", "attach", ge=1)
    scope: Literal["tensor", "model"] = option("tensor", "model ranks the entries of all targets in one list.", "attach")
    floor: float = option(0.0, "With --scope model, each target keeps this share of its budget.", "attach", ge=0, le=1)
    overrides: dict[str, Any] | None = option(
        None, """Budgets by name, as JSON: '{"down_proj": 0.02, "q_proj": {"rank": 4}}'.""", "attach", parse=strict_json
    )
    avoid: list[str] | None = option(
        None, "Do not train the entries that this adapter changes. May be given more than once.", "attach"
    )
    targets: str | list[str] | None = option(
        "all-linear",
        TARGETS_HELP,
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
    dtype: Dtype = option("auto", "The model's dtype. auto: the checkpoint's.")
    seed: int = option(0, "The seed of the mask and of the order of the examples.", "attach, trainer", ge=0)
    name: str = option("", "The adapter's name.", group="Results", usual="the output's, or the data's")
    license: str | None = option(None, "The adapter's licence. The file holds it.")


def attach_options(recipe: Masked, **more: Any) -> dict[str, Any]:
    """What `attach` is given: the recipe's options and more, or with `start` those of them that it does not decide."""
    from ..training.starting import BESIDE

    options = passed_to("attach", recipe) | more
    return options if recipe.start is None else {name: value for name, value in options.items() if name in BESIDE}


def _check_start(recipe: Masked, file: str) -> None:
    """Raise DataError for options that cannot be given with `start`, and FormatError or OSError for its file."""
    from ..adapter import opened
    from ..training.starting import BESIDE

    usual = type(recipe)()
    for name, value in passed_to("attach", recipe).items():
        if name not in BESIDE and value != getattr(usual, name):
            raise DataError(f"--start takes the entries of {file} as they are: leave out --{name.replace('_', '-')}")
    with opened(file):
        pass


def check_mask(recipe: Masked) -> None:
    """Check mask, budgets, and the files to avoid before a model is loaded: raise what `attach` would raise later."""
    from .. import masks
    from ..adapter import opened

    if recipe.start is not None:
        _check_start(recipe, recipe.start)
    masks.resolve(recipe.mask)
    density = recipe.density or (None if recipe.rank or recipe.total else 0.01)
    masks.plan({"any": LARGER}, density=density, rank=recipe.rank, total=recipe.total, scope=recipe.scope, floor=recipe.floor)
    overrides = {f"overrides: {name}": budget for name, budget in (recipe.overrides or {}).items()}
    masks.plan(dict.fromkeys(overrides, LARGER), density=0.01, overrides=overrides)
    for file in recipe.avoid or ():
        with opened(file):
            pass
