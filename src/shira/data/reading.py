"""Read examples from JSONL, Parquet and data sets of the `datasets` library, one at a time. Errors name the bad row."""

import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, MissingExtra, did_you_mean
from ..texts import shown
from .commonsense import COMMONSENSE
from .quiet import quiet
from .tasks import TASKS, Example

__all__ = ["example_of", "examples_of", "read_examples"]

COLUMNS = ("messages", "prompt", "completion", "choices", "label", "text")
EXPECTED = "'messages'; 'prompt' and 'completion'; 'prompt', 'choices' and 'label'; or 'text'"
BUILT_IN = {**TASKS, **COMMONSENSE}
FILES = (".jsonl", ".json", ".parquet")
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
    """Examples of a JSONL or Parquet file, or of a data set: a folder or hub id, such as `org/name:train[:10%]`.

    A row holds {"messages"}, {"prompt", "completion"} (strings, or lists of messages), {"prompt", "choices", "label"}, or
    {"text"}. Other columns are not read. One row is in memory at a time; with Parquet, a thousand rows are.

    Raises DataError that names the file and the line or row; MissingExtra if a library is not installed; OSError if a file
    cannot be read.
    """
    data = str(data)
    read = _data_set if not Path(data).is_file() else _parquet if data.endswith(".parquet") else _jsonl
    return _examples(data, read(data))


def _examples(data: str, rows: Iterator[tuple[str, object]]) -> Iterator[Example]:
    found = False
    for origin, row in rows:
        found = True
        yield example_of(row, origin)
    if not found:
        raise DataError(f"{data} holds no example")


def _jsonl(path: str) -> Iterator[tuple[str, object]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                origin = f"{path}, line {number}"
                try:
                    yield origin, json.loads(line)
                except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
                    raise DataError(f"{origin}: expected a JSON object with {EXPECTED}; it is not JSON ({error})") from error


def _parquet(path: str) -> Iterator[tuple[str, object]]:
    arrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except arrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from error


def _data_set(data: str) -> Iterator[tuple[str, object]]:
    """Rows of a data set on the hub, in a folder of files, or in a folder that `save_to_disk` wrote; `datasets` maps them."""
    parts = DATA_SET.fullmatch(data)
    name = parts["name"] if parts else data
    local = Path(name).is_dir()
    if parts is None or not (local or "/" in name) or name.endswith(FILES):
        raise DataError(
            f"{data!r} is neither a file nor a built-in task; {did_you_mean(data, BUILT_IN)}; a data set is named "
            "'org/name:train'"
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
        what = " ".join(str(error).split())
        raise DataError(f"cannot load the data set {data!r}: {type(error).__name__}: {what}") from error
    for number, row in enumerate(loaded.select_columns(_columns(data, loaded.column_names)), start=1):
        yield f"{data}, row {number}", row


def _columns(data: str, names: list[str]) -> list[str]:
    chosen = [name for name in names if name in COLUMNS]
    if not chosen:
        raise DataError(f"{data}: expected the columns {EXPECTED}; found {', '.join(map(repr, names)) or 'none'}")
    return chosen


def example_of(row: object, origin: str) -> Example:
    """The example that a row holds. Raises DataError, which begins with the origin, if the row holds none."""
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: expected an object with {EXPECTED}; found {shown(row)}")
    row = {key: value for key, value in row.items() if value is not None}  # tables hold null where a value is missing
    try:
        if "choices" in row:
            return _question(row, origin)
        if "messages" in row:
            return _chat((), _messages(row["messages"], "messages"), origin)
        if "text" in row:
            return Example(completion=_text(row["text"], "text"), origin=origin)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            return _chat(_messages(prompt, "prompt"), _messages(completion, "completion"), origin)
        return Example(_text(prompt, "prompt"), _text(completion, "completion"), origin=origin)
    except KeyError as error:
        found = ", ".join(map(repr, row)) or "nothing"
        raise DataError(f"{origin}: expected {EXPECTED}; found {found}, but no {error}") from error
    except TypeError as error:
        raise DataError(f"{origin}: {error}") from error


def _question(row: Mapping[str, Any], origin: str) -> Example:
    choices, label = row["choices"], row["label"]
    if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) for c in choices)):
        raise TypeError(f"'choices' must be a list of at least two strings, found {shown(choices)}")
    if type(label) is not int or not 0 <= label < len(choices):
        raise TypeError(f"label must be from 0 to {len(choices) - 1}, found {shown(label)}")
    return Example(_text(row["prompt"], "prompt"), choices[label], tuple(choices), label, origin=origin)


def _chat(prompt: tuple[dict[str, Any], ...], completion: tuple[dict[str, Any], ...], origin: str) -> Example:
    if not any(message["role"] == "assistant" for message in completion):
        raise TypeError(
            "expected a turn of the role 'assistant' to learn from; found " + shown([m["role"] for m in completion])
        )
    return Example(messages=prompt + completion, first=len(prompt), origin=origin)


def _messages(value: object, column: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise TypeError(f"expected '{column}' to be a list of messages, found {shown(value)}")
    messages = []
    for number, message in enumerate(value, start=1):
        fits = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits:
            raise TypeError(
                f"message {number} of '{column}' must have 'role' and 'content', two strings; found {shown(message)}"
            )
        messages.append({key: part for key, part in message.items() if part is not None})
    return tuple(messages)


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"'{column}': expected a string, found {shown(value)}")
    return value


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtra(f"this data needs {name}: pip install 'shira-adapters[train]' ({error})") from error
