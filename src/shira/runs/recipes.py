"""A recipe says all that decides a training run; each run writes down the one that reproduces it."""

import dataclasses
import itertools
import random
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from ..data.batches import batches, check_packing
from ..data.reading import examples_of
from ..data.tasks import Example
from ..data.tokens import Row, encode, pack
from ..errors import DataError, MissingExtra, did_you_mean
from ..files.paths import open_regular, path_of
from ..files.tensorfiles import write_whole
from ..integrations import transformers as hf
from ..texts import shown
from ..training.tuning import attach

__all__ = ["Recipe", "load_recipe", "read_settings", "save_recipe", "train_adapter"]

LOWEST = {"steps": 1, "batch_size": 1, "accumulate": 1, "calibration": 1, "max_length": 2, "seed": 0, "refresh_every": 0}
OWN_TEXT = "own"
GENERAL_BATCH = 4  # rows; their gradients are squared batch by batch
BUDGETS = ("density", "rank", "total")  # one of them
LARGEST = 2**63 - 1  # whole number in a recipe
LONGEST = 2**20  # bytes of a recipe
DEEPEST = 8  # settings in settings


@dataclass(frozen=True)
class Recipe:
    """What `shira train` is told, on the command line or in a YAML file; the names are those of its options."""

    model: str = "SmolLM2-135M-Instruct"  # a folder, a hub id, or a built-in name
    data: str = ""  # a built-in task, a JSONL or Parquet file, a folder or hub id as in "org/name:train"
    eval_data: str | None = None  # the same: its mean loss is taken before and after
    eval_share: float = 0.0  # instead: hold out this share of the data
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
    exclude: list[str] | None = None  # names none of which may be part of a target's name
    layers: list[int] | None = None  # numbers of the layers to take
    method: str = "values"
    decompose: int | None = (
        None  # rank of a masked DoRA (docs/variants.md), 0: free at the mask's positions; None: plain entries
    )
    calibration: int = 64  # examples, for masks that need gradients or activations
    stay_near: str | None = None  # data that the adapter shall not disturb; "own": text that the model writes itself
    reach: float = 0.01  # how far it may go then, in units of the weights (docs/masks/README.md)
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
    pack: bool = False  # several examples in a row of max_length tokens; a batch then counts rows
    dtype: str = "auto"
    seed: int = 0
    license: str | None = None
    report_to: str = "none"  # "tensorboard", "wandb", … , several with commas
    log_folder: str = "runs"  # where TensorBoard finds the runs

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Recipe).items():
            if not _fits(getattr(self, name), hint):
                expected = EXPECTED.get(name) or _told(hint)
                raise DataError(f"recipe: {name} must be {expected}, found {shown(getattr(self, name))}")
        for name, low in LOWEST.items():
            if getattr(self, name) < low:
                raise DataError(f"recipe: {name} must be {EXPECTED[name]}, found {getattr(self, name)!r}")
        if not self.lr > 0:
            raise DataError(f"recipe: lr must be a number above 0, found {self.lr!r}")
        if not 0 <= self.warmup <= 1:
            raise DataError(f"recipe: warmup must be from 0 to 1, found {self.warmup!r}")
        if not 0 <= self.eval_share < 1:
            raise DataError(f"recipe: eval_share must be from 0 to below 1, found {self.eval_share!r}")
        if self.eval_share and self.eval_data:
            raise DataError("recipe: give eval_data or eval_share, not both")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise DataError(f"recipe: dtype must be auto, float32, bfloat16 or float16, found {self.dtype!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of a setting: numbers finite, and whole ones such as a tensor may hold."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) <= (LARGEST if type(value) is int else sys.float_info.max)
    return isinstance(value, kind)


def _told(hint: Any) -> str:
    """The type of a setting in words."""
    words: dict[Any, str] = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
    words |= {list[str]: "a list of names", list[int]: "a list of numbers"}
    each = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(words[kind] for kind in each if kind in words)


