"""Recipes: the settings of an experiment, as YAML. A recipe may extend another one, and then has only what differs."""

from pathlib import Path
from typing import Any

from shira.errors import DataError, did_you_mean
from shira.runs.recipes import read_settings

__all__ = ["Recipe", "named", "read", "recipes"]

Recipe = dict[str, Any]
FOLDER = Path(__file__).parent / "recipes"


def recipes() -> dict[str, str]:
    """Name -> one line about the recipe, for all recipes in the recipes folder."""
    return {path.stem: str(read(path).get("about", "")) for path in sorted(FOLDER.glob("*.yaml"))}


def named(name: str) -> Recipe:
    """The recipe of this name, or in this YAML file. Raises DataError if it does not exist."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        raise DataError(f"no experiment {name!r}; {did_you_mean(name, [p.stem for p in FOLDER.glob('*.yaml')])}")
    return read(path)


def read(path: Path) -> Recipe:
    """A recipe, completed with the one that it extends.

    Raises DataError for a setting that the extended recipe lacks, unless the recipe is of another experiment.
    """
    own = read_settings(path)
    if "extends" not in own:
        return own
    base = read(path.parent / f"{own.pop('extends')}.yaml")
    for name in own:
        if name not in base and "experiment" not in own:
            raise DataError(f"{path}: unknown setting {name!r}; {did_you_mean(str(name), base)}")
    return base | own
