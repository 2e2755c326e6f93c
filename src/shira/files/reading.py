"""Reads an adapter's file, one safetensors file. docs/format.md specifies it.

Nothing in a file is used before it is checked.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ..errors import AdapterError, CheckpointError, FormatError
from ..sparse.positions import checksum
from ..sparse.tensor import Kind, SparseTensor, numel_of
from ..texts import shown, strict_json
from . import encoding
from .metadata import check_metadata
from .paths import AnyPath, State, open_regular, path_of, state_of
from .suggestions import instead
from .tensorfiles import read_header, read_tensor, whole_file

__all__ = ["FileChanged", "Gaps", "StoredTensors", "neighbour", "unchanged"]

READABLE = {("1", "plain"), ("2", "gap"), ("3", "gap")}  # (format version, encoding)


def neighbour(path: AnyPath, like: AnyPath) -> dict[str, SparseTensor]:
    """The tensors of `like`, to whose positions a file at `path` may refer.

    like: another file in the same folder, which holds its positions itself.
    Raises AdapterError or FormatError if it is not such a file; OSError if it cannot be read.
    """
    call = "adapter.save('coder.safetensors', like='poet.safetensors')"
    path, like = (path_of(each, call, AdapterError) for each in (path, like))
    with contextlib.ExitStack() as stack:
        return dict(_lender(path, like, stack))


def _lender(path: Path, like: Path, stack: contextlib.ExitStack) -> "StoredTensors":
    """The same; each tensor is read when it is requested. `stack` closes the file."""
    here, there = (Path(os.path.realpath(each)) for each in (path, like))
    if there.parent != here.parent or there == here:
        raise AdapterError(f"{like} must be another file in the folder of {path}, so that a reader finds it")
    tensors = StoredTensors(like, stack)
    if any(_names_a_file(description) for description in tensors.described.values()):
        raise AdapterError(f"{like} takes its positions from another file; pass that file")
    return tensors


class FileChanged(FormatError):
    """A file was written or replaced while it was read."""


def unchanged(opened: Mapping[BinaryIO, State]) -> tuple[State, ...]:
    """The states of opened files. Raises FileChanged if one has changed since it had the state that is given with it."""
    for file, state in opened.items():
        if state_of(file) != state:
            raise FileChanged(f"{file.name} changed while it was read; read it again when nobody writes to it")
    return tuple(opened.values())


class Gaps(SparseTensor):
    """A tensor whose positions are gaps, as in its file. `indices` decodes and checks them when it is first read.

    units: uint8 or uint16 [any length], see docs/format.md.
    Raises AdapterError if shape, kind or values are invalid. `indices` raises FormatError if the gaps are invalid.
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


