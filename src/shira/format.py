"""The file: one safetensors file an adapter. docs/format.md is its specification.

Nothing in a file is believed until it is checked, and a file appears under its name whole or not at all.
"""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import encoding, masks
from .adapter import Adapter, Kind, SparseTensor
from .errors import AdapterError, CheckpointError, FormatError
from .tensorfiles import Entry, read_header, read_tensor, spooled

__all__ = ["FORMAT_VERSION", "Gaps", "as_stored", "load", "neighbour", "opened", "save", "saving"]

FORMAT_VERSION = 2
READABLE = {("1", "plain"), ("2", "gap")}  # (format version, encoding)

Path_ = str | os.PathLike[str]


def save(adapter: Adapter, path: Path_, *, like: Path_ | None = None) -> None:
    """Write an adapter to one safetensors file: to a temporary file beside it, flushed, then renamed.

    like: a file in the same folder that holds an adapter of the same mask; positions that are the same are then not
        written again, but read from there, so it must stay beside this one.
    Raises AdapterError if the metadata cannot be written as JSON; OSError (a full disk, a missing folder) with any
    file already under that name unchanged.
    """
    with saving(path, adapter.metadata, like=like) as add:
        for name, tensor in adapter.tensors.items():
            add(name, tensor)


@contextlib.contextmanager
def saving(
    path: Path_, metadata: Mapping[str, Any], *, like: Path_ | None = None
) -> Iterator[Callable[[str, SparseTensor], None]]:
    """The file of an adapter whose tensors come one by one: `add(name, tensor)` writes each to the disk, in any order, and the
    file is there at the end, the same that `save` writes; if anything fails before, none is.

    metadata: may be filled until the end, but for what its "mask" says of positions that a rule draws.
    Raises what `save` raises.
    """
    path = Path(path)
    beside = neighbour(path, like) if like is not None else {}
    described: dict[str, dict[str, Any]] = {}
    header: dict[str, str] = {}
    with spooled(path, header) as add_array:

        def add(name: str, tensor: SparseTensor) -> None:
            indices = tensor.indices.detach().cpu().contiguous()
            stored = encoding.encode(indices, tensor.shape, _rules(metadata, name, tensor))
            if stored.array is not None and name in beside and torch.equal(beside[name].indices, indices):
                stored = encoding.Stored({"file": Path(like or "").name, "crc32": encoding.checksum(indices)}, None)
            described[name] = {"shape": list(tensor.shape), "kind": tensor.kind, "positions": stored.positions}
            if stored.array is not None:
                add_array(f"{name}.indices", stored.array)
            add_array(f"{name}.values", tensor.values)

        yield add
        header |= {"format": "shira", "format_version": str(FORMAT_VERSION), "encoding": "gap"}
        try:
            header["tensors"] = json.dumps(dict(sorted(described.items())))
            header["metadata"] = json.dumps(metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the adapter's metadata cannot be written as JSON: {error}") from error


def neighbour(path: Path_, like: Path_) -> dict[str, SparseTensor]:
    """The tensors of `like`, a file beside `path` that holds its positions itself, so that `save` may leave them to it.

    Raises AdapterError or FormatError if it is no such file; OSError if it cannot be read.
    """
    with _neighbour(Path(path), Path(like)) as tensors:
        return dict(tensors)


@contextlib.contextmanager
def _neighbour(path: Path, like: Path) -> Iterator[Mapping[str, SparseTensor]]:
    """The same, each tensor read when it is asked for."""
    if like.resolve().parent != path.resolve().parent or like.resolve() == path.resolve():
        raise AdapterError(f"{like} must be another file in the folder of {path}, to be found again")
    with open(like, "rb", buffering=0) as file:
        described = _read_header(like, _entries(like, file)[1])
    if any(_names_a_file(_entry(like, name, entry)) for name, entry in described.items()):
        raise AdapterError(f"{like} takes its positions from a file itself; name that one")
    with opened(like) as adapter:
        yield adapter.tensors


def _entries(path: Path, file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str]]:
    """What lies where in an opened file, and its metadata. Raises FormatError if it is no safetensors file."""
    try:
        return read_header(file, any_dtype=False)
    except CheckpointError as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}") from error


