"""The learning rate of each method, by the loss on validation examples: as many tries for all."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.store import Key, Store

from .runs import train_key
from .settings import Recipe

__all__ = ["best_rate", "losses", "rates", "rates_to_try"]

Method = Mapping[str, Any]
KeysOf = Callable[[Recipe, Method, float, int], list[Key]]  # (recipe, method, learning rate, seed) -> what decides the runs


def one(recipe: Recipe, method: Method, rate: float, seed: int) -> list[Key]:
    """One adapter for all that the recipe has."""
    return [train_key(recipe, method, rate, seed)]


def rates_to_try(first: Iterable[float], losses: Mapping[float, float], most: int) -> list[float]:
    """The learning rates whose losses are wanted: the first ones; then, while the best is the highest or the lowest, one
    beyond it by a factor of two, up to so many in all."""
    tried = list(first)
    while all(rate in losses for rate in tried) and len(tried) < most:
        best = min(tried, key=lambda rate: losses[rate])
        if best not in (min(tried), max(tried)):
            break
        tried.append(2 * best if best == max(tried) else best / 2)
    return tried


def wanted_rates(recipe: Recipe, method: Method, found: Mapping[float, float]) -> list[float]:
    """The learning rates to try, after these losses; a method may say itself how many, to be run at one that lost a search."""
    return rates_to_try(method["rates"], found, method.get("most_rates", recipe["most_rates"]))


def losses(recipe: Recipe, method: Method, store: Store, keys: KeysOf = one) -> dict[float, float]:
    """Learning rate -> loss on the validation examples, a mean over the runs, as far as they were tried, on the first seed."""
    found: dict[float, float] = {}
    while True:
        tried = wanted_rates(recipe, method, found)
        new = [rate for rate in tried if rate not in found]
        for rate in new:
            results = [store.get(key) for key in keys(recipe, method, rate, recipe["seeds"][0])]
            if all(results):
                found[rate] = statistics.fmean(result["validation_loss"] for result in results if result)
        if not new or not all(rate in found for rate in new):
            return found


def rates(recipe: Recipe, method: Method, store: Store, keys: KeysOf = one) -> list[float]:
    """The learning rates to try, as far as can be said by now."""
    return wanted_rates(recipe, method, losses(recipe, method, store, keys))


def best_rate(recipe: Recipe, method: Method, store: Store, keys: KeysOf = one) -> float | None:
    """The learning rate of the lowest validation loss, or None while some are untried."""
    found = losses(recipe, method, store, keys)
    if any(rate not in found for rate in wanted_rates(recipe, method, found)):
        return None
    return min(found, key=lambda rate: found[rate])
