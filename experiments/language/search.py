"""Search each method's learning rate by the loss on validation examples, with the same number of tries for all methods."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.store import Key, Store

from .runs import train_key
from .settings import Recipe

__all__ = ["best_rate", "losses", "rates", "rates_to_try"]

Method = Mapping[str, Any]
KeysOf = Callable[[Recipe, Method, float, int], list[Key]]  # (recipe, method, learning rate, seed) -> the keys of the runs


def one(recipe: Recipe, method: Method, rate: float, seed: int) -> list[Key]:
    """One run: an adapter for all data of the recipe."""
    return [train_key(recipe, method, rate, seed)]


def rates_to_try(first: Iterable[float], losses: Mapping[float, float], most: int) -> list[float]:
    """The learning rates to try, at most `most` in all.

    These are the first ones; then, while the best one is the highest or the lowest, one beyond it by a factor of two.
    """
    tried = list(first)
    while all(rate in losses for rate in tried) and len(tried) < most:
        best = min(tried, key=lambda rate: losses[rate])
        if best not in (min(tried), max(tried)):
            break
        tried.append(2 * best if best == max(tried) else best / 2)
    return tried


def wanted_rates(recipe: Recipe, method: Method, found: Mapping[float, float]) -> list[float]:
    """The learning rates to try, given these losses. A method may have its own `most_rates`, such as 1 for one given rate."""
    return rates_to_try(method["rates"], found, method.get("most_rates", recipe["most_rates"]))


def losses(recipe: Recipe, method: Method, store: Store, keys: KeysOf = one) -> dict[float, float]:
    """Learning rate -> loss on the validation examples, for the rates tried so far: on the first seed, a mean over the runs."""
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
    """The learning rates to try, as far as they follow from the results so far."""
    return wanted_rates(recipe, method, losses(recipe, method, store, keys))


def best_rate(recipe: Recipe, method: Method, store: Store, keys: KeysOf = one) -> float | None:
    """The learning rate with the lowest validation loss, or None while some rates have not been tried."""
    found = losses(recipe, method, store, keys)
    if any(rate not in found for rate in wanted_rates(recipe, method, found)):
        return None
    return min(found, key=lambda rate: found[rate])