def _rules(metadata: Mapping[str, Any], name: str, tensor: SparseTensor) -> list[dict[str, Any]]:
    """Rules that may draw this tensor's positions again, by what the metadata says of its mask; tried before they are used."""
    mask = metadata.get("mask") or {}
    if mask.get("name") == "rand" and isinstance(mask.get("seed"), int):
        return [{"mask": "rand", "seed": masks.seed_of(mask["seed"], name)}]
    if mask.get("name") == "struct" and len(tensor.shape) == 2 and tensor.nnz:
        options = mask.get("options") or {}
        offset, diagonal = options.get("offset", 0), options.get("diagonal", True) is not False
        if type(offset) is not int or offset < 0:
            return []
        further = ({"offset": offset} if offset else {}) | ({} if diagonal else {"diagonal": False})
        return [
            {"mask": "struct", "direction": direction, "frequency": frequency} | further
            for direction in ("rows", "columns")
            for frequency in masks.frequencies(tensor.shape[0], tensor.shape[1], direction, tensor.nnz, offset, diagonal)
        ]
    return []


def load(path: Path_) -> Adapter:
    """Read an adapter and check all of it.

    Raises FormatError, which names the file, the tensor, what was expected and what was found; OSError if there is no
    such file or it may not be read.

        adapter = shira.load("poet.safetensors")
    """
    with opened(path) as adapter:
        return Adapter(dict(adapter.tensors), adapter.metadata)


