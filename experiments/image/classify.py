"""Table 11's setting: DINOv2 with a head, which is part of the adapter, classifies pictures.

All entries of the head train. It starts at the same random numbers for all methods, stays in float32, and has the same learning
rate under every method, as in `experiments.language.classify`. The learning rate of everything else is searched for each method
on each set of pictures.
"""

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.intervals import half_width
from experiments.language import classify, methods
from experiments.language.search import best_rate, losses, rates
from experiments.language.settings import Recipe
from experiments.language.tables import Answers, difference, markdown, mean_answers, points
from experiments.store import Key, Store, number, on_accelerator
from shira.data.quiet import quiet

from . import dino, labelled

__all__ = ["Lab", "report", "score_key", "train_key", "wanted"]

OUTPUTS = 10  # of the head, also where there are fewer classes
MODEL = ("model", "dtype", "side", "test", "validation")
TRAINED_BY = ("targets", "examples", "steps", "batch_size", "schedule", "warmup", "head_rate", "calibration")
Row = tuple[Tensor, int]  # pixels [3, side, side], class


def train_key(recipe: Mapping[str, Any], method: Mapping[str, Any], rate: float, seed: int, data: str = "emoji") -> Key:
    """The key of a training run."""
    made = {name: method[name] for name in ("peft", "options") if name in method}
    settings = {name: recipe[name] for name in (*MODEL, *TRAINED_BY)}
    return {"kind": "train", **settings, "data": data, "method": made, "rate": rate, "seed": seed}


def score_key(recipe: Mapping[str, Any], trained: Key) -> Key:
    """The key of a score: the number of the run that made the adapter, and the test pictures."""
    return {"kind": "score", **{name: recipe[name] for name in MODEL}, "adapters": [number(trained)], "on": trained["data"]}


def keys_for(data: str) -> Any:
    """The keys for the search of a learning rate on a set of pictures: one run."""
    return lambda recipe, method, rate, seed: [train_key(recipe, method, rate, seed, data)]


def trained(recipe: Recipe, store: Store, name: str, data: str, seed: int) -> Key | None:
    """The run of a method at its best learning rate. None before that learning rate is known."""
    rate = best_rate(recipe, recipe["methods"][name], store, keys_for(data))
    return None if rate is None else train_key(recipe, recipe["methods"][name], rate, seed, data)


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The wanted runs, one set of pictures after another: each method's search, then all seeds."""
    for data in recipe["data"]:
        for method in recipe["methods"].values():
            for rate in rates(recipe, method, store, keys_for(data)):
                yield train_key(recipe, method, rate, recipe["seeds"][0], data)
        for seed in recipe["seeds"]:
            for name in recipe["methods"]:
                made = trained(recipe, store, name, data, seed)
                if made is not None:
                    yield made
                    if store.get(made) is not None:
                        yield score_key(recipe, made)


class Lab(classify.Lab):
    """Makes runs on one live model with a head for pictures."""

    head = "classifier"  # Transformers' name
    for_peft: ClassVar[dict[str, str]] = {}
    batch = 32

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one lab a process)
    def model(self, name: str, dtype: str) -> tuple[nn.Module, None, int]:
        """DINOv2 or a folder of another `Dinov2Model`; nothing in place of a tokenizer; the checksum of its weights."""
        import transformers

        folder = dino.model_folder() if name == dino.NAME else name
        made: Any = transformers.Dinov2ForImageClassification
        with quiet(transformers):
            loaded = made.from_pretrained(folder, num_labels=0, dtype=getattr(torch, dtype))
        loaded.config.num_labels, loaded.config.problem_type = OUTPUTS, "single_label_classification"
        torch.manual_seed(0)
        head = nn.Linear(2 * loaded.config.hidden_size, loaded.config.num_labels, bias=False)
        nn.init.normal_(head.weight, std=0.02)
        head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
        loaded.classifier = head
        model = on_accelerator(loaded.eval())
        return model, None, methods.checksum(model)

    def rows(self, key: Key, part: Any) -> list[Row]:
        """Pictures in a fixed order, as DINOv2 takes them, and their classes."""
        drawn = {"examples": key["examples"], "seed": key["seed"]} if part == "train" else {}
        found = labelled.part(key["on" if part == "test" else "data"], part, key["test"], key["validation"], **drawn)
        return list(zip(dino.pixels(found.pictures, key["side"]), found.labels, strict=True))

    def collate(self, rows: Sequence[Row], model: nn.Module) -> dict[str, Tensor]:
        """The model's inputs for rows."""
        weight: Any = model.get_submodule("dinov2.embeddings.patch_embeddings.projection").weight
        pixel_values = torch.stack([pixels for pixels, _ in rows]).to(weight)
        return {"pixel_values": pixel_values, "labels": torch.tensor([label for _, label in rows], device=weight.device)}


