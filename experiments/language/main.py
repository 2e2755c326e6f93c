"""Run a recipe: make the runs that are not in the results yet, then the tables."""

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.store import Key, Store, number, work
from shira.errors import DataError

from .runs import Lab
from .settings import Recipe, named, recipes

__all__ = ["PAGES", "main", "recipes"]

PAGES = ("results/benchmarks.md", "results/density.md", "results/fusion.md", "results/heads.md", "styles.md")  # of docs


def main(
    name: str,
    results: Path,
    *,
    run: bool = True,
    again: str | None = None,
    plots: Path | None = None,
    on_run: Callable[[str, int], None] = lambda label, left: None,
    on_failure: Callable[[str, str], None] = lambda label, what: None,
) -> str:
    """Make the runs of a recipe that the results lack, and return its tables in Markdown. on_run and on_failure: see `work`.

    again: the number of a run to remove from the results first. Raises DataError if that run or the recipe does not exist.
    """
    recipe = named(name)
    experiment = experiment_of(recipe)
    store = Store(results)
    if again and not store.forget(lambda line: line["run"] == again):
        raise DataError(f"{results}: no run {again!r}")
    if run:
        lab = getattr(experiment, "Lab", Lab)(store)
        wanted, said = functools.partial(experiment.wanted, recipe, store), getattr(experiment, "label", label)
        work(wanted, lab.run, store, lambda k, left: on_run(said(k), left), lambda k, what: on_failure(said(k), what))
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
    text: str = experiment.report(recipe, store, plots)
    return text


def experiment_of(recipe: Recipe) -> Any:
    """The module of a recipe's experiment: "image.classify" is in another folder of experiments, "combined" is in this one."""
    name = recipe["experiment"]
    return importlib.import_module(f"experiments.{name}" if "." in name else f"experiments.language.{name}")


def label(key: Key) -> str:
    """A short description of a run."""
    if key["kind"] == "train":
        made = key["method"].get("peft") or key["method"]["options"].get("mask")
        return f"{number(key)}: train {made} on {key['data']}, rate {key['rate']:g}, seed {key['seed']}"
    if key["kind"] == "compare":
        return f"{number(key)}: compare {', '.join(key['adapters'])}"
    return f"{number(key)}: score {' + '.join(key['adapters']) or 'the base'} on {key['on']}"


def fill(text: str, results: Path) -> str:
    """The text with new tables of these results between its marks, <!-- NAME --> … <!-- end -->."""

    def table(mark: re.Match[str]) -> str:
        made = main(mark[1], results / f"{mark[1]}.jsonl", run=False)
        return f"<!-- {mark[1]} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":  # the pages and their plots
    root = Path(__file__).parents[2]
    stored = root / "experiments" / "language" / "results"
    for page in (root / "docs" / name for name in PAGES):
        text = fill(page.read_text(encoding="utf-8"), stored)
        page.write_text(text, encoding="utf-8")
        for name in re.findall(r"pictures/([a-z0-9-]+)\.png\)", text):
            if name in recipes():
                main(name, stored / f"{name}.jsonl", run=False, plots=root / "docs" / "pictures")
