"""A recipe holds everything that decides a training run. `shira train` saves the one that reproduces its run."""

import collections
import dataclasses
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..data.commonsense import COMMONSENSE
from ..data.models import BUILT_IN, built_in
from ..data.reading import FILES
from ..data.tasks import TASKS
from ..errors import DataError, MissingExtra, TargetError, did_you_mean
from ..files.paths import open_regular, path_of
from ..texts import shown, strict_json
from ..training.foreign_names import here
from ..training.lr_scale import allowed
from ..version import deprecated
from .options import check, option, parse_scale, parse_targets, passed_to
from .shared_options import TARGETS_HELP, Masked, Run, attach_options, check_mask

if TYPE_CHECKING:
    from torch import nn

    from ..adapter import Adapter
    from ..data.tasks import Example
    from ..data.tokens import Row

__all__ = [
    "PAPERS",
    "Recipe",
    "check_paths",
    "check_run",
    "load_recipe",
    "name_of",
    "read_settings",
    "recipe_of",
    "save_recipe",
    "train_adapter",
    "usual_targets",
    "with_targets",
]

OWN_TEXT = "own"
GENERAL_BATCH = 4  # rows in a batch of general text; the gradient of each batch is squared
BUDGETS = ("density", "rank", "total")  # at most one of them is given
NOT_TOGETHER = ({"eval_data", "eval_share"}, {"decompose", "stay_near", "refresh_every", "method hook"})
PAPERS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's targets (Table 9)
USUAL = f"{','.join(PAPERS)} if the model has all of them, else all-linear"
LONGEST = 2**20  # the largest size of a recipe, in bytes
DEEPEST = 8  # the deepest nesting of a recipe's settings


Kind = TypeVar("Kind", bound=Masked)


@dataclasses.dataclass(frozen=True)
class _Source:
    """The model, and the data that it learns from."""

    model: str = option("", "A model folder, a hub id, or SmolLM2-135M-Instruct-Q4_1.")
    data: str = option(
        "",
        f"JSONL, JSON, CSV, Parquet, a data set (org/name:train), or a task: {', '.join([*TASKS, *COMMONSENSE])}.",
        group="Data",
    )
    eval_data: str | None = option(None, "Held-out data, named as in --data. Its mean loss is taken before and after.")
    eval_share: float = option(0.0, "In place of --eval-data, this share of the data is held out.", ge=0, lt=1)
    limit: int | None = option(None, "Training uses this many examples at most.", usual="all", ge=1)
    max_length: int = option(512, "An example has this many tokens at most.", ge=2)
    pack: bool = option(False, "A row of --max-length tokens holds several examples. A batch then counts rows.")


@dataclasses.dataclass(frozen=True)
class _Training:
    """What only language models have."""

    calibration: int = option(64, "The number of examples for masks that need gradients or activations.", ge=1)
    refresh_every: int = option(0, "The mask is selected again each time after this many steps (0: never).", "trainer", ge=0)
    refresh_cap: float = option(1.0, "With --refresh-every, the most entries the adapter holds, in budgets.", "trainer", ge=1)
    method: Literal["values", "hook"] = option("values", "hook is the paper's slow way.", "attach", group="Training")
    decompose: bool | int = option(
        False, "Rank of a DoRA under the mask (SHiRA-WM-DoRA). true: its direction is free.", "attach", parse=strict_json, ge=1
    )
    stay_near: str | None = option(None, "Data whose loss should not rise. own: text that the model writes itself.")
    reach: float = option(0.01, "With --stay-near, how far a weight may move. Smaller holds it nearer to the base.", gt=0)
    lr: float = option(1e-3, "The learning rate, as for LoRA.", gt=0)
    lr_scale: float | str = option(
        "auto",
        "Entries change by this times --lr in a step: a power of two. auto: the mask decides.",
        "attach",
        parse=parse_scale,
    )
    steps: int = option(100, "The number of optimizer steps.", "trainer", ge=1)
    batch_size: int = option(16, "The number of examples a batch, or of rows with --pack.", "trainer", ge=1)


