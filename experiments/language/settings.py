"""Recipes: what an experiment does, as YAML; a recipe may extend another and say only what differs."""

from pathlib import Path
from typing import Any

from shira.errors import DataError, did_you_mean
from shira.runs.recipes import read_settings

__all__ = ["Recipe", "named", "read", "recipes"]

Recipe = dict[str, Any]
FOLDER = Path(__file__).parent / "recipes"


def recipes() -> dict[str, str]:
    """Name -> one line on each recipe that is here."""
    return {path.stem: str(read(path).get("about", "")) for path in sorted(FOLDER.glob("*.yaml"))}


def named(name: str) -> Recipe:
    """A recipe by its name here, or a YAML file. Raises DataError if there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.exists():
        raise DataError(f"no experiment {name!r}; {did_you_mean(name, [p.stem for p in FOLDER.glob('*.yaml')])}")
    return read(path)


def read(path: Path) -> Recipe:
    """A recipe with what it extends. Raises DataError for a setting that the extended one lacks, unless it is of another
    experiment."""
    own = read_settings(path)
    if "extends" not in own:
        return own
    base = read(path.parent / f"{own.pop('extends')}.yaml")
    for name in own:
        if name not in base and "experiment" not in own:
            raise DataError(f"{path}: unknown setting {name!r}; {did_you_mean(str(name), base)}")
    return base | own