@contextlib.contextmanager
def opened(path: Path_) -> Iterator[Adapter]:
    """An adapter that stays in its file: as long as that is open, each tensor is read, and checked, when it is asked for.

    Raises what `load` raises.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb", buffering=0))
        places, header = _entries(path, file)
        described = _read_header(path, header)
        entries = {name: _entry(path, name, entry).get("positions", "plain") for name, entry in described.items()}
        with_array = {name for name, positions in entries.items() if isinstance(positions, str)}
        expected = {f"{name}.values" for name in described} | {f"{name}.indices" for name in with_array}
        if places.keys() != expected:
            missing, extra = sorted(expected - places.keys()), sorted(places.keys() - expected)
            raise FormatError(f"{path}: tensors missing: {missing or 'none'}; not described: {extra or 'none'}")
        neighbours: dict[str, Mapping[str, SparseTensor]] = {}

        one_at_a_time = threading.Lock()  # a file has one place at which it is read

        def array_of(name: str) -> Tensor:
            with one_at_a_time:
                try:
                    return read_tensor(file, places[name])
                except CheckpointError as error:
                    raise FormatError(str(error)) from error

        def read(name: str, decoded: bool) -> SparseTensor:
            entry = described[name]
            if _names_a_file(entry):
                array: Tensor | None = _borrowed(path, name, entry, neighbours, stack)
            else:
                array = array_of(f"{name}.indices") if name in with_array else None
            return _sparse_tensor(path, name, entry, array, array_of(f"{name}.values"), decoded)

        yield Adapter(_Tensors(described, read), _json_object(path, header, "metadata"))  # type: ignore[arg-type]  # read only


class Gaps(SparseTensor):
    """A tensor whose positions are gaps, as its file holds them: decoded, and checked, when they are first asked for.

    units: uint8 or uint16 [any], see docs/format.md. Raises AdapterError for values that are not finite and the like.
    """

    units: Tensor
    _decoded: Callable[[], Tensor]

    def __init__(
        self, shape: tuple[int, ...], values: Tensor, kind: Kind, units: Tensor, decoded: Callable[[], Tensor]
    ) -> None:
        given = {"shape": shape, "values": values.contiguous(), "kind": kind, "units": units, "_decoded": decoded}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check_form()
        self._check_values()

    @functools.cached_property
    def indices(self) -> Tensor:
        return self._decoded()


class _Tensors(Mapping[str, SparseTensor]):
    """An adapter's tensors that are still in their file."""

    def __init__(self, names: Iterable[str], read: Callable[[str, bool], SparseTensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> SparseTensor:
        self._names[name]  # KeyError
        return self._read(name, True)

    def as_stored(self, name: str) -> SparseTensor:
        """A tensor whose positions are not decoded before they are asked for, if they are gaps."""
        return self._read(name, False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def as_stored(adapter: Adapter, name: str) -> SparseTensor:
    """A tensor of an adapter that may be in its file still: then `Gaps`, if that is how its positions are stored there."""
    tensors: Any = adapter.tensors
    tensor: SparseTensor = tensors.as_stored(name) if isinstance(tensors, _Tensors) else tensors[name]
    return tensor


def _read_header(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """The description of each tensor, once format, version and encoding are known to be ours."""
    if header.get("format") != "shira":
        raise FormatError(f"{path} is not a shira adapter: metadata 'format' is {header.get('format')!r}, expected 'shira'")
    version, encoded = header.get("format_version"), header.get("encoding")
    if (version, encoded) not in READABLE:
        raise FormatError(
            f"{path}: format version {version!r} with encoding {encoded!r} is unknown, this release reads "
            f"{' and '.join(f'{v} with {e!r}' for v, e in sorted(READABLE))}; upgrade shira-adapters"
        )
    return _json_object(path, header, "tensors")


def _json_object(path: Path, header: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(header.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: metadata {key!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: metadata {key!r} must be a JSON object, found {type(value).__name__}")
    return value


def _entry(path: Path, name: str, entry: Any) -> dict[str, Any]:
    """The description of one tensor, its form checked."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise FormatError(f"{path}: tensor '{name}': shape must be a list of whole numbers, found {shape!r}")
    if not isinstance(entry.get("positions", "plain"), str | dict):
        raise FormatError(f"{path}: tensor '{name}': positions must be a word or a rule, found {entry['positions']!r}")
    checked: dict[str, Any] = entry
    return checked


def _names_a_file(entry: dict[str, Any]) -> bool:
    positions = entry.get("positions")
    return isinstance(positions, dict) and "file" in positions


def _borrowed(
    path: Path,
    name: str,
    entry: dict[str, Any],
    neighbours: dict[str, Mapping[str, SparseTensor]],
    stack: contextlib.ExitStack,
) -> Tensor:
    """Positions that lie in another file of the same folder, which must hold them itself.

    neighbours: the files opened for that so far; `stack` closes them.
    """
    file, expected = entry["positions"]["file"], entry["positions"].get("crc32")
    if not isinstance(file, str) or file in ("", ".", "..", path.name) or Path(file).name != file:
        raise FormatError(f"{path}: tensor '{name}': positions must lie in another file of its folder, found {file!r}")
    try:
        if file not in neighbours:
            neighbours[file] = stack.enter_context(_neighbour(path, path.with_name(file)))
        tensor = neighbours[file].get(name)
    except (AdapterError, OSError) as error:
        raise FormatError(f"{path}: tensor '{name}': its positions should be in '{file}' beside it: {error}") from error
    if tensor is None or list(tensor.shape) != entry["shape"] or encoding.checksum(tensor.indices) != expected:
        raise FormatError(f"{path}: tensor '{name}': '{file}' holds other positions than when this was written")
    return tensor.indices


def _sparse_tensor(
    path: Path, name: str, entry: dict[str, Any], array: Tensor | None, values: Tensor, decoded: bool = True
) -> SparseTensor:
    shape: tuple[int, ...] = tuple(entry["shape"])
    kind: Any = entry.get("kind")  # which is checked
    positions = "plain" if _names_a_file(entry) else entry.get("positions", "plain")
    gaps = positions == "gap" and array is not None and array.dtype in encoding.UNITS and array.ndim == values.ndim == 1
    try:
        if gaps and array is not None and not decoded:
            return Gaps(shape, values, kind, array, lambda: _sparse_tensor(path, name, entry, array, values).indices)
        indices = encoding.decode(encoding.Stored(positions, array), shape, values.numel())
        return SparseTensor(shape, indices, values, kind)
    except AdapterError as error:
        raise FormatError(f"{path}: tensor '{name}': {error}") from error
