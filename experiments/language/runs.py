"""The kinds of runs in experiments: train an adapter, score a model with adapters, compare adapters."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.store import Key, Store, artefacts, number, on_accelerator
from shira.data.packages import rename_whole
from shira.data.tokens import Row, encode
from shira.errors import DataError
from shira.files.paths import temporary_folder
from shira.integrations import lm_eval
from shira.integrations import transformers as hf
from shira.runs.recipes import GENERAL_BATCH

from . import methods
from .gemma import GEMMA, gemma
from .questions import examples, parts, sentences

__all__ = ["Lab", "compare_key", "new_folder", "place", "score_key", "size", "train_key"]

MODEL = ("model", "dtype")
TRAINED_BY = (
    "targets",
    "data",
    "examples",
    "max_length",
    "steps",
    "batch_size",
    "schedule",
    "warmup",
    "calibration",
    "validation",
)
BATCH = 128 if torch.accelerator.is_available() else 16  # questions and sentences at a time


def train_key(recipe: Mapping[str, Any], method: Mapping[str, Any], rate: float, seed: int, **changes: Any) -> Key:
    """The key of a training run. changes: further settings, such as avoid=[numbers of runs whose entries may not train]."""
    made = {name: method[name] for name in ("peft", "options", "reach", "refresh") if name in method}
    settings = {name: recipe[name] for name in (*MODEL, *TRAINED_BY, "answers")}
    if recipe.get("even_labels"):  # not in the keys of runs from before there was this setting
        settings["even_labels"] = True
    return {"kind": "train", **settings, "method": made, "rate": rate, "seed": seed, **changes}


def score_key(recipe: Mapping[str, Any], adapters: Sequence[str], data: str, **how: Any) -> Key:
    """The key of a score: the numbers of the runs that made the adapters, the test data, and how to combine the adapters."""
    settings = {name: recipe[name] for name in (*MODEL, "answers", "test", "text")}
    return {"kind": "score", **settings, "adapters": list(adapters), "on": data, **how}


def compare_key(recipe: Mapping[str, Any], adapters: Sequence[str]) -> Key:
    return {"kind": "compare", **{name: recipe[name] for name in MODEL}, "adapters": list(adapters)}


def place(model: str) -> str:
    """What Transformers loads for a recipe's model."""
    return str(gemma()) if model == GEMMA else model