@dataclasses.dataclass(frozen=True)
class Recipe(Run, _Training, Masked, _Source):  # dataclasses take their fields from the last to the first
    """The settings of `shira train`, on the command line or in a YAML file. Each option is defined once."""

    targets: str | list[str] | None = option(None, TARGETS_HELP, "attach", usual=USUAL, parse=parse_targets)
    report_to: str = option("none", "Where the run is reported: tensorboard, wandb, …, several with commas.", "trainer")
    log_folder: str = option("runs", "The folder where TensorBoard finds the runs.")

    def __post_init__(self) -> None:
        check(self)
        found = {name for name, value in vars(self).items() if value} | {f"method {self.method}"}
        found -= {"refresh_every"} if self.refresh_every >= self.steps else set()  # the run ends before the first refresh
        for names in NOT_TOGETHER:
            if len(names & found) > 1:
                raise DataError(f"recipe: give {' or '.join(sorted(names & found))}, not both")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, plain values only.

    Raises DataError if the file is not a YAML mapping, is too large or too deeply nested for a recipe, has a key twice, or has
    aliases (with which a few lines can stand for gigabytes). Raises OSError if the file cannot be read.
    """
    yaml = _yaml()
    place = path_of(path, "load_recipe('spam.yaml')", DataError)

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]  # yaml is imported when it is needed
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

    _with_exponents(Loader)
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
    """A recipe from a YAML file (or none) and from settings given beside it, which win.

    Recipes of earlier releases can be read, too.
    Raises DataError for what `read_settings` refuses, for an unknown setting, and for a value of a wrong type. Raises OSError
    if the file cannot be read.
    """
    recipe = recipe_of(Recipe, path, given)
    if not recipe.model:
        raise DataError(f"no model to train: give a folder, a hub id, or a built-in model: {', '.join(BUILT_IN)}")
    if not recipe.data:
        raise DataError("no data to train on: give --data: a built-in task, a JSONL, JSON, CSV or Parquet file, or a data set")
    if path is not None:
        named = {name: str(getattr(recipe, name)) for name in ("data", "eval_data", "stay_near") if name not in given}
        named = {name: file for name, file in named.items() if file.endswith(FILES)}
        if "model" not in given and recipe.model.startswith(("./", "../")):
            named["model"] = recipe.model
        check_paths(path, named)
    return dataclasses.replace(recipe, model=built_in(recipe.model) or recipe.model)


def recipe_of(kind: type[Kind], path: str | Path | None, given: Mapping[str, Any]) -> Kind:
    """The same for any kind of recipe, which need not name its data."""
    settings = read_settings(path) if path is not None else {}
    if given.keys() & set(BUDGETS):  # a given budget replaces any budget of the file
        settings = {key: value for key, value in settings.items() if key not in BUDGETS}
    settings = settings | dict(given)
    decompose = settings.get("decompose", False)
    if decompose is None or (type(decompose) is int and decompose == 0):  # None was False, and 0 was True
        settings["decompose"] = decompose is not None
        old, new = ("null", "false") if decompose is None else ("0", "true")
        deprecated(f"decompose {old}", f"decompose {new}", gone_in="0.3.0")
    for name in settings:
        if name not in (known := kind.__dataclass_fields__):
            said = here(str(name), known) or did_you_mean(str(name), known)
            raise DataError(f"{path}: unknown setting {shown(name)}; {said}")
    try:
        return kind(**settings)
    except DataError as error:
        if path is None or _said_of(kind, given) == str(error):
            raise
        raise DataError(f"{path}: {str(error).removeprefix('recipe: ')}") from None


def _said_of(kind: type[Masked], given: Mapping[str, Any]) -> str:
    """What is wrong with the settings that were given beside a file, taken by themselves; "" if nothing is."""
    try:
        kind(**given)
    except DataError as error:
        return str(error)
    return ""


def usual_targets(model: "nn.Module") -> str | list[str]:
    """What trains if nobody names targets: the paper's targets, or all-linear for a model that lacks one of these names."""
    from ..weights.targets import resolve

    try:
        resolve(model, PAPERS)
    except TargetError:
        return "all-linear"
    return list(PAPERS)


def with_targets(recipe: Kind, model: "nn.Module") -> Kind:
    """The recipe; if it names no targets, with the usual ones of this model, which may be without data."""
    if recipe.targets is not None or recipe.start is not None:  # `start` has its own
        return recipe
    return dataclasses.replace(recipe, targets=usual_targets(model))


def check_paths(recipe: str | Path, paths: Mapping[str, str]) -> None:
    """Raise DataError for a relative path in the file of a recipe that leads nowhere from here. paths: setting -> path."""
    for name, path in paths.items():
        if not Path(path).is_absolute() and not Path(path).exists():
            raise DataError(
                f"{recipe}: {name}: there is no {path!r} in {Path.cwd()}; relative paths in a recipe start from the folder "
                "where the command is given: give it where the run was started, or correct the path"
            )


def save_recipe(recipe: Masked, path: str | Path, library: str = "") -> None:
    """Write a recipe as YAML. A comment gives the versions of shira, torch and a library, which is transformers by default."""
    import torch

    from ..files.tensorfiles import write_whole
    from ..integrations import transformers as hf
    from ..version import __version__

    settings = {key: value for key, value in dataclasses.asdict(recipe).items() if value is not None}
    library = library or f"transformers {hf.version()}"
    versions = f"# shira-adapters {__version__}, torch {torch.__version__}, {library}\n"
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        pass

    _with_exponents(Dumper)  # the name 1e3 gets quotes
    write_whole(Path(path), (versions + yaml.dump(settings, Dumper=Dumper, sort_keys=False)).encode())


