"""The file: one safetensors file an adapter. docs/format.md is its specification.

Nothing in a file is believed until it is checked, and a file appears under its name whole or not at all.
"""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import encoding, masks
from .adapter import Adapter, Kind, SparseTensor, check_metadata, numel_of
from .errors import AdapterError, CheckpointError, FormatError
from .files import State, open_regular, path_of, state_of
from .foreign import instead
from .tensorfiles import read_header, read_tensor, spooled
from .texts import shown, strict_json

__all__ = ["FORMAT_VERSION", "Gaps", "as_stored", "check_unchanged", "load", "neighbour", "opened", "read", "save", "saving"]

FORMAT_VERSION = 2
READABLE = {("1", "plain"), ("2", "gap")}  # (format version, encoding)
ATTEMPTS = 3  # to read a file that is being replaced

Path_ = str | os.PathLike[str]


def save(adapter: Adapter, path: Path_, *, like: Path_ | None = None) -> None:
    """Write an adapter to one safetensors file: to a temporary file beside it, flushed, then renamed.

    like: a file in the same folder that holds an adapter of the same mask; positions that are the same are then not
        written again, but read from there, so it must stay beside this one.
    A symbolic link is followed: the file that it leads to is replaced, and the link stays.

    Raises AdapterError if the path is a folder, or the metadata cannot be written as JSON; OSError (a full disk, a missing
    folder, a FIFO or device of that name) with any file already under that name unchanged.
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
    path = path_of(path, "adapter.save('poet.safetensors')", AdapterError)
    if path.is_dir():
        raise AdapterError(f"{path} is a folder; name a file in it, as in adapter.save({str(path / 'adapter.safetensors')!r})")
    beside = neighbour(path, like) if like is not None else {}
    entries: dict[str, dict[str, Any]] = {}
    header: dict[str, str] = {}
    with spooled(path, header) as add_array:

        def add(name: str, tensor: SparseTensor) -> None:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise AdapterError(f"a file holds no tensor of the name {shown(name)}, which is no text") from None
            indices = tensor.indices.detach().cpu().contiguous()
            stored = encoding.encode(indices, tensor.shape, _rules(metadata, name, tensor))
            if stored.array is not None and name in beside and torch.equal(beside[name].indices, indices):
                stored = encoding.Stored({"file": Path(like or "").name, "crc32": encoding.checksum(indices)}, None)
            entries[name] = {"shape": list(tensor.shape), "kind": tensor.kind, "positions": stored.positions}
            if stored.array is not None:
                add_array(f"{name}.indices", stored.array)
            add_array(f"{name}.values", tensor.values)

        yield add
        header |= {"format": "shira", "format_version": str(FORMAT_VERSION), "encoding": "gap"}
        try:
            header["tensors"] = json.dumps(dict(sorted(entries.items())))
            header["metadata"] = json.dumps(metadata, allow_nan=False)
            strict_json(header["metadata"])  # what would be refused when it is read
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterError(f"the adapter's metadata cannot be written as JSON: {error}") from error


def neighbour(path: Path_, like: Path_) -> dict[str, SparseTensor]:
    """The tensors of `like`, a file beside `path` that holds its positions itself, so that `save` may leave them to it.

    Raises AdapterError or FormatError if it is no such file; OSError if it cannot be read.
    """
    call = "adapter.save('coder.safetensors', like='poet.safetensors')"
    path, like = (path_of(each, call, AdapterError) for each in (path, like))
    with contextlib.ExitStack() as stack:
        return dict(_lender(path, like, stack))


def _lender(path: Path, like: Path, stack: contextlib.ExitStack) -> "_Tensors":
    """The same, each tensor read when it is asked for; `stack` closes the file."""
    here, there = (Path(os.path.realpath(each)) for each in (path, like))
    if there.parent != here.parent or there == here:
        raise AdapterError(f"{like} must be another file in the folder of {path}, to be found again")
    tensors = _Tensors(like, stack)
    if any(_names_a_file(entry) for entry in tensors.entries.values()):
        raise AdapterError(f"{like} takes its positions from a file itself; name that one")
    return tensors


def _rules(metadata: Mapping[str, Any], name: str, tensor: SparseTensor) -> list[dict[str, Any]]:
    """Rules that may draw this tensor's positions again, by what the metadata says of its mask; tried before they are used."""
    mask = metadata.get("mask")
    if not isinstance(mask, dict):
        return []
    if mask.get("name") == "rand" and isinstance(mask.get("seed"), int):
        return [{"mask": "rand", "seed": masks.seed_of(mask["seed"], name)}]
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
                "frequency": masks.frequency_of(tensor.indices.cpu(), *tensor.shape[:2], direction, offset),
            }
            | further
            for direction in directions
        ]
    return []


