"""Rows of text files, one at a time, each with its file and line: JSON lines, a JSON list, and CSV with a header."""

import csv
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, TextIO

from ..errors import DataError
from ..texts import shown
from .rows import COLUMNS, EXPECTED

__all__ = ["FileRow", "csv_rows", "json_rows"]

FileRow = tuple[str, object]  # (file and line, content)

PIECE = 2**20  # characters of a JSON list that are read at a time
SIGN = re.compile(r"\s*(\[\s*\]|[\[,\]])\s*")  # what stands before a row of a list, and at its end
LONGEST = 2**31 - 1  # characters of a cell; Python's own limit is 131,072
SEPARATORS = ",;\t"  # that of a file is the one that its header has most often
NESTED = ("messages", "conversations", "choices")  # columns whose cells hold JSON


def json_rows(path: str) -> Iterator[FileRow]:
    """Rows of a JSON file: those of one list, if the file begins with '[', and otherwise one a line."""
    with open(path, "rb") as file:
        begins = next((sign for line in file if (sign := line.removeprefix(BOM_UTF8).lstrip()[:1])), b"")
    return _listed(path) if begins == b"[" else _lines(path)


def _lines(path: str) -> Iterator[FileRow]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                origin = f"{path}, line {number}"
                try:
                    yield origin, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
                    what = f"expected a JSON object with {EXPECTED}; it is not JSON in UTF-8"
                    raise DataError(f"{origin}: {what} ({error})") from error


def _listed(path: str) -> Iterator[FileRow]:
    """Rows of one JSON list. A row, and a piece of the file behind it, are in memory."""
    decoder, before = json.JSONDecoder(), "["
    with open(path, encoding="utf-8-sig") as file:
        text, at, line = "", 0, 1  # `at` is the end of the row before, in this line of the file
        while True:
            sign = SIGN.match(text, at)
            if sign and (sign[1][0] == "[" or before == ",") and sign[1][-1] == "]":
                break
            try:
                if not sign or sign[1] != before:
                    raise ValueError(f"expected {before!r}")
                row, end = decoder.raw_decode(text, sign.end())
            except (ValueError, RecursionError) as error:
                more = _read(file, max(PIECE, len(text) - at), path, line)
                if not more:
                    what = f"expected a list of JSON objects with {EXPECTED}; it is not JSON"
                    raise DataError(f"{path}, after line {line}: {what} ({error})") from error
                text, at = text[at:] + more, 0
                continue
            yield f"{path}, line {line + text.count(chr(10), at, sign.end())}", row
            line, at, before = line + text.count("\n", at, end), end, ","
        if text[sign.end() :].strip() or _read(file, PIECE, path, line).strip():
            raise DataError(f"{path}, after line {line}: expected the end of the file after the list, found more")


def _read(file: TextIO, count: int, path: str, line: int) -> str:
    try:
        return file.read(count)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {line}: the file is not UTF-8 ({error}); save it as UTF-8") from error


def csv_rows(path: str) -> Iterator[FileRow]:
    """Rows of a table with a header. An empty cell counts as missing; a list, such as `choices`, is JSON in its cell.

    Raises DataError for a table without a known column, and at a row with fewer or more cells than the header.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = _read(file, PIECE, path, 1).partition("\n")[0]
        file.seek(0)
        reader = csv.reader(file, delimiter=max(SEPARATORS, key=header.count), strict=True)
        names = [name.strip() for name in _cells(reader, f"{path}, line 1") or []]
        found = ", ".join(map(shown, names)) or "none"
        if not set(names) & set(COLUMNS):
            raise DataError(f"{path}, line 1: expected a header with the columns {EXPECTED}; found {found}")
        if len(set(names)) < len(names):
            raise DataError(f"{path}, line 1: expected each column once; found {found}")
        while True:
            origin = f"{path}, line {reader.line_num + 1}"
            cells = _cells(reader, origin)
            if cells is None:
                return
            if len(cells) not in (0, len(names)):
                raise DataError(f"{origin}: expected {len(names)} cells, for {found}; found {len(cells)}")
            if cells:
                yield origin, {name: _value(name, cell, origin) for name, cell in zip(names, cells, strict=True)}


def _cells(reader: Any, origin: str) -> list[str] | None:
    """The next row; None after the last."""
    before = csv.field_size_limit(LONGEST)  # of all readers of the process
    try:
        return next(reader, None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{origin}: it is not CSV in UTF-8 ({error}); quote cells that hold quotes or separators") from error
    finally:
        csv.field_size_limit(before)


def _value(name: str, cell: str, origin: str) -> object:
    try:
        if name == "label" and cell.strip().isdecimal():
            return int(cell)
        if name in NESTED and cell:
            return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: expected JSON in the column '{name}', found {shown(cell)} ({error})") from error
    return cell or None