class StoredTensors(Mapping[str, SparseTensor]):
    """The tensors of an adapter in an open file. The file's header is checked now, each tensor when it is read.

    described: tensor name -> its description in the file. metadata: the adapter's metadata.
    stack: closes the file, and the other files that hold positions for it. Raises what `load` raises.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        try:
            self._file = stack.enter_context(open_regular(path, FormatError))
        except IsADirectoryError:
            raise FormatError(f"{path} is a folder; {instead(path)}") from None
        self._path, self._stack, self._state = path, stack, state_of(self._file)
        self._lenders: dict[str, StoredTensors] = {}
        self._one_at_a_time = threading.Lock()  # an open file has only one reading position
        with whole_file(path):
            self._places, header = read_header(self._file, any_dtype=False)
        if header.get("format") != "shira":
            raise FormatError(
                f"{path} is not a shira adapter: metadata 'format' is {shown(header.get('format'))}, expected 'shira'; "
                f"{instead(path, self._places)}"
            )
        self.described = {
            name: _description(path, name, description) for name, description in _descriptions(path, header).items()
        }
        self.metadata = _json_object(path, header, "metadata")
        try:
            check_metadata(self.metadata)
        except AdapterError as error:
            raise FormatError(f"{path}: {error}") from None
        self._with_array = {
            name for name, description in self.described.items() if isinstance(description.get("positions", "plain"), str)
        }
        expected = {f"{name}.values" for name in self.described} | {f"{name}.indices" for name in self._with_array}
        if self._places.keys() != expected:
            missing, extra = sorted(expected - self._places.keys()), sorted(self._places.keys() - expected)
            few = [shown(names) if names else "none" for names in (missing, extra)]
            raise FormatError(f"{path}: tensors missing: {few[0]}; not described: {few[1]}")

    def __getitem__(self, name: str) -> SparseTensor:
        return self.tensor(name, decoded=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.described)

    def __len__(self) -> int:
        return len(self.described)

    def tensor(self, name: str, decoded: bool) -> SparseTensor:
        """Read a tensor. Without `decoded`, gaps are not decoded: the result is `Gaps`. Raises KeyError and FormatError."""
        description = self.described[name]
        if _names_a_file(description):
            array: Tensor | None = self._borrowed(name, description)
        else:
            array = self._array(f"{name}.indices") if name in self._with_array else None
        return _sparse_tensor(self._path, name, description, array, self._array(f"{name}.values"), decoded)

    def lenders(self) -> tuple[Path, ...]:
        """The files beside this one that it names for positions, as far as their names are possible. They are not opened."""
        named = (each["positions"]["file"] for each in self.described.values() if _names_a_file(each))
        return tuple(map(self._path.with_name, dict.fromkeys(file for file in named if _is_beside(self._path, file))))

    def open_lenders(self) -> None:
        """Open these files, so that `state` tells of them, in the order in which reading all tensors opens them.

        Raises FormatError.
        """
        for name, description in self.described.items():
            if _names_a_file(description):
                self._opened_lender(name, description)

    def state(self) -> tuple[State, ...]:
        """See `adapter.check_unchanged`."""
        own = unchanged({self._file: self._state})
        return *own, *(state for lender in self._lenders.values() for state in lender.state())

    def _array(self, name: str) -> Tensor:
        with self._one_at_a_time:
            try:
                return read_tensor(self._file, self._places[name])
            except CheckpointError as error:
                raise FormatError(str(error)) from error

    def _borrowed(self, name: str, description: dict[str, Any]) -> Tensor:
        """Positions from another file in the same folder, which must hold them itself."""
        file, expected = description["positions"]["file"], description["positions"].get("crc32")
        lender = self._opened_lender(name, description)
        try:
            tensor = lender.get(name)
        except (AdapterError, OSError) as error:
            raise self._not_lent(name, file, error) from error
        if tensor is None or list(tensor.shape) != description["shape"] or checksum(tensor.indices) != expected:
            raise FormatError(f"{self._path}: tensor '{name}': {shown(file)} holds other positions than when this was written")
        return tensor.indices

    def _opened_lender(self, name: str, description: dict[str, Any]) -> "StoredTensors":
        """The opened file that holds a tensor's positions."""
        path, file = self._path, description["positions"]["file"]
        if not _is_beside(path, file):
            raise FormatError(f"{path}: tensor '{name}': positions must lie in another file of its folder, found {shown(file)}")
        try:
            with self._one_at_a_time:
                if file not in self._lenders:
                    self._lenders[file] = _lender(path, path.with_name(file), self._stack)
        except (AdapterError, OSError) as error:
            raise self._not_lent(name, file, error) from error
        return self._lenders[file]

    def _not_lent(self, name: str, file: str, error: Exception) -> FormatError:
        return FormatError(f"{self._path}: tensor '{name}': its positions should be in {shown(file)} beside it: {error}")


def _descriptions(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """The description of each tensor. Raises FormatError first if the version or the encoding is unknown."""
    version, encoded = header.get("format_version"), header.get("encoding")
    if (version, encoded) not in READABLE:
        raise FormatError(
            f"{path}: format version {shown(version)} with encoding {shown(encoded)} is unknown, this release reads "
            f"{', '.join(f'{v} with {e!r}' for v, e in sorted(READABLE))}; upgrade shira-adapters"
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


def _description(path: Path, name: str, description: Any) -> dict[str, Any]:
    """The description of one tensor, with its shape and positions checked for their form."""
    shape = description.get("shape") if isinstance(description, dict) else None
    if not isinstance(shape, list):
        raise FormatError(f"{path}: tensor '{name}': shape must be a list of whole numbers, found {shown(shape)}")
    try:
        numel_of(tuple(shape))
    except ValueError as error:
        raise FormatError(f"{path}: tensor '{name}': {error}") from None
    if not isinstance(description.get("positions", "plain"), str | dict):
        raise FormatError(
            f"{path}: tensor '{name}': positions must be a word or a rule, found {shown(description['positions'])}"
        )
    checked: dict[str, Any] = description
    return checked


def _is_beside(path: Path, file: Any) -> bool:
    """Whether this can be the name of another file in the folder of a file."""
    return isinstance(file, str) and file not in ("", ".", "..", path.name) and Path(file).name == file and "\0" not in file


def _names_a_file(description: dict[str, Any]) -> bool:
    positions = description.get("positions")
    return isinstance(positions, dict) and "file" in positions


def _sparse_tensor(
    path: Path, name: str, description: dict[str, Any], array: Tensor | None, values: Tensor, decoded: bool = True
) -> SparseTensor:
    shape: tuple[int, ...] = tuple(description["shape"])
    kind: Any = description.get("kind")  # SparseTensor checks it
    positions = "plain" if _names_a_file(description) else description.get("positions", "plain")
    gaps = positions == "gap" and array is not None and array.dtype in encoding.UNITS and array.ndim == values.ndim == 1
    try:
        if gaps and array is not None and not decoded:
            return Gaps(shape, values, kind, array, lambda: _sparse_tensor(path, name, description, array, values).indices)
        indices = encoding.decode(encoding.Stored(positions, array), shape, values.numel())
        return SparseTensor(shape, indices, values, kind)
    except AdapterError as error:
        raise FormatError(f"{path}: tensor '{name}': {error}") from error