def scores(recipe: Recipe, store: Store, name: str, data: str) -> list[dict[str, Any]]:
    """A method's scores on a set of pictures, seed by seed; none while one is missing."""
    made = [trained(recipe, store, name, data, seed) for seed in recipe["seeds"]]
    found = [store.get(score_key(recipe, key)) for key in made if key]
    return [score for score in found if score] if all(found) and len(found) == len(made) else []


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """A table of accuracies in per cent with 95 % intervals over seeds, and of differences to the method compared with."""
    sets, other = recipe["data"], recipe["compare_with"]
    found = {name: {data: scores(recipe, store, name, data) for data in sets} for name in recipe["methods"]}
    found = {name: {data: seeds for data, seeds in of.items() if seeds} for name, of in found.items()}
    if not any(found.values()):
        return "no results yet"
    head = ["method", "thousands", "file, kB", *sets, "average", f"average: minus {other}", "rates (tried)"]
    lines = [["most frequent class", "", "", *(most_frequent(found, data) for data in sets), "", "", ""]]
    for name, of in found.items():
        if not of:
            continue
        line = [name, *sizes(recipe, store, name, of), *(over_seeds([of[data]]) if data in of else "" for data in sets)]
        whole = all(data in of and data in found[other] for data in sets)
        line.append(over_seeds(list(of.values())) if whole else "")
        line.append(points(*difference(means(of), means(found[other]))) if whole and name != other else "")
        lines.append([*line, tried(recipe, store, name, of)])
    return markdown(head, lines)


def over_seeds(sets: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The mean accuracy over sets of pictures and seeds with its 95 % interval over seeds (Student's t): '91.2 ± 1.3'.

    sets: for each set of pictures, the score of each seed.
    """
    each = [statistics.fmean(share(score) for score in seed) for seed in zip(*sets, strict=True)]
    if len(each) == 1:
        return f"{100 * each[0]:.1f}"
    return f"{100 * statistics.fmean(each):.1f} ± {100 * half_width(each):.1f}"


def share(score: Mapping[str, Any]) -> float:
    """The share of pictures that were classified correctly."""
    (digits,) = score["right"].values()
    return float(digits.count("1") / len(digits))


def means(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> Answers:
    """Set of pictures -> for each test picture, the share of seeds that classified it correctly."""
    return {data: mean_answers([score["right"] for score in made])[data] for data, made in of.items()}


def most_frequent(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], data: str) -> str:
    """The share of the most frequent class in the test pictures. Empty if no method is done with the set."""
    classes = next((of[data][0]["classes"] for of in found.values() if data in of), "")
    return f"{100 * max(map(classes.count, set(classes))) / len(classes):.1f}" if classes else ""


def sizes(recipe: Recipe, store: Store, name: str, of: Mapping[str, Any]) -> list[str]:
    """Thousands of trained parameters, and thousands of bytes of the file."""
    key = trained(recipe, store, name, next(iter(of)), recipe["seeds"][0])
    made = (store.get(key) if key else None) or {}
    return [f"{made['parameters'] / 1e3:.0f}", f"{made['file_bytes'] / 1e3:.0f}"]


def tried(recipe: Recipe, store: Store, name: str, of: Mapping[str, Any]) -> str:
    """The best learning rate on each set of pictures, and how many were tried there."""
    method = recipe["methods"][name]
    cells = []
    for data in of:
        found = losses(recipe, method, store, keys_for(data))
        cells.append(f"{min(found, key=lambda rate: found[rate]):g} ({len(found)})")
    return ", ".join(cells)
