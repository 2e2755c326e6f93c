"""Styles on the emoji model: `shira experiment image`. The runs are in `style_runs`, tables and grids in `style_report`."""

from pathlib import Path

from experiments.store import Key, Store, number

from . import style_report
from .emoji import hide_library_output
from .style_runs import Lab, Recipe, wanted

__all__ = ["Lab", "label", "report", "wanted"]


def report(recipe: Recipe, store: Store, plots: Path | None) -> str:
    """The tables in Markdown. plots: a folder for the grids and styles.html."""
    found = style_report.tables(recipe, store)
    if plots is not None:
        hide_library_output()
        grids = style_report.pictures(Lab(store), recipe, plots)
        (plots / "styles.html").write_text(style_report.page(found, grids), encoding="utf-8")
    return style_report.in_markdown(found)


def label(key: Key) -> str:
    """A short description of a run."""
    if key["kind"] == "train":
        made = "LoRA" if "lora" in key["method"] else key["method"]["mask"]
        return f"{number(key)}: train {made} on {key['size']} of {key['style']}, learning rate {key['rate']:g}"
    if key["kind"] == "judges":
        return f"{number(key)}: train the judges"
    used = " + ".join(f"{each['strength']:g} {each['run']}" for each in key["adapters"])
    return f"{number(key)}: draw {used or 'the base'}"
