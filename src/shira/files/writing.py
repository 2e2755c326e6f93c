"""Writing an adapter's file, one tensor at a time. The file appears under its name complete, or not at all."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import AdapterError
from ..sparse.positions import checksum, frequency_of, seed_of
from ..sparse.tensor import SparseTensor
from ..texts import shown, strict_json
from . import encoding
from .paths import AnyPath, path_of
from .reading import neighbour
from .tensorfiles import spooled

__all__ = ["saving"]

FORMAT_VERSION = 3


@contextlib.contextmanager
def saving(
    path: AnyPath, metadata: Mapping[str, Any], *, like: AnyPath | None = None
) -> Iterator[Callable[[str, SparseTensor], None]]:
    """Write an adapter whose tensors come one by one: `add(name, tensor)` writes each to the disk, in any order.

    At the end of the `with` the file appears, with the bytes that `save` writes. If anything fails before, no file appears.
    metadata: may be filled until the end, except for what its "mask" says about positions that a rule draws.
    Raises what `save` raises. What is in the metadata by now is checked before anything is written.
    """
    path = path_of(path, "adapter.save('poet.safetensors')", AdapterError)
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; name a file in it, as in adapter.save({str(path / 'adapter.safetensors')!r})")
    _json_of(path, metadata)
    beside = neighbour(path, like) if like is not None else {}
    entries: dict[str, dict[str, Any]] = {}
    header: dict[str, str] = {}
    with spooled(path, header) as add_array:

        def add(name: str, tensor: SparseTensor) -> None:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise AdapterError(f"the name of a tensor must be valid Unicode, found {shown(name)}") from None
            tensor = _checked(path, name, tensor)
            indices = tensor.indices.detach().cpu().contiguous()
            stored = encoding.encode(indices, tensor.shape, _rules(metadata, name, tensor))
            if stored.array is not None and name in beside and torch.equal(beside[name].indices, indices):
                stored = encoding.Stored({"file": Path(like or "").name, "crc32": checksum(indices)}, None)
            entries[name] = {"shape": list(tensor.shape), "kind": tensor.kind, "positions": stored.positions}
            if stored.array is not None:
                add_array(f"{name}.indices", stored.array)
            add_array(f"{name}.values", tensor.values)

        yield add
        header |= {"format": "shira", "format_version": str(FORMAT_VERSION), "encoding": "gap"}
        header["tensors"] = json.dumps(dict(sorted(entries.items())))
        header["metadata"] = _json_of(path, metadata)


def _json_of(path: Path, metadata: Mapping[str, Any]) -> str:
    """The metadata as JSON. Raises AdapterError for what is no JSON that a reader takes."""
    parts = [{field: value} for field, value in metadata.items()]  # one by one, so that an error can name the field
    try:
        for part in (*parts, metadata):
            text = json.dumps(part, allow_nan=False)
            strict_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        where = "" if part is metadata else f"{shown(next(iter(part)))}: "
        raise AdapterError(
            f"cannot save to {path}: the adapter's metadata cannot be written as JSON: {where}{error}; give texts, finite "
            "numbers, true, false, lists and mappings"
        ) from error
    return text


def _checked(path: Path, name: str, tensor: SparseTensor) -> SparseTensor:
    """The tensor, with all that was checked when it was made checked again: others may have written into it since.

    Raises AdapterError.
    """
    indices = tensor.indices  # of a file these are decoded now, which may raise FormatError
    try:
        return SparseTensor(tensor.shape, indices, tensor.values, tensor.kind)
    except AdapterError as error:
        raise AdapterError(
            f"cannot save to {path}: tensor '{name}' was changed in memory after it was made: {error}; make the adapter again"
        ) from None


def _rules(metadata: Mapping[str, Any], name: str, tensor: SparseTensor) -> list[dict[str, Any]]:
    """Rules that may draw this tensor's positions, according to the mask in the metadata. `encode` tests them."""
    mask = metadata.get("mask")
    if not isinstance(mask, dict):
        return []
    if mask.get("name") == "rand" and isinstance(mask.get("seed"), int):
        return [{"mask": "rand", "seed": seed_of(mask["seed"], name)}]
    if mask.get("name") == "struct" and len(tensor.shape) == 2 and tensor.nnz:
        given = mask.get("options")
        options = given if isinstance(given, dict) else {}
        offset, diagonal = options.get("offset", 0), options.get("diagonal", True) is not False
        if type(offset) is not int or not 0 <= offset < max(tensor.shape):
            return []
        further = ({"offset": offset} if offset else {}) | ({} if diagonal else {"diagonal": False})
        directions: tuple[Literal["rows", "columns"], ...] = ("rows", "columns")
        return [
            {
                "mask": "struct",
                "direction": direction,
                "frequency": frequency_of(tensor.indices.cpu(), *tensor.shape[:2], direction, offset),
            }
            | further
            for direction in directions
        ]
    return []
