"""Table 12's setting: a head, which is part of the adapter, classifies sentences and pairs of sentences.

All entries of the head train: it is a target of density 1 in shira, and one of `modules_to_save` in PEFT. It starts at the same
random numbers for all methods, stays in float32, and has the same learning rate under every method: a learning rate that suits
a few entries of a weight is too high for a head. The search is for the learning rate of everything else that trains.
"""

import functools
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import shira
from experiments.store import Key, Store, number
from shira import masks
from shira.data.batches import left_padded, random_batches, to_device
from shira.data.models import model_path

from . import glue, methods, runs
from .search import best_rate, losses, rates
from .settings import Recipe
from .tables import Answers, average, difference, markdown, mean_answers, points, share

__all__ = ["Lab", "report", "score_key", "train_key", "wanted"]

HEAD = "score"  # Transformers' name
BATCH = 16
MODEL = ("model", "dtype", "max_length")
TRAINED_BY = ("targets", "examples", "steps", "batch_size", "warmup", "head_rate", "calibration", "validation")
Row = tuple[list[int], int]  # tokens, class


def train_key(
    recipe: Mapping[str, Any], method: Mapping[str, Any], rate: float, seed: int, data: str | None = None, fold: int = 0
) -> Key:
    """The key of a training run, by default on the task of the search."""
    data = data or recipe["search"]
    made = {name: method[name] for name in ("peft", "options", "head_first") if name in method}
    settings = {name: recipe[name] for name in (*MODEL, *TRAINED_BY)}
    which = {"data": data, "fold": fold, "folds": folds(recipe, data)}
    return {"kind": "train", **settings, **which, "method": made, "rate": rate, "seed": seed}


def one(recipe: Recipe, method: Mapping[str, Any], rate: float, seed: int) -> list[Key]:
    """The keys for the search of the learning rate: one run."""
    return [train_key(recipe, method, rate, seed)]


def score_key(recipe: Mapping[str, Any], trained: Key) -> Key:
    """The key of a score: the number of the run that made the adapter, and the test data."""
    settings = {name: recipe[name] for name in MODEL}
    return {"kind": "score", **settings, "adapters": [number(trained)], "on": trained["data"]} | {
        name: trained[name] for name in ("fold", "folds")
    }


def folds(recipe: Mapping[str, Any], data: str) -> int:
    return 1 if data == recipe["search"] else int(recipe["folds"])


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The wanted runs: each method's search for its learning rate; then all tasks and folds, seed by seed; then more_seeds."""
    for method in recipe["methods"].values():
        yield from (train_key(recipe, method, rate, recipe["seeds"][0]) for rate in rates(recipe, method, store, one))
    more = recipe["more_seeds"]
    cells = [(name, task, seed) for seed in recipe["seeds"] for task in recipe["tasks"] for name in recipe["tasks"][task]]
    cells += [(name, recipe["search"], seed) for seed in sorted({s for seeds in more.values() for s in seeds}) for name in more]
    for name, task, seed in cells:
        for trained in trainings(recipe, store, name, task, seed):
            yield trained
            if store.get(trained) is not None:
                yield score_key(recipe, trained)


def trainings(recipe: Recipe, store: Store, name: str, task: str, seed: int) -> list[Key]:
    """The runs of a method at its best learning rate, one for each fold. None before that learning rate is known."""
    rate = best_rate(recipe, recipe["methods"][name], store, one)
    if rate is None:
        return []
    return [train_key(recipe, recipe["methods"][name], rate, seed, task, fold) for fold in range(folds(recipe, task))]


