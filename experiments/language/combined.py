"""Tables 2 and 3: one adapter for all benchmarks, every method with as many parameters, a learning rate of its own, and the same
questions."""

from collections.abc import Iterator
from typing import Any

from experiments.store import Key, Store, number

from .runs import rates_to_try, score_key, train_key
from .settings import Recipe

__all__ = ["best_rate", "wanted"]


def wanted(recipe: Recipe, store: Store) -> Iterator[Key]:
    """The base's score; for each method the search for its rate, on the first seed; then its scores on all of its seeds."""
    yield score_key(recipe, [], recipe["data"])
    first = recipe["seeds"][0]
    for name, method in recipe["methods"].items():
        searched = [train_key(recipe, method, rate, first) for rate in rates(recipe, method, store)]
        yield from searched
        if any(store.get(key) is None for key in searched):
            continue
        yield from scored(recipe, store, name, first)
    for seed in sorted({seed for seeds in recipe["more_seeds"].values() for seed in seeds}):
        for name in (name for name, seeds in recipe["more_seeds"].items() if seed in seeds):
            if best_rate(recipe, recipe["methods"][name], store) is not None:
                yield from scored(recipe, store, name, seed)


def scored(recipe: Recipe, store: Store, name: str, seed: int) -> Iterator[Key]:
    """The run of a method at its best rate, and its score."""
    rate = best_rate(recipe, recipe["methods"][name], store)
    assert rate is not None
    trained = train_key(recipe, recipe["methods"][name], rate, seed)
    yield trained
    if store.get(trained) is not None:
        yield score_key(recipe, [number(trained)], recipe["data"])


def losses(recipe: Recipe, method: dict[str, Any], store: Store) -> dict[float, float]:
    """Learning rate -> loss on the validation questions, as far as they were tried."""
    found: dict[float, float] = {}
    while True:
        tried = rates_to_try(method["rates"], found, recipe["most_rates"])
        new = [rate for rate in tried if rate not in found]
        for rate in new:
            result = store.get(train_key(recipe, method, rate, recipe["seeds"][0]))
            if result is not None:
                found[rate] = result["validation_loss"]
        if not new or not all(rate in found for rate in new):
            return found


def rates(recipe: Recipe, method: dict[str, Any], store: Store) -> list[float]:
    return rates_to_try(method["rates"], losses(recipe, method, store), recipe["most_rates"])


def best_rate(recipe: Recipe, method: dict[str, Any], store: Store) -> float | None:
    """The learning rate of the lowest validation loss, or None while some are untried."""
    found = losses(recipe, method, store)
    if any(rate not in found for rate in rates_to_try(method["rates"], found, recipe["most_rates"])):
        return None
    return min(found, key=lambda rate: found[rate])


def report(recipe: Recipe, store: Store, plots: Any) -> str:
    return ""
