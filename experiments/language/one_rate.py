"""Whether one learning rate does for all masks, with `lr_scale="auto"`: beside each mask's best, and beside one fixed rate.

Five ways to train each mask on each task: at its own best learning rate, searched with lr_scale 1; with lr_scale "auto" at the
learning rate of `shira train`, at LoRA's best on that task, and at half of that; and with lr_scale 1 at a fixed learning rate.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.store import Key, Store, number

from .runs import score_key, train_key
from .search import best_rate, rates
from .settings import Recipe
from .tables import Answers, average, difference, markdown, points, share

__all__ = ["report", "wanted"]

WAYS = ("best", "given", "lora", "fixed", "half")


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The searches on the first seed; then one way after another, with its scores, on all seeds."""
    first = recipe["seeds"][0]
    for task in recipe["data"]:
        yield score_key(recipe, [], task)
    for method in recipe["methods"].values():
        for task in recipe["data"]:
            of_task = recipe | {"data": task}
            yield from (train_key(of_task, method, rate, first) for rate in rates(of_task, method, store))
    for way in WAYS:
        for seed in recipe["seeds"]:
            for name in recipe["methods"]:
                for task in recipe["data"]:
                    trained = run_of(recipe, store, name, task, way, seed)
                    if trained is not None:
                        yield trained
                        if store.get(trained) is not None:
                            yield score_key(recipe, [number(trained)], task)


def run_of(recipe: Recipe, store: Store, name: str, task: str, way: str, seed: int) -> Key | None:
    """The training run of a method in one of the WAYS; None if LoRA has none, or if a search is not finished."""
    method: dict[str, Any] = recipe["methods"][name]
    of_task = recipe | {"data": task}
    if name == "lora" and way != "best":
        return None
    if way in ("given", "fixed"):
        rate = recipe[way]
    else:
        rate = best_rate(of_task, method if way == "best" else recipe["methods"]["lora"], store)
    if rate is None:
        return None
    if way == "half":
        rate /= 2
    if way in ("given", "lora", "half"):
        method = method | {"options": method["options"] | {"lr_scale": "auto"}}
    return train_key(of_task, method, rate, seed)


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """Accuracies in %; and how far each way is from the mask's own best learning rate, question by question."""
    lines = []
    for name in recipe["methods"]:
        found = {way: answers(recipe, store, name, way) for way in WAYS}
        if not found["best"]:
            continue
        tried = [best_rate(recipe | {"data": task}, recipe["methods"][name], store) for task in recipe["data"]]
        best = [", ".join("?" if rate is None else f"{rate:g}" for rate in tried), scales(recipe, store, name)]
        apart = [compared(found[way], found["best"]) for way in WAYS[1:]]
        lines.append([name, *best, f"{len(found['best'])}", share(*average(found["best"])), *apart])
    if not lines:
        return "no results yet"
    head = ["mask", f"best rates: {', '.join(recipe['data'])}", "lr_scale", "runs", "its own best, %"]
    ways = [f"none given ({recipe['given']:g})", "LoRA's best", f"fixed {recipe['fixed']:g}, lr_scale 1", "half of LoRA's best"]
    return markdown([*head, *ways], lines)


def compared(ours: Answers, best: Answers) -> str:
    """The difference in points over the runs that both have, and their number."""
    both = ours.keys() & best.keys()
    return f"{points(*difference({run: ours[run] for run in sorted(both)}, best))} in {len(both)}" if both else ""


def answers(recipe: Recipe, store: Store, name: str, way: str) -> dict[str, list[float]]:
    """Task and seed -> for each question, whether it was answered correctly, for the runs that have been scored."""
    found = {}
    for task in recipe["data"]:
        for seed in recipe["seeds"]:
            trained = run_of(recipe, store, name, task, way, seed)
            score = store.get(score_key(recipe, [number(trained)], task)) if trained is not None else None
            if score is not None:
                found[f"{task} {seed}"] = [float(digit) for digit in score["right"][task]]
    return found


def scales(recipe: Recipe, store: Store, name: str) -> str:
    """The scales that "auto" has chosen."""
    keys = [run_of(recipe, store, name, task, "given", seed) for task in recipe["data"] for seed in recipe["seeds"]]
    made = [result for key in keys if key is not None and (result := store.get(key)) is not None]
    return ", ".join(f"{scale:g}" for scale in sorted({result["lr_scale"] for result in made}))
