"""When and how a mask is chosen, at equal compute. The yardstick is the loss on validation questions.

That loss tells methods apart better than accuracy does. The learning rates are chosen by it, on the first seed.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

from experiments.intervals import half_width
from experiments.store import Key, Store

from .runs import train_key
from .search import best_rate, losses, rates
from .settings import Recipe
from .tables import markdown

__all__ = ["report", "wanted"]


def one(recipe: Recipe, method: Recipe, rate: float, seed: int) -> list[Key]:
    """The run of a method, which has its own number of steps."""
    return [train_key(recipe | {"steps": method["steps"]}, method, rate, seed)]


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """Each method's search for its learning rate, on the first seed; then the best one on the other seeds."""
    for method in recipe["methods"].values():
        for rate in rates(recipe, method, store, one):
            yield from one(recipe, method, rate, recipe["seeds"][0])
    for seed in recipe["seeds"]:
        for method in recipe["methods"].values():
            rate = best_rate(recipe, method, store, one)
            if rate is not None:
                yield from one(recipe, method, rate, seed)


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """The losses, and their differences to those of one method, seed by seed: a mean and its 95 % interval (Student's t)."""
    found = {name: by_seed(recipe, store, name) for name in recipe["methods"]}
    against, lines = recipe["compare_with"], []
    for name, of_seeds in found.items():
        if not of_seeds:
            continue
        method = recipe["methods"][name]
        apart = [of_seeds[seed] - found[against][seed] for seed in of_seeds if seed in found[against]]
        rate, tried = best_rate(recipe, method, store, one), losses(recipe, method, store, one)
        mean = f"{statistics.fmean(of_seeds.values()):.3f}"
        lines.append([name, f"{method['steps']}", f"{rate:g} ({len(tried)})", f"{len(of_seeds)}", mean])
        lines[-1].append("" if name == against else interval(apart))
    if not lines:
        return "no results yet"
    return markdown(["mask", "steps", "rate (tried)", "seeds", "validation loss", f"minus {against}"], lines)


def by_seed(recipe: Recipe, store: Store, name: str) -> dict[int, float]:
    """Seed -> the loss on the validation questions, at the best learning rate."""
    method, found = recipe["methods"][name], {}
    rate = best_rate(recipe, method, store, one)
    for seed in recipe["seeds"] if rate is not None else ():
        (key,) = one(recipe, method, rate, seed)
        result = store.get(key)
        if result is not None:
            found[seed] = result["validation_loss"]
    return found


def interval(apart: list[float]) -> str:
    """A mean and its 95 % interval: '+0.012 ± 0.004'."""
    if len(apart) < 2:
        return f"{apart[0]:+.3f}" if apart else ""
    return f"{statistics.fmean(apart):+.3f} ± {half_width(apart):.3f}"
