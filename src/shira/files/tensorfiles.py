"""One safetensors file, a tensor at a time: where each tensor is, how to read one, and how to write tensors as they come.

safetensors' `safe_open` takes a name, not the file that was opened and checked. It accepts a tensor that is described twice. It
does not say where a tensor lies, which writing a shard piece by piece has to know. Before 0.8 it can only map the whole file:
all of it may count as the process's memory, page faults read a disk many times slower than `read` does, and a file that is cut
short meanwhile ends the process. The library's `save` wants all tensors at once.
"""

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, FormatError, ShiraError
from ..sparse.tensor import MOST_ENTRIES, bytes_of, numel_of
from ..texts import shown, strict_json
from .paths import destination, flush_folder, sweep, temporary_file

__all__ = ["BLOCK", "Form", "HeaderEntry", "malformed", "read_header", "read_tensor", "spooled", "whole_file", "write_whole"]

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
BLOCK = 2**22  # bytes copied at a time


class Form(NamedTuple):
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class HeaderEntry(NamedTuple):
    """Where a tensor is in its file: bytes begin to end, counted from the start of the file."""

    form: Form
    begin: int
    end: int


def read_header(file: BinaryIO, *, any_dtype: bool = True) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """The header of an opened file: name -> HeaderEntry for each tensor, in the file's order; and the file's metadata.

    Dtype, shape and place of each tensor agree, and the tensors fill the file.
    any_dtype: a tensor whose dtype is unknown here is returned as flat bytes; otherwise it is refused.
    Raises CheckpointError for anything malformed.
    """
    size = os.fstat(file.fileno()).st_size
    with malformed(file.name):
        start = file.read(8)
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, LONGEST_HEADER):
            kind = f"; it begins with {start!r}, and may be a file of another kind" if length > LONGEST_HEADER else ""
            raise ValueError(f"a header of {length} bytes in a file of {size}{kind}")
        described = strict_json(file.read(length))
        metadata = described.pop("__metadata__", {})
        entries = {name: _entry(name, entry, 8 + length, any_dtype) for name, entry in described.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata other than text")
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 8 + length
    for name, entry in ordered.items():
        if entry.begin != end:
            raise CheckpointError(
                f"{file.name}: tensor {shown(name)} should begin at byte {end}, it begins at {entry.begin}; get it again"
            )
        end = entry.end
    if end != size:
        raise CheckpointError(f"{file.name} should have {end} bytes, it has {size}; get it again")
    return ordered, metadata


def read_tensor(file: BinaryIO, entry: HeaderEntry) -> Tensor:
    """Read a tensor of an opened file into new memory. Raises CheckpointError if the file has become shorter."""
    content = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
    left = content.numpy().data
    file.seek(entry.begin)
    while left:
        count = file.readinto(left[:BLOCK])  # type: ignore[attr-defined]  # which typing's BinaryIO lacks
        if not count:
            raise CheckpointError(f"{file.name} became shorter while it was read; get it again")
        left = left[count:]
    return content.view(entry.form.dtype).view(entry.form.shape)


@contextlib.contextmanager
def spooled(path: Path, metadata: Mapping[str, str]) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a file of tensors as they come, without keeping them: `add(name, tensor)` puts one into a nameless temporary file.

    At the end all tensors are copied behind a header, and the file appears under its name, whole or not at all.
    metadata: may be filled until the end. Equal tensors and metadata give equal bytes, in whatever order the tensors come. The
    widest dtypes come first, so that each tensor is aligned.
    Raises OSError (a full disk, a missing folder). A file that already has the name is then unchanged.
    """
    entries: dict[str, HeaderEntry] = {}
    with contextlib.ExitStack() as stack:
        with _saving(path):
            folder = destination(path).parent  # raises before the work if the path cannot be written
            sweep(folder)
            spool = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))

        def add(name: str, tensor: Tensor) -> None:
            begin = spool.tell()
            left = bytes_of(tensor).cpu().numpy().data
            with _saving(path):
                while left:  # a raw file may write only a part at once
                    left = left[spool.write(left) :]
            entries[name] = HeaderEntry(Form(tuple(tensor.shape), tensor.dtype), begin, spool.tell())

        yield add
        ordered = dict(sorted(entries.items(), key=lambda item: (-item[1].form.dtype.itemsize, item[0])))

        def content() -> Iterator[bytes]:
            yield _header(ordered, metadata)
            for entry in ordered.values():
                spool.seek(entry.begin)
                for start in range(entry.begin, entry.end, BLOCK):
                    yield spool.read(min(BLOCK, entry.end - start))

        write_whole(path, content())


def _header(entries: Mapping[str, HeaderEntry], metadata: Mapping[str, str]) -> bytes:
    """The bytes of the header of a file with these tensors, in this order."""
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.end - entry.begin
        described[name] = {"dtype": NAMES[entry.form.dtype], "shape": entry.form.shape, "data_offsets": [begin, end]}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_whole(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file whole or not at all. A symbolic link is followed, and stays.

    Raises OSError, also if a FIFO, device or folder has the name. A file that already has the name is then unchanged.
    """
    with _saving(path):
        folder = destination(path).parent
        with temporary_file(folder) as (temporary, file):
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # Windows cannot rename an open file
                file.close()
            os.replace(temporary, destination(path))
    flush_folder(folder)


@contextlib.contextmanager
def _saving(path: Path) -> Iterator[None]:
    """Add to an OSError that nothing was written to the path."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"cannot save to {path} ({error.strerror}); nothing was written there, any older file is intact"
        ) from error


@contextlib.contextmanager
def malformed(file: Path | str) -> Iterator[None]:
    """Turn the errors that a malformed file causes into a CheckpointError that names the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        found = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | AttributeError) else str(error)
        raise CheckpointError(f"{file} is malformed ({found}); get it again") from error


@contextlib.contextmanager
def whole_file(path: Path, kind: type[ShiraError] = FormatError) -> Iterator[None]:
    """Turn a CheckpointError of the file that is read into an error of this kind."""
    try:
        yield
    except CheckpointError as error:
        raise kind(f"{path} is not a whole safetensors file: {error}") from error


def _entry(name: str, described: dict[str, Any], start: int, any_dtype: bool) -> HeaderEntry:
    """One tensor of a header. Raises ValueError, TypeError or KeyError if it is malformed."""
    begin, end = described["data_offsets"]
    shape = tuple(described["shape"])
    try:
        numel = numel_of(shape)
    except ValueError as error:
        raise ValueError(f"tensor {shown(name)}: {error}") from None
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= MOST_ENTRIES:
        raise ValueError(f"tensor {shown(name)}: it lies at {shown(begin)} to {shown(end)}")
    dtype = DTYPES.get(described["dtype"])
    if dtype is None and not any_dtype:
        found = shown(described["dtype"])
        raise ValueError(f"tensor {shown(name)}: dtype {found} is unknown here; save it in bfloat16 or float32")
    if dtype is None:
        return HeaderEntry(Form((end - begin,), torch.uint8), start + begin, start + end)
    if numel * dtype.itemsize != end - begin:
        raise ValueError(f"tensor {shown(name)}: {end - begin} bytes for {described['dtype']} {shown(list(shape))}")
    return HeaderEntry(Form(shape, dtype), start + begin, start + end)
