"""A recipe says all that decides a training run; each run writes down the one that reproduces it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .data.tasks import Example, examples_of
from .errors import DataError, MissingExtra, did_you_mean
from .integrations import transformers as hf
from .tuning import attach

__all__ = ["Recipe", "load_recipe", "save_recipe", "train_adapter"]


LOWEST = {"steps": 1, "batch_size": 1, "accumulate": 1, "calibration": 1, "max_length": 2, "seed": 0, "refresh_every": 0}
BUDGETS = ("density", "rank", "total")  # one of them


@dataclass(frozen=True)
class Recipe:
    """What `shira train` is told, on the command line or in a YAML file; the names are those of its options."""

    model: str = "SmolLM2-135M-Instruct"  # a folder, a hub id, or a built-in name
    data: str = ""  # a built-in task or a JSONL file
    name: str = ""  # the adapter's name; the data's if empty
    mask: str = "wm"
    density: float | None = None
    rank: int | None = None
    total: int | None = None
    scope: str = "tensor"  # or "model": one ranking over all targets
    floor: float = 0.0  # with scope "model": the share of its own budget that each target keeps
    overrides: dict[str, Any] | None = None  # name pattern -> density, or {"rank": 4}, or {"total": 1000}
    avoid: list[str] | None = None  # adapter files none of whose entries may train
    targets: str | list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    method: str = "values"
    calibration: int = 64  # examples, for masks that need gradients or activations
    refresh_every: int = 0  # steps after which the mask is selected anew; 0: never
    refresh_cap: float = 1.0  # entries the adapter may hold then, in budgets
    lr: float = 1e-3
    steps: int = 100
    batch_size: int = 16
    accumulate: int = 1
    schedule: str = "linear"
    warmup: float = 0.0  # share of the steps
    limit: int | None = None  # train on this many examples at most
    max_length: int = 512  # tokens
    dtype: str = "auto"
    seed: int = 0
    license: str | None = None

    def __post_init__(self) -> None:
        for name, low in LOWEST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise DataError(f"recipe: {name} must be a whole number from {low} on, found {value!r}")
        if self.overrides is not None and not isinstance(self.overrides, dict):
            raise DataError(f"recipe: overrides must be 'name pattern: budget', one a line, found {self.overrides!r}")
        if self.avoid is not None and not isinstance(self.avoid, list):
            raise DataError(f"recipe: avoid must be a list of adapter files, found {self.avoid!r}")
        if not isinstance(self.lr, int | float) or not 0 < self.lr < float("inf"):
            raise DataError(f"recipe: lr must be a number above 0, found {self.lr!r}")
        if not isinstance(self.warmup, int | float) or not 0 <= self.warmup <= 1:
            raise DataError(f"recipe: warmup must be from 0 to 1, found {self.warmup!r}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise DataError(f"recipe: dtype must be auto, float32, bfloat16 or float16, found {self.dtype!r}")


def load_recipe(path: str | Path | None, given: Mapping[str, Any]) -> Recipe:
    """A recipe out of a YAML file (or none) and what was given beside it, which wins.

    Raises DataError for a file that is no YAML mapping, or a setting that does not exist; OSError if it cannot be read.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        yaml = _yaml()
        try:
            read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not YAML: {error}") from error
        if not isinstance(read, dict):
            raise DataError(f"{path} must hold settings, one 'name: value' a line, found {type(read).__name__}")
        settings = read
    if given.keys() & set(BUDGETS):  # one replaces another
        settings = {key: value for key, value in settings.items() if key not in BUDGETS}
    settings = settings | dict(given)
    names = [field.name for field in dataclasses.fields(Recipe)]
    for name in settings:
        if name not in names:
            raise DataError(f"{path}: unknown setting {name!r}; {did_you_mean(str(name), names)}")
    recipe = Recipe(**settings)
    if not recipe.data:
        raise DataError("no data to train on: give --data, a built-in task or a JSONL file")
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as YAML, with the versions it ran under as a comment."""
    from . import __version__

    settings = {key: value for key, value in dataclasses.asdict(recipe).items() if value is not None}
    versions = f"# shira-adapters {__version__}, torch {torch.__version__}, transformers {hf.version()}\n"
    Path(path).write_text(versions + _yaml().safe_dump(settings, sort_keys=False), encoding="utf-8")


def train_adapter(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    *,
    on_calibration: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Adapter:
    """Train one adapter as the recipe says. The model comes back as it was, bit for bit, also if anything fails.

    on_calibration(done, total) is called after each batch of the calibration, on_step(step, loss) after each optimizer step.
    """
    examples: list[Example] = examples_of(recipe.data, "train")[: recipe.limit]
    rows = hf.encode(tokenizer, examples, recipe.max_length)
    pad = tokenizer.pad_token_id or 0
    calibration = hf.batches(rows[: recipe.calibration], model, recipe.batch_size, pad)
    tuner = attach(
        model,
        mask=recipe.mask,
        density=recipe.density,
        rank=recipe.rank,
        total=recipe.total,
        scope=recipe.scope,  # type: ignore[arg-type]  # attach checks it
        floor=recipe.floor,
        overrides=recipe.overrides,
        avoid=recipe.avoid or (),
        targets=recipe.targets,
        calibration=calibration,
        progress=on_calibration,
        seed=recipe.seed,
        method=recipe.method,  # type: ignore[arg-type]  # attach checks it
    )
    with tuner:
        summary = hf.train(
            tuner,
            model,
            rows,
            steps=recipe.steps,
            learning_rate=recipe.lr,
            batch_size=recipe.batch_size,
            accumulate=recipe.accumulate,
            schedule=recipe.schedule,
            warmup=recipe.warmup,
            seed=recipe.seed,
            pad=pad,
            refresh_every=recipe.refresh_every,
            refresh_cap=recipe.refresh_cap,
            calibration=calibration,
            on_step=on_step,
        )
        name = recipe.name or Path(recipe.data).stem
        return tuner.adapter(name, training={"data": Path(recipe.data).name, **summary}, license=recipe.license)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra(f"recipes need pyyaml: pip install 'shira-adapters[train]' ({error})") from error
    return yaml