def load(path: Path_) -> Adapter:
    """Read an adapter and check all of it.

    Raises FormatError, which names the file, the tensor, what was expected and what was found; OSError if there is no
    such file or it may not be read.

        adapter = shira.load("poet.safetensors")
    """
    return read(path)[0]


def read(path: Path_) -> tuple[Adapter, tuple[State, ...]]:
    """`load`, and the state of the files that it read, the adapter's first: of what was opened, not of what has the name now.

    Raises what `load` raises; a file that another one takes the place of meanwhile is read once more.
    """
    for _ in range(ATTEMPTS):
        try:
            with opened(path) as adapter:
                return Adapter(dict(adapter.tensors), adapter.metadata), check_unchanged(adapter)
        except _Changed as error:
            changed = error
    raise changed


@contextlib.contextmanager
def opened(path: Path_) -> Iterator[Adapter]:
    """An adapter that stays in its file: as long as that is open, each tensor is read, and checked, when it is asked for.

    Raises what `load` raises; also at the end, if the file was changed in between.
    """
    found = path_of(path, "shira.load('poet.safetensors')", FormatError)
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(found, stack)
        adapter = Adapter(tensors, tensors.metadata)  # type: ignore[arg-type]  # read only
        yield adapter
        check_unchanged(adapter)


def check_unchanged(adapter: Adapter) -> tuple[State, ...]:
    """The state of the opened files that an adapter lies in; none if it is in memory.

    Raises FormatError if one of them has changed since it was opened."""
    return adapter.tensors.state() if isinstance(adapter.tensors, _Tensors) else ()