class Lab(runs.Lab):
    """Makes runs on one live model with a head. The class is extended for other things than texts."""

    head: ClassVar = HEAD
    for_peft: ClassVar[dict[str, str]] = {"task_type": "SEQ_CLS"}
    batch: ClassVar = BATCH  # rows of a batch without training

    def load(self, name: str, dtype: str) -> nn.Module:
        """A model for two classes, with the same random head whenever it is loaded."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(0)
        made = AutoModelForSequenceClassification.from_pretrained(model_path(name), num_labels=2, dtype=getattr(torch, dtype))
        model: nn.Module = made
        head = model.get_submodule(HEAD).float()
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
        return model.eval()

    def rows(self, key: Key, part: str) -> list[Any]:
        """What a run classifies, and its class. part: "train", "validation" or "test"."""
        _, tokenizer, _ = self.model(key["model"], key["dtype"])
        where = {"fold": key["fold"], "folds": key["folds"]}
        if part == "train":
            return encoded(tokenizer, key, glue.examples(key["data"], part, key["examples"], key["seed"], **where))
        if part == "validation":
            return encoded(tokenizer, key, glue.examples(key["data"], part, key["validation"]))
        return encoded(tokenizer, key, glue.examples(key["on"], part, **where))

    def collate(self, rows: Sequence[Any], model: nn.Module) -> dict[str, Tensor]:
        """The model's inputs for rows."""
        return batch_of(rows, model)

    def train(self, key: Key) -> dict[str, Any]:
        """Train an adapter into the run's folder. Without folds, also the loss on what is kept for validation."""
        model, _, _ = self.model(key["model"], key["dtype"])
        rows = self.rows(key, "train")
        shown = rows[: key["calibration"]]
        calibration = [self.collate(shown[start : start + self.batch], model) for start in range(0, len(shown), self.batch)]
        given: dict[str, Any] = {name: key[name] for name in ("batch_size", "head_rate", "warmup", "seed")}
        given["schedule"] = key.get("schedule", "linear")
        given["fit"] = functools.partial(fit, head=self.head, collate=self.collate)
        method = self.with_head(key)
        if first := key["method"].get("head_first"):
            chosen = self.chosen_after(first, method["options"], model, rows, calibration, given)
            method["options"] = method["options"] | {"mask": functools.partial(masks.from_adapter, adapter=chosen)}
        with runs.new_folder(key) as folder:
            steps = {"steps": key["steps"], "learning_rate": key["rate"]}
            summary = methods.train(method, model, rows, calibration, folder, targets=key["targets"], **steps, **given)
        result = {"loss": summary["loss"], "parameters": summary["parameters"], "file_bytes": runs.size(key)}
        if key.get("folds", 1) > 1:
            return result
        asked = self.rows(key, "validation")
        with methods.adapted(model, [runs.artefacts() / number(key)]) as ready:
            loss = nn.functional.cross_entropy(self.logits(ready, asked), torch.tensor([label for _, label in asked]))
        return result | {"validation_loss": float(loss)}

    def chosen_after(
        self,
        steps: int,
        options: Mapping[str, Any],
        model: nn.Module,
        rows: Sequence[Any],
        calibration: Sequence[Any],
        given: Mapping[str, Any],
    ) -> shira.Adapter:
        """An adapter of the positions that a mask chooses after some steps of the head alone. The model is as before.

        options: of `shira.attach`. given: settings of `fit`, and `fit`.
        """
        head = model.get_submodule(self.head)
        before = {name: weight.detach().clone() for name, weight in head.named_parameters()}
        alone = {"options": {"mask": "wm", "density": 1.0, "targets": [self.head]}}
        with tempfile.TemporaryDirectory() as folder:
            learns = {"steps": steps, "learning_rate": given["head_rate"]}
            methods.train(alone, model, rows, calibration, Path(folder), targets=[self.head], **learns, **given)
            trained = shira.load(Path(folder) / methods.OURS).tensors
        try:
            with torch.no_grad():
                for name, weight in head.named_parameters():
                    weight.view(-1)[trained[f"{self.head}.{name}"].indices.long()] = trained[f"{self.head}.{name}"].values
            with shira.attach(model, **{"calibration": calibration, "seed": given["seed"]} | dict(options)) as tuner:
                return tuner.adapter()
        finally:
            with torch.no_grad():
                for name, weight in head.named_parameters():
                    weight.copy_(before[name])

    def score(self, key: Key) -> dict[str, Any]:
        """Which test rows are classified correctly, and the rows' classes: one digit for each."""
        model, _, _ = self.model(key["model"], key["dtype"])
        asked = self.rows(key, "test")
        with methods.adapted(model, [self.folder(run) for run in key["adapters"]]) as ready:
            answers = self.logits(ready, asked).argmax(-1).tolist()
        right = "".join(str(int(answer == label)) for answer, (_, label) in zip(answers, asked, strict=True))
        return {"right": {key["on"]: right}, "classes": "".join(str(label) for _, label in asked)}

    def with_head(self, key: Key) -> dict[str, Any]:
        """The method of a key, changed so that it trains the head as well."""
        method = dict(key["method"])
        if "peft" in method:
            head: dict[str, Any] = {"modules_to_save": [self.head], **self.for_peft}
        else:
            head = {"targets": [*key["targets"], self.head], "overrides": {self.head: 1.0}}
        return method | {"options": head | method["options"]}

    @torch.no_grad()
    def logits(self, model: nn.Module, rows: Sequence[Any]) -> Tensor:
        """The head's output for each row, float32 [rows, classes], on the CPU."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        parts = [[rows[row] for row in order[start : start + self.batch]] for start in range(0, len(order), self.batch)]
        found = torch.cat([model(**self.collate(part, model)).logits.float().cpu() for part in parts])
        return found[torch.tensor(order).argsort()]


def batch_of(rows: Sequence[Row], model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.config
    padded = left_padded([tokens for tokens, _ in rows], config.pad_token_id)
    return to_device(padded | {"labels": torch.tensor([label for _, label in rows])}, model)


def fit(
    counted: Any,
    model: nn.Module,
    rows: Sequence[tuple[Any, int]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    head_rate: float,
    warmup: float,
    seed: int,
    schedule: str = "linear",
    head: str = HEAD,
    collate: Callable[[Sequence[Any], nn.Module], dict[str, Tensor]] = batch_of,
) -> dict[str, Any]:
    """Train with AdamW. The head has its own learning rate, unless nothing else trains.

    counted.nnz: the number of parameters that train. rows: what is classified, and its class. schedule: a name of Transformers.
    head: the name of the head's module. collate: makes the model's inputs of rows. Returns the number of parameters, and the
    mean loss of all steps.
    """
    from transformers import get_scheduler

    torch.manual_seed(seed)
    training = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_head = [parameter for name, parameter in training if head in name.split(".")]
    rest = [parameter for name, parameter in training if head not in name.split(".")]
    groups = [{"params": rest}, {"params": of_head, "lr": head_rate}] if rest else [{"params": of_head}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)
    rate = get_scheduler(schedule, optimizer, round(warmup * steps), steps)
    model.train()
    total = 0.0
    for batch in batches([len(shown) for shown, _ in rows], batch_size, steps, seed):
        loss = model(**collate([rows[row] for row in batch], model)).loss
        loss.backward()
        nn.utils.clip_grad_norm_([*rest, *of_head], 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        total += float(loss.detach())
    model.eval()
    return {"loss": round(total / steps, 4), "parameters": counted.nnz}


def batches(lengths: Sequence[int], size: int, steps: int, seed: int) -> list[list[int]]:
    """The rows of each step. Every epoch has a new order; rows of similar length are in one batch."""
    drawn, made = random.Random(seed), list[list[int]]()
    while len(made) < steps:
        made += random_batches(lengths, size, drawn)
    return made[:steps]


def encoded(tokenizer: Any, key: Key, texts: Sequence[glue.Text]) -> list[Row]:
    """Tokens and class of each text. A text that is too long loses its beginning."""
    most = key["max_length"]
    return [(tokenizer(text.text)["input_ids"][-most:], text.label) for text in texts]


def answers(recipe: Recipe, store: Store, name: str, task: str) -> list[dict[str, str]]:
    """A method's answers on a task, all folds in order, for each seed whose folds are all done."""
    found = []
    for seed in [*recipe["seeds"], *recipe["more_seeds"].get(name, [])]:
        made = trainings(recipe, store, name, task, seed)
        scores = [store.get(score_key(recipe, trained)) for trained in made]
        if scores and all(scores):
            found.append({task: "".join(score["right"][task] for score in scores if score)})
    return found


