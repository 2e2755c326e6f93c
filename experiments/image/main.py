"""Run or resume the style experiment; then its tables, and its grids with an HTML page."""

from collections.abc import Callable
from pathlib import Path

from experiments.store import Key, Store, number, work
from shira.errors import DataError
from shira.runs.recipes import read_settings

from . import style_report
from .emoji import quiet
from .style_runs import Lab, wanted

__all__ = ["RECIPE", "main"]

RECIPE = Path(__file__).parent / "styles.yaml"


def main(
    recipe_file: Path,
    results: Path,
    *,
    run: bool = True,
    again: str | None = None,
    plots: Path | None = None,
    on_run: Callable[[str, int], None] = lambda label, left: None,
    on_failure: Callable[[str, str], None] = lambda label, what: None,
) -> str:
    """Make the runs that the results lack, and return the tables in Markdown. on_run and on_failure: see `work`.

    again: the number of a run to remove from the results first. plots: a folder for the grids and styles.html.
    Raises DataError if that run does not exist, or if the emoji model is not trained.
    """
    quiet()
    recipe = read_settings(recipe_file)
    store = Store(results)
    if again and not store.forget(lambda line: line["run"] == again):
        raise DataError(f"{results}: no run {again!r}")
    lab = Lab(recipe, store)
    if run:
        work(
            lambda: wanted(recipe, store),
            lab.run,
            store,
            lambda key, left: on_run(label(key), left),
            lambda key, what: on_failure(label(key), what),
        )
    found = style_report.tables(recipe, store)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        grids = style_report.pictures(lab, plots)
        (plots / "styles.html").write_text(style_report.page(found, grids), encoding="utf-8")
    return style_report.in_markdown(found)


def label(key: Key) -> str:
    """A short description of a run."""
    if key["kind"] == "train":
        made = "LoRA" if "lora" in key["method"] else key["method"]["mask"]
        return f"{number(key)}: train {made} on {key['size']} of {key['style']}, learning rate {key['rate']:g}"
    used = " + ".join(f"{each['strength']:g} {each['run']}" for each in key["adapters"])
    return f"{number(key)}: draw {used or 'the base'}"