class Lab:
    """Makes the runs of a store on one live model."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def load(self, name: str, dtype: str) -> nn.Module:
        """Load the model that is adapted."""
        return hf.load_model(place(name), dtype)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one lab a process)
    def model(self, name: str, dtype: str) -> tuple[nn.Module, Any, int]:
        """A model, on an accelerator if there is one, its tokenizer, and the checksum of its weights."""
        model = on_accelerator(self.load(name, dtype))
        return model, hf.load_tokenizer(place(name)), methods.checksum(model)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def own_text(self, name: str, dtype: str) -> list[Row]:
        """Text that the model writes without a prompt. It is always the same, so it is cached."""
        model, tokenizer, _ = self.model(name, dtype)
        return hf.own_text(model, tokenizer)

    def run(self, key: Key) -> dict[str, Any]:
        """Make a run. Raises RuntimeError if it changes the model's weights. After an error the model is loaded again."""
        model, _, before = self.model(key["model"], key["dtype"])
        try:
            result: dict[str, Any] = {"train": self.train, "score": self.score, "compare": self.compare}[key["kind"]](key)
            if methods.checksum(model) != before:
                raise RuntimeError(f"run {number(key)} has changed the base model")
        except Exception:
            type(self).model.cache_clear()
            raise
        finally:
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()  # other processes may share the GPU
        return result

    def folder(self, run: str) -> Path:
        """The folder of a run's adapter. If the folder is missing, the adapter is trained again."""
        line = self.store.line(run)
        if line is None:
            raise DataError(f"{self.store.path}: no run {run}")
        if not (artefacts() / run).is_dir():
            self.train(line["key"])
        return artefacts() / run

    def rows(self, key: Key) -> list[Row]:
        """The training examples of a run, in the order that its seed draws."""
        found = parts(key["data"], key["answers"])
        each = None if key["examples"] is None else key["examples"] // len(found)
        drawn = [example for part in found for example in examples(part, "train", each, key["seed"], "even_labels" in key)]
        rows = encode(self.model(key["model"], key["dtype"])[1], drawn, key["max_length"])
        return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(key["seed"])).tolist()]

    def calibration(self, key: Key, rows: Sequence[Row]) -> list[Any]:
        """The batches that masks of a run see."""
        model, tokenizer, _ = self.model(key["model"], key["dtype"])
        return hf.batches(rows[: key["calibration"]], model, key["batch_size"], tokenizer.pad_token_id or 0)

    def train(self, key: Key) -> dict[str, Any]:
        """Train an adapter into the run's folder, and compute its loss on the validation questions."""
        model, tokenizer, _ = self.model(key["model"], key["dtype"])
        pad = tokenizer.pad_token_id or 0
        found = parts(key["data"], key["answers"])
        chosen = self.rows(key)
        with new_folder(key) as folder:
            summary = methods.train(
                key["method"],
                model,
                chosen,
                self.calibration(key, chosen),
                folder,
                targets=key["targets"],
                avoid=[self.folder(run) / methods.OURS for run in key.get("avoid", ())],
                general=lambda: hf.batches(self.own_text(key["model"], key["dtype"]), model, GENERAL_BATCH, pad),
                steps=key["steps"],
                batch_size=key["batch_size"],
                learning_rate=key["rate"],
                schedule=key["schedule"],
                warmup=key["warmup"],
                seed=key["seed"],
                pad=pad,
                on_step=lambda step, loss, speed: None,
            )
        asked = [example for part in found for example in examples(part, "validation", key["validation"], 0)]
        with methods.adapted(model, [artefacts() / number(key)]) as ready:
            loss = hf.mean_loss(ready, encode(tokenizer, asked, key["max_length"]), BATCH, pad)
        made = {name: summary[name] for name in ("loss", "parameters", "lr_scale") if name in summary}  # PEFT's have no scale
        return {"validation_loss": loss, **made, "file_bytes": size(key)}

    def score(self, key: Key) -> dict[str, Any]:
        """Which questions are answered correctly, one digit for each question; and the loss on unrelated text."""
        model, tokenizer, _ = self.model(key["model"], key["dtype"])
        kind = key["answers"]
        tasks = [
            lm_eval.task_of(part.name, examples(part, "test", key["test"], 0), kind=kind) for part in parts(key["on"], kind)
        ]
        how = {name: key[name] for name in ("strength", "fusion", "options") if name in key}
        folders = [self.folder(run) for run in key["adapters"]]
        if key.get("fusion") == "on-inputs":
            folders, how = [self.fused_on_inputs(key["adapters"], **key["options"])], {}
        with methods.adapted(model, folders, **how) as ready:
            lm_eval.hide_output()
            scores = lm_eval.evaluate(ready, tokenizer, tasks, batch_size=BATCH)
            text = encode(tokenizer, sentences(key["text"]))
            loss = hf.mean_loss(ready, text, BATCH, tokenizer.pad_token_id or 0)
        right = {score.task: "".join(str(int(answer)) for answer in score.right) for score in scores}
        return {"right": right, "text_loss": loss}

    def fused_on_inputs(self, adapters: Sequence[str], examples: int) -> Path:
        """The folder of one adapter with the effect of these runs' adapters, fused on their first training examples."""
        key: Key = {"kind": "on-inputs", "adapters": list(adapters), "examples": examples}
        if not (artefacts() / number(key)).is_dir():
            trained = [line["key"] for run in adapters if (line := self.store.line(run)) is not None]
            inputs = [self.calibration(run | {"calibration": examples}, self.rows(run)) for run in trained]
            model = self.model(trained[0]["model"], trained[0]["dtype"])[0]
            fused = methods.fused_on_inputs(model, [self.folder(run) for run in adapters], inputs)
            with new_folder(key) as folder:
                fused.save(folder / methods.OURS)
        return artefacts() / number(key)

    def compare(self, key: Key) -> dict[str, Any]:
        """The distances between adapters; see `methods.distances`."""
        return methods.distances(self.model(key["model"], key["dtype"])[0], [self.folder(run) for run in key["adapters"]])


@contextlib.contextmanager
def new_folder(key: Key) -> Iterator[Path]:
    """An empty temporary folder. It becomes the run's folder unless an error is raised inside."""
    with temporary_folder(artefacts()) as temporary:
        folder = temporary / number(key)
        folder.mkdir()
        yield folder
        rename_whole(folder, artefacts() / number(key))


def size(key: Key) -> int:
    """The bytes of a run's adapter."""
    return sum(path.stat().st_size for path in (artefacts() / number(key)).glob("*.safetensors"))