def most_frequent(recipe: Recipe, store: Store, task: str) -> float | None:
    """The share of the most frequent class in the test data. None if no method is done with the task."""
    for name in recipe["tasks"][task]:
        scores = [store.get(score_key(recipe, key)) for key in trainings(recipe, store, name, task, recipe["seeds"][0])]
        if scores and all(scores):
            classes = "".join(score["classes"] for score in scores if score)
            return max(classes.count(digit) for digit in set(classes)) / len(classes)
    return None


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """A table in per cent with 95 % intervals over the test texts: accuracies, and differences to the method compared with."""
    tasks, other = list(recipe["tasks"]), recipe["compare_with"]
    found = {name: {task: answers(recipe, store, name, task) for task in tasks} for name in recipe["methods"]}
    found = {name: {task: seeds for task, seeds in of.items() if seeds} for name, of in found.items()}
    if not any(found.values()):
        return "no results yet"
    means = {name: {task: mean_answers(seeds)[task] for task, seeds in of.items()} for name, of in found.items()}
    asked = {task: len(of[task]) for of in means.values() for task in of}
    head = ["method", "rate (tried)", "thousands", "file, kB", *(f"{task} ({asked.get(task, 0)})" for task in tasks)]
    head += [f"{recipe['search']}: minus {other}", "average", f"average: minus {other}"]
    base = [most_frequent(recipe, store, task) for task in tasks]
    lines = [["most frequent class", "", "", "", *("" if one is None else f"{100 * one:.1f}" for one in base), "", "", ""]]
    for name, of in means.items():
        if not of:
            continue
        method = recipe["methods"][name]
        trained = trainings(recipe, store, name, recipe["search"], recipe["seeds"][0])[0]
        made = store.get(trained) or {}
        line = [name, f"{trained['rate']:g} ({len(losses(recipe, method, store, one))})"]
        line += [f"{made['parameters'] / 1e3:.0f}", f"{made['file_bytes'] / 1e3:.0f}"]
        line += [cell(found[name][task], of[task], task) if task in of else "" for task in tasks]
        line += [apart(of, means[other], [recipe["search"]], name == other)]
        whole = all(task in of for task in tasks)
        line += [share(*average(of)) if whole else "", apart(of, means[other], tasks, name == other) if whole else ""]
        lines.append(line)
    return markdown(head, lines)


def cell(seeds: list[dict[str, str]], mean: Sequence[float], task: str) -> str:
    """Accuracy with its 95 % interval over questions; for several seeds, also the standard deviation over seeds."""
    text = share(*average({task: mean}))
    shares = [seed[task].count("1") / len(seed[task]) for seed in seeds]
    return text + (f"; {len(seeds)} seeds ± {100 * statistics.stdev(shares):.1f}" if len(seeds) > 1 else "")


def apart(ours: Answers, others: Answers, tasks: Sequence[str], same: bool) -> str:
    """A difference in points with its 95 % interval, and the probability of so large a difference by chance."""
    if same or not all(task in ours and task in others for task in tasks):
        return ""
    return points(*difference({task: ours[task] for task in tasks}, others))
