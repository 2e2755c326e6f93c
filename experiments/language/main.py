"""Run a recipe: what is not in the results yet, then the tables."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.store import Key, Store, number, work
from shira.errors import DataError

from .runs import Lab
from .settings import named, recipes

__all__ = ["main", "recipes"]


def main(
    name: str,
    results: Path,
    *,
    run: bool = True,
    again: str | None = None,
    plots: Path | None = None,
    on_run: Callable[[str, int], None] = lambda label, left: None,
) -> str:
    """Make the runs of a recipe that the results lack, and return its tables in Markdown.

    Raises DataError for a recipe, or a run to be made again, that does not exist.
    """
    recipe = named(name)
    experiment: Any = importlib.import_module(f"experiments.language.{recipe['experiment']}")
    store = Store(results)
    if again and not store.forget(lambda line: line["run"] == again):
        raise DataError(f"{results}: no run {again!r}")
    if run:
        lab = Lab(store)
        work(lambda: experiment.wanted(recipe, store), lab.run, store, lambda key, left: on_run(label(key), left))
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
    text: str = experiment.report(recipe, store, plots)
    return text


def label(key: Key) -> str:
    """A run in a few words."""
    if key["kind"] == "train":
        made = key["method"].get("peft") or key["method"]["options"].get("mask")
        return f"{number(key)}: train {made} on {key['data']}, rate {key['rate']:g}, seed {key['seed']}"
    if key["kind"] == "compare":
        return f"{number(key)}: compare {', '.join(key['adapters'])}"
    return f"{number(key)}: score {' + '.join(key['adapters']) or 'the base'} on {key['on']}"
