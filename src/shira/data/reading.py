"""Read examples from JSONL, JSON, CSV, Parquet and data sets of the `datasets` library. Errors name the bad row."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, MissingExtra, did_you_mean
from ..files.paths import nearby
from .commonsense import COMMONSENSE
from .quiet import quiet
from .rows import COLUMNS, EXPECTED, example_of
from .tasks import TASKS, Example
from .textfiles import FileRow, csv_rows, json_rows

__all__ = ["FILES", "examples_of", "read_examples"]

BUILT_IN = {**TASKS, **COMMONSENSE}
FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
# name@revision:configuration:split[slice]; only the name is required
DATA_SET = re.compile(r"(?P<name>[^:@]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:\[]+)(?=:))?(:(?P<split>[^:\[]+(\[.*\])?))?")


def examples_of(data: str, part: Literal["train", "test"]) -> Iterator[Example]:
    """Examples of a built-in task, its training or its held-out part; or all of a file or data set (`read_examples`).

    Raises DataError if `data` is none of these or holds no example; and at a row that cannot be used.
    """
    if data in BUILT_IN:
        return iter(BUILT_IN[data].train() if part == "train" else BUILT_IN[data].test())
    return read_examples(data)


def read_examples(data: str | Path) -> Iterator[Example]:
    """Examples of a JSONL, JSON, CSV or Parquet file, or of a data set: a folder or hub id, such as `org/name:train[:10%]`.

    A row holds one of the forms that `rows.example_of` lists. Other columns are not read. One row is in memory at a time; with
    Parquet, a thousand rows are.

    Raises DataError that names the file and the line or row; MissingExtra if a library is not installed; OSError if a file
    cannot be read.
    """
    data = str(data)
    if not Path(data).is_file():
        return _examples(data, _data_set(data))
    readers = {".parquet": _parquet, ".csv": csv_rows, ".tsv": csv_rows}
    return _examples(data, readers.get(Path(data).suffix.lower(), json_rows)(data))


def _examples(data: str, rows: Iterator[FileRow]) -> Iterator[Example]:
    found = False
    for origin, row in rows:
        found = True
        yield example_of(row, origin)
    if not found:
        raise DataError(f"{data} holds no example")


def _parquet(path: str) -> Iterator[FileRow]:
    arrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (arrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system; pyarrow's own are OSErrors, too
            raise
        raise DataError(f"{path} is not a whole Parquet file: {' '.join(str(error).split())}") from error


def _data_set(data: str) -> Iterator[FileRow]:
    """Rows of a data set on the hub, in a folder of files, or in a folder that `save_to_disk` wrote; `datasets` maps them."""
    parts = DATA_SET.fullmatch(data)
    name = parts["name"] if parts else data
    local = Path(name).is_dir()
    if parts is None or not (local or "/" in name) or name.endswith(FILES):
        raise DataError(
            f"{data!r} is neither a file nor a built-in task; {did_you_mean(data, [*BUILT_IN, *nearby(data, FILES)])}; a data "
            "set is named 'org/name:train'"
        )
    datasets = _library("datasets")
    try:
        with quiet(datasets):
            if local and any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(name)
                if isinstance(loaded, dict):
                    loaded = loaded[parts["split"] or "train"]
                elif parts["split"]:
                    raise ValueError(f"it is one split; leave out ':{parts['split']}'")
            else:
                revision, split = parts["revision"], parts["split"] or "train"
                loaded = datasets.load_dataset(name, parts["config"], split=split, revision=revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        hides = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None
        cause = error.__cause__ if hides else error  # "An error occurred while generating the dataset" says nothing
        what = " ".join(str(cause).split())[:500]
        raise DataError(f"cannot load the data set {data!r}: {type(cause).__name__}: {what}") from error
    for number, row in enumerate(loaded.select_columns(_columns(data, loaded.column_names)), start=1):
        yield f"{data}, row {number}", row


def _columns(data: str, names: list[str]) -> list[str]:
    chosen = [name for name in names if name in COLUMNS]
    if not chosen:
        raise DataError(f"{data}: expected the columns {EXPECTED}; found {', '.join(map(repr, names)) or 'none'}")
    return chosen


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtra(f"this data needs {name}: pip install 'shira-adapters[train]' ({error})") from error