def check_run(recipe: Recipe) -> None:
    """Check mask, budgets, files, data and libraries before a model is loaded: raise what `train_adapter` would raise later.

    All rows are read that the run will read.
    """
    from ..data.reading import examples_of
    from ..integrations import transformers_training as training

    check_mask(recipe)
    allowed(recipe.lr_scale, recipe.method, recipe.decompose)
    if training.reporters(recipe.report_to) and Path(recipe.log_folder).exists() and not Path(recipe.log_folder).is_dir():
        raise DataError(f"recipe: log_folder must be a folder, or the name of a new one; found {recipe.log_folder!r}, a file")
    training.check_schedule(recipe.schedule)
    read: list[Iterator[Example]] = [itertools.islice(examples_of(recipe.data, "train"), recipe.limit)]
    if recipe.eval_data:
        read.append(_examples(recipe, held_out=True))
    if recipe.stay_near not in (None, OWN_TEXT):
        read.append(itertools.islice(examples_of(recipe.stay_near, "train"), recipe.calibration))
    collections.deque(itertools.chain(*read), maxlen=0)


def train_adapter(
    recipe: Recipe,
    model: "nn.Module",
    tokenizer: Any,
    *,
    on_read: Callable[[int], None] = lambda done: None,
    on_calibration: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
    on_evaluation: Callable[[int, int], None] | None = None,
    save_every: int = 0,
    save_folder: Path | None = None,
) -> "Adapter":
    """Train one adapter as the recipe says. The model is restored bit for bit, also after an error.

    Callbacks: on_read(done) after each example; on_calibration(done, total) after each batch of a calibration, and after each
    token of text that the model writes; on_step(step, loss, tokens per second) after each optimizer step; on_evaluation(done,
    total) before the first batch of the held-out data, and after each.
    save_every, save_folder: as in `transformers_training.train`.
    """
    from ..data.batches import batches, check_packing
    from ..data.reading import examples_of
    from ..data.tokens import encode, pack
    from ..integrations import transformers as hf
    from ..integrations import transformers_training as training
    from ..training.tuning import attach

    training.reporters(recipe.report_to)
    if recipe.pack:
        check_packing(model)
    rows = encode(tokenizer, _examples(recipe, held_out=False), recipe.max_length, on_read=on_read)
    held_out: Sequence[Row] = []
    if recipe.eval_data or recipe.eval_share:
        before = int(rows.examples[-1]) + 1
        held_out = encode(
            tokenizer, _examples(recipe, held_out=True), recipe.max_length, on_read=lambda done: on_read(before + done)
        )
    pad = tokenizer.pad_token_id or 0
    calibration = batches(rows[: recipe.calibration], model, recipe.batch_size, pad)
    name = name_of(recipe)
    chosen = attach_options(with_targets(recipe, model), calibration=calibration)
    tuner = attach(model, progress=on_calibration, **chosen)
    with tuner:
        if recipe.stay_near is not None:
            if recipe.stay_near == OWN_TEXT:
                general: Sequence[Row] = hf.own_text(model, tokenizer, on_calibration)
            else:
                general = encode(tokenizer, itertools.islice(examples_of(recipe.stay_near, "train"), recipe.calibration))
            text = batches(general, model, GENERAL_BATCH, pad)
            tuner.stay_near(text, reach=recipe.reach, passes=recipe.accumulate, progress=on_calibration)
        summary = training.train(
            tuner,
            model,
            pack(rows, recipe.max_length) if recipe.pack else rows,
            learning_rate=recipe.lr,
            pad=pad,
            calibration=calibration,
            held_out=held_out,
            log_folder=Path(recipe.log_folder) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
            on_step=on_step,
            on_evaluation=on_evaluation,
            save_every=save_every,
            save_folder=save_folder,
            **passed_to("trainer", recipe),
        )
        data = Path(recipe.data).name if Path(recipe.data).exists() else recipe.data
        summary |= {key: count for key in ("shortened", "dropped") if (count := getattr(rows, key))}
        return tuner.adapter(name, training={"data": data, **summary}, license=recipe.license)


def name_of(recipe: Recipe) -> str:
    """The name of the recipe's adapter, which is that of its data if it has none."""
    return recipe.name or Path(recipe.data.partition(":")[0]).stem


def _examples(recipe: Recipe, held_out: bool) -> "Iterator[Example]":
    """The examples that a recipe trains on, or those that it holds out.

    With eval_share, a random number decides for each example; it depends only on the recipe's seed and the example's number.
    """
    from ..data.reading import examples_of

    if held_out and recipe.eval_data:
        yield from examples_of(recipe.eval_data, "test")
        return
    examples = itertools.islice(examples_of(recipe.data, "train"), recipe.limit)
    for number, example in enumerate(examples):
        if (recipe.eval_share > 0 and random.Random(f"{recipe.seed} {number}").random() < recipe.eval_share) == held_out:
            yield example


def _with_exponents(reader_or_writer: Any) -> None:
    """Let 1e-3 be a number, as in YAML 1.2. PyYAML follows YAML 1.1, where it is a text, and 1.0e-3 is a number."""
    number = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
    reader_or_writer.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra(f"recipes need pyyaml: pip install 'shira-adapters[train]' ({error})") from error
    return yaml