class _Changed(FormatError):
    """A file was written to, or replaced, while it was read."""


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
    """An adapter's tensors that are still in their file, and what else that says, all of it checked.

    entries: tensor name -> its description. metadata: the adapter's. `stack` closes the file, and those beside it that hold
    positions for it. Raises what `load` raises.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        try:
            self._file = stack.enter_context(open_regular(path, FormatError))
        except IsADirectoryError:
            raise FormatError(f"{path} is a folder; {instead(path)}") from None
        self._path, self._stack, self._state = path, stack, state_of(self._file)
        self._lenders: dict[str, _Tensors] = {}
        self._one_at_a_time = threading.Lock()  # a file has one place at which it is read
        try:
            self._places, header = read_header(self._file, any_dtype=False)
        except CheckpointError as error:
            raise FormatError(f"{path} is not a whole safetensors file: {error}") from error
        if header.get("format") != "shira":
            raise FormatError(
                f"{path} is not a shira adapter: metadata 'format' is {shown(header.get('format'))}, expected 'shira'; "
                f"{instead(path, self._places)}"
            )
        self.entries = {name: _entry(path, name, entry) for name, entry in _entries(path, header).items()}
        self.metadata = _json_object(path, header, "metadata")
        try:
            check_metadata(self.metadata)
        except AdapterError as error:
            raise FormatError(f"{path}: {error}") from None
        self._with_array = {name for name, entry in self.entries.items() if isinstance(entry.get("positions", "plain"), str)}
        expected = {f"{name}.values" for name in self.entries} | {f"{name}.indices" for name in self._with_array}
        if self._places.keys() != expected:
            missing, extra = sorted(expected - self._places.keys()), sorted(self._places.keys() - expected)
            few = [shown(names) if names else "none" for names in (missing, extra)]
            raise FormatError(f"{path}: tensors missing: {few[0]}; not described: {few[1]}")

    def __getitem__(self, name: str) -> SparseTensor:
        return self.tensor(name, decoded=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def tensor(self, name: str, decoded: bool) -> SparseTensor:
        """A tensor, read now; not decoded: its positions only when they are asked for, if they are gaps. Raises KeyError."""
        entry = self.entries[name]
        if _names_a_file(entry):
            array: Tensor | None = self._borrowed(name, entry)
        else:
            array = self._array(f"{name}.indices") if name in self._with_array else None
        return _sparse_tensor(self._path, name, entry, array, self._array(f"{name}.values"), decoded)

    def state(self) -> tuple[State, ...]:
        """See `check_unchanged`."""
        now = state_of(self._file)
        if now != self._state:
            raise _Changed(f"{self._path} changed while it was read; read it again when nobody writes to it")
        return now, *(state for lender in self._lenders.values() for state in lender.state())

    def _array(self, name: str) -> Tensor:
        with self._one_at_a_time:
            try:
                return read_tensor(self._file, self._places[name])
            except CheckpointError as error:
                raise FormatError(str(error)) from error

    def _borrowed(self, name: str, entry: dict[str, Any]) -> Tensor:
        """Positions that lie in another file of the same folder, which must hold them itself."""
        path, file, expected = self._path, entry["positions"]["file"], entry["positions"].get("crc32")
        if not isinstance(file, str) or file in ("", ".", "..", path.name) or Path(file).name != file or "\0" in file:
            raise FormatError(f"{path}: tensor '{name}': positions must lie in another file of its folder, found {shown(file)}")
        try:
            with self._one_at_a_time:
                if file not in self._lenders:
                    self._lenders[file] = _lender(path, path.with_name(file), self._stack)
            tensor = self._lenders[file].get(name)
        except (AdapterError, OSError) as error:
            raise FormatError(
                f"{path}: tensor '{name}': its positions should be in {shown(file)} beside it: {error}"
            ) from error
        if tensor is None or list(tensor.shape) != entry["shape"] or encoding.checksum(tensor.indices) != expected:
            raise FormatError(f"{path}: tensor '{name}': {shown(file)} holds other positions than when this was written")
        return tensor.indices


def as_stored(adapter: Adapter, name: str) -> SparseTensor:
    """A tensor of an adapter that may be in its file still: then `Gaps`, if that is how its positions are stored there."""
    tensors = adapter.tensors
    return tensors.tensor(name, decoded=False) if isinstance(tensors, _Tensors) else tensors[name]


def _entries(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """The description of each tensor, once version and encoding are known to be ours."""
    version, encoded = header.get("format_version"), header.get("encoding")
    if (version, encoded) not in READABLE:
        raise FormatError(
            f"{path}: format version {shown(version)} with encoding {shown(encoded)} is unknown, this release reads "
            f"{' and '.join(f'{v} with {e!r}' for v, e in sorted(READABLE))}; upgrade shira-adapters"
        )
    return _json_object(path, header, "tensors")


def _json_object(path: Path, header: dict[str, str], key: str) -> dict[str, Any]:
    try:
        value = strict_json(header.get(key, ""))
    except ValueError as error:
        raise FormatError(f"{path}: metadata {key!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: metadata {key!r} must be a JSON object, found {type(value).__name__}")
    return value


def _entry(path: Path, name: str, entry: Any) -> dict[str, Any]:
    """The description of one tensor, its form checked."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list):
        raise FormatError(f"{path}: tensor '{name}': shape must be a list of whole numbers, found {shown(shape)}")
    try:
        numel_of(tuple(shape))
    except ValueError as error:
        raise FormatError(f"{path}: tensor '{name}': {error}") from None
    if not isinstance(entry.get("positions", "plain"), str | dict):
        raise FormatError(f"{path}: tensor '{name}': positions must be a word or a rule, found {shown(entry['positions'])}")
    checked: dict[str, Any] = entry
    return checked


def _names_a_file(entry: dict[str, Any]) -> bool:
    positions = entry.get("positions")
    return isinstance(positions, dict) and "file" in positions


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