EXPECTED = {name: f"a whole number from {low} on" for name, low in LOWEST.items()} | {
    "overrides": "'name pattern: budget', one a line",
    "avoid": "a list of adapter files",
}


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, plain values only.

    Raises DataError for a file that is no YAML mapping, is as large or deep as no recipe is, has a key twice, or repeats a part
    of itself (by aliases, of which a few lines can stand for gigabytes); OSError if it cannot be read.
    """
    yaml = _yaml()
    place = path_of(path, "load_recipe('spam.yaml')", DataError)

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]  # yaml is looked for when it is needed
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"an alias in line {self.peek_event().start_mark.line + 1}; write the part out")
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError(f"it nests deeper than {DEEPEST}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep=deep)
            if len(found) < len(node.value):
                raise ValueError(f"a key stands there twice, from line {node.start_mark.line + 1} on")
            return found

    try:
        with open_regular(place, DataError) as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} bytes")
        read = yaml.load(content.decode(), Loader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{path} is not YAML of plain settings: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise DataError(f"{path} must hold settings, one 'name: value' a line, found {type(read).__name__}")
    return read


def load_recipe(path: str | Path | None, given: Mapping[str, Any]) -> Recipe:
    """A recipe out of a YAML file (or none) and what was given beside it, which wins.

    Raises DataError for what `read_settings` refuses, a setting that does not exist, or is of another type; OSError if the file
    cannot be read.
    """
    settings = read_settings(path) if path is not None else {}
    if given.keys() & set(BUDGETS):  # one replaces another
        settings = {key: value for key, value in settings.items() if key not in BUDGETS}
    settings = settings | dict(given)
    names = [field.name for field in dataclasses.fields(Recipe)]
    for name in settings:
        if name not in names:
            raise DataError(f"{path}: unknown setting {shown(name)}; {did_you_mean(str(name), names)}")
    recipe = Recipe(**settings)
    if not recipe.data:
        raise DataError("no data to train on: give --data: a built-in task, a JSONL or Parquet file, or a data set")
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as YAML, with the versions it ran under as a comment."""
    from ..version import __version__

    settings = {key: value for key, value in dataclasses.asdict(recipe).items() if value is not None}
    versions = f"# shira-adapters {__version__}, torch {torch.__version__}, transformers {hf.version()}\n"
    write_whole(Path(path), (versions + _yaml().safe_dump(settings, sort_keys=False)).encode())


def train_adapter(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    *,
    on_read: Callable[[int], None] = lambda done: None,
    on_calibration: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
    on_evaluation: Callable[[int, int], None] | None = None,
) -> Adapter:
    """Train one adapter as the recipe says. The model comes back as it was, bit for bit, also if anything fails.

    Called: on_read(done) after each example, on_calibration(done, total) after each batch of the calibration, on_step(step,
    loss, tokens a second) after each optimizer step, on_evaluation(done, total) after each batch of what is held out.
    """
    hf.reporters(recipe.report_to)
    if recipe.pack:
        check_packing(model)
    rows = encode(tokenizer, _examples(recipe, held_out=False), recipe.max_length, on_read=on_read)
    held_out: Sequence[Row] = []
    if recipe.eval_data or recipe.eval_share:
        held_out = encode(tokenizer, _examples(recipe, held_out=True), recipe.max_length, on_read=on_read)
    pad = tokenizer.pad_token_id or 0
    calibration = batches(rows[: recipe.calibration], model, recipe.batch_size, pad)
    name = recipe.name or Path(recipe.data.partition(":")[0]).stem
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
        exclude=recipe.exclude or (),
        layers=recipe.layers,
        calibration=calibration,
        progress=on_calibration,
        seed=recipe.seed,
        method=recipe.method,  # type: ignore[arg-type]  # attach checks it
        decompose=False if recipe.decompose is None else recipe.decompose or True,
    )
    with tuner:
        if recipe.stay_near is not None:
            if recipe.stay_near == OWN_TEXT:
                general: Sequence[Row] = hf.own_text(model, tokenizer, on_calibration)
            else:
                general = encode(tokenizer, itertools.islice(examples_of(recipe.stay_near, "train"), recipe.calibration))
            text = batches(general, model, GENERAL_BATCH, pad)
            tuner.stay_near(text, reach=recipe.reach, passes=recipe.accumulate, progress=on_calibration)
        summary = hf.train(
            tuner,
            model,
            pack(rows, recipe.max_length) if recipe.pack else rows,
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
            held_out=held_out,
            report_to=recipe.report_to,
            log_folder=Path(recipe.log_folder) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
            on_step=on_step,
            on_evaluation=on_evaluation,
        )
        data = Path(recipe.data).name if Path(recipe.data).exists() else recipe.data
        summary |= {key: count for key in ("shortened", "dropped") if (count := getattr(rows, key))}
        return tuner.adapter(name, training={"data": data, **summary}, license=recipe.license)


def _examples(recipe: Recipe, held_out: bool) -> Iterator[Example]:
    """What the recipe trains on, or holds out: of a share, each example by a coin that its number and the seed decide."""
    if held_out and recipe.eval_data:
        yield from examples_of(recipe.eval_data, "test")
        return
    examples = itertools.islice(examples_of(recipe.data, "train"), recipe.limit)
    for number, example in enumerate(examples):
        if (recipe.eval_share > 0 and random.Random(f"{recipe.seed} {number}").random() < recipe.eval_share) == held_out:
            yield example


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra(f"recipes need pyyaml: pip install 'shira-adapters[train]' ({error})") from error
    return yaml
