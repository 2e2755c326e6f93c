"""Weight patches of RL trainers, read as an adapter's tensors: what changed between two syncs of trainer and inference engine.

A patch holds, for each tensor, flat positions in C order and the new values there. TRL, slime and verl lay it out differently;
docs/rl-patches.md describes what we read. Nothing in a file is used before it is checked.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError, CheckpointError, FormatError
from ..sparse.tensor import FLOAT_DTYPES, SparseTensor, dtype_name, numel_of
from ..texts import shown, strict_json
from .paths import State, open_regular, state_of
from .reading import unchanged
from .tensorfiles import BLOCK, Form, HeaderEntry, read_header, read_tensor, whole_file

__all__ = ["POSITIONS", "SHAPES", "SPEC", "TRL", "VALUES", "StoredPatch", "checksum_of", "is_patch"]

TRL = {"format": "sparse_weight_patch", "version": "1"}  # in the metadata of TRL's files
SHAPES = "shapes"  # of TRL's tensors, as JSON: our addition, which TRL ignores
POSITIONS, VALUES, SPEC = "__positions__", "__values__", "__delta_spec__"  # of slime and verl; the last of verl alone
ENCODINGS = {"indices": (4,), "deltas": (2, 4), "deltas_zstd": (2, 4), "dense": (0,)}  # of slime and verl: bytes a position
DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of a file that is compressed
NUMBERS = ("pos_start", "pos_end", "pos_width", "val_start", "val_end")

Shape = tuple[int, ...]
ShapesOf = Callable[[list[str]], Mapping[str, Shape]]


class PatchPiece(NamedTuple):
    """Entries of one tensor in a file. positions: None if they are all positions. dtype: of the tensor in its model."""

    file: BinaryIO
    positions: HeaderEntry | None
    gaps: bool
    values: HeaderEntry
    dtype: torch.dtype


class StoredPatch(Mapping[str, SparseTensor]):
    """The tensors of a patch in open files. Headers, bounds and checksums are checked now, each tensor when it is read.

    path: a file; or a folder with the files of one sync, as slime writes it.
    shapes_of: tensor names -> their shapes in the base; for TRL's files, which hold none.
    layout: "trl", "slime" or "verl". metadata: what an adapter's metadata says of it.
    Raises FormatError.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack, shapes_of: ShapesOf | None = None) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self._path, self._one_at_a_time = path, threading.Lock()
        self._states: dict[BinaryIO, State] = {}
        self._parts: dict[str, list[PatchPiece]] = {}
        self._shapes: dict[str, Shape] = {}
        versions = set()
        for each in files:
            file = stack.enter_context(open_regular(each, FormatError))
            self._states[file] = state_of(file)
            with whole_file(each):
                entries, header = read_header(file, any_dtype=False)
            self.layout = _layout(entries, header) or "none"
            if self.layout == "trl":
                found = _of_trl(each, file, entries, header, shapes_of)
                versions.add(header.get("model_version"))
            elif self.layout in ("slime", "verl"):
                spec = _spec_of(each, file, entries, header)
                found = _of_manifest(each, file, entries, spec)
                versions.add(header.get("current_version"))
            else:
                raise FormatError(f"{each} is no weight patch of TRL, slime or verl, as the others in {path} are; take it out")
            for name, shape, part in found:
                if self._shapes.setdefault(name, shape) != shape:
                    raise FormatError(f"{each}: tensor '{name}' has shape {list(shape)}, elsewhere {list(self._shapes[name])}")
                self._parts.setdefault(name, []).append(part)
        if len(versions) > 1 or (self.layout == "trl" and len(files) > 1):
            known = ", ".join(sorted(map(str, versions)))
            raise FormatError(f"{path} holds patches of several versions ({known}), which follow one another; name one of them")
        version = next(iter(versions), None)
        self.metadata: dict[str, Any] = {
            "name": path.stem,
            "training": {"patch": self.layout} | ({"version": version} if version else {}),
        }

    def __getitem__(self, name: str) -> SparseTensor:
        shape, indices, values = self._shapes[name], [], []
        with self._one_at_a_time:
            for part in self._parts[name]:
                try:
                    indices.append(_positions(part, numel_of(shape)))
                    values.append(read_tensor(part.file, part.values).to(part.dtype))
                except (CheckpointError, AdapterError) as error:
                    raise FormatError(f"{self._path}: tensor '{name}': {error}") from error
        try:
            return SparseTensor(shape, torch.cat(indices), torch.cat(values))
        except AdapterError as error:
            raise FormatError(f"{self._path}: tensor '{name}': {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def state(self) -> tuple[State, ...]:
        """See `adapter.check_unchanged`."""
        return unchanged(self._states)


def is_patch(path: Path) -> bool:
    """Whether a file, or the first file of a folder, is a weight patch, by its header.

    Raises FormatError for one that is compressed, which has to be decompressed first.
    """
    try:
        with open_regular(sorted(path.glob("*.safetensors"))[0] if path.is_dir() else path) as file:
            if file.read(4) == ZSTD:
                raise FormatError(
                    f"{file.name} is compressed with zstd, as slime writes it with the encoding deltas_zstd; decompress it: "
                    f"zstd -d < {file.name} > patch.safetensors"
                )
            file.seek(0)
            return _layout(*read_header(file)) is not None
    except (CheckpointError, OSError, IndexError):
        return False


def checksum_of(positions: Iterator[Tensor], values: Iterator[Tensor]) -> int:
    """The checksum of slime and verl, from the content in pieces: torch.hash_tensor of positions ^ (that of values << 1).

    torch.hash_tensor is the XOR of all elements as 64 bits: integers widened, floating-point numbers as float64.
    """
    sums = [0, 0]
    for number, pieces in enumerate((positions, values)):
        for piece in pieces:
            wide = piece.double().numpy().view(np.uint64) if piece.is_floating_point() else piece.numpy().astype(np.uint64)
            sums[number] ^= int(np.bitwise_xor.reduce(wide))
    return sums[0] ^ (sums[1] << 1)


def _layout(entries: Mapping[str, HeaderEntry], header: Mapping[str, str]) -> str | None:
    if header.get("format") == TRL["format"]:
        return "trl"
    if SPEC in entries and VALUES in entries:
        return "verl"
    return "slime" if entries.keys() == {POSITIONS, VALUES} and "params" in header else None


def _of_trl(
    path: Path,
    file: BinaryIO,
    entries: Mapping[str, HeaderEntry],
    header: Mapping[str, str],
    shapes_of: ShapesOf | None,
) -> Iterator[tuple[str, Shape, PatchPiece]]:
    """NAME.idx and NAME.val of each tensor that changed in part, and NAME of one that is sent whole."""
    encoding = header.get("encoding")
    if header.get("version") != TRL["version"] or encoding not in ("raw", "gap_delta"):
        what = f"version {shown(header.get('version'))} with encoding {shown(encoding)}"
        raise FormatError(f"{path} is a weight patch of TRL, {what}; expected version '1' with 'raw' or 'gap_delta'")
    if header.get("sparse") != "True":
        raise FormatError(
            f"{path} is an anchor of TRL, which holds whole weights: use it as a checkpoint (`shira extract BASE {path}`)"
        )
    names = [name.removesuffix(".val") for name in entries if name.endswith(".val")]
    whole = [name for name in entries if not name.endswith((".val", ".idx"))]
    if len(names) * 2 + len(whole) != len(entries) or not all(f"{name}.idx" in entries for name in names):
        raise FormatError(f"{path}: expected NAME.idx and NAME.val for each tensor, found {shown(list(entries))}")
    known = dict(_shapes_in(path, header))
    if shapes_of is not None:
        known |= shapes_of(names)
    for name in names:
        values, positions = entries[f"{name}.val"], entries[f"{name}.idx"]
        dtypes = (torch.int32,) if encoding == "raw" else (torch.uint16, torch.uint32)
        if len(values.form.shape) != 1 or positions.form.shape != values.form.shape or positions.form.dtype not in dtypes:
            raise FormatError(
                f"{path}: tensor '{name}': expected one position ({' or '.join(map(dtype_name, dtypes))}) for each value, "
                f"found {dtype_name(positions.form.dtype)} {list(positions.form.shape)} for {list(values.form.shape)}"
            )
        if name not in known:
            total = sum(entries[f"{each}.val"].form.shape[0] for each in names if entries[f"{each}.val"].form.shape)
            raise FormatError(
                f"{path} is a weight patch of TRL ({total:,} entries in {len(names)} tensors, {encoding}, model version "
                f"{shown(header.get('model_version'))}), which holds no shapes. Convert it with the model that it is for: "
                f"`shira convert {path} --base MODEL -o adapter.safetensors`"
            )
        _check_count(path, name, known[name], values.form.shape[0])
        yield name, known[name], PatchPiece(file, positions, encoding == "gap_delta", values, values.form.dtype)
    for name in whole:
        form = entries[name].form
        if form.dtype not in FLOAT_DTYPES:
            raise FormatError(f"{path}: tensor '{name}' must be floating point, found {dtype_name(form.dtype)}")
        flat = entries[name]._replace(form=Form((numel_of(form.shape),), form.dtype))
        yield name, form.shape, PatchPiece(file, None, False, flat, form.dtype)


def _shapes_in(path: Path, header: Mapping[str, str]) -> dict[str, Shape]:
    try:
        found = strict_json(header.get(SHAPES, "{}"))
        return {str(name): tuple(shape) for name, shape in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: metadata '{SHAPES}' must be a JSON object of lists: {error}") from error


def _spec_of(path: Path, file: BinaryIO, entries: Mapping[str, HeaderEntry], header: Mapping[str, str]) -> dict[str, Any]:
    """The manifest: encoding, params, checksum. slime has it in the file's metadata, verl in a tensor of bytes."""
    try:
        if SPEC in entries:
            return dict(strict_json(read_tensor(file, entries[SPEC]).numpy().tobytes()))
        spec: dict[str, Any] = {"encoding": header.get("encoding"), "params": strict_json(header["params"])}
        return spec | ({"checksum": int(header["checksum"])} if "checksum" in header else {})
    except (ValueError, TypeError, CheckpointError) as error:
        raise FormatError(f"{path}: the manifest of the patch cannot be read: {error}") from error


def _of_manifest(
    path: Path, file: BinaryIO, entries: Mapping[str, HeaderEntry], spec: Mapping[str, Any]
) -> Iterator[tuple[str, Shape, PatchPiece]]:
    """The parts of slime's and verl's layout: the bytes of all positions, all values, and where each tensor has its own."""
    encoding, params, values = spec.get("encoding"), spec.get("params"), entries[VALUES]
    positions = entries.get(POSITIONS, HeaderEntry(Form((0,), torch.uint8), 0, 0))
    if not isinstance(encoding, str) or encoding not in ENCODINGS or not isinstance(params, list):
        known = ", ".join(map(repr, ENCODINGS))
        raise FormatError(f"{path}: expected a list of params and an encoding of {known}, found {shown(encoding)}")
    if positions.form.dtype != torch.uint8 or len(positions.form.shape) != 1 or len(values.form.shape) != 1:
        raise FormatError(f"{path}: expected {POSITIONS} to be bytes, and {VALUES} to have one dimension")
    at = value_at = 0
    for param in params:
        fits = isinstance(param, dict) and isinstance(param.get("name"), str) and isinstance(param.get("shape"), list)
        if not fits or not all(type(param.get(key)) is int for key in NUMBERS):
            raise FormatError(
                f"{path}: expected name, dtype, shape and {', '.join(NUMBERS)} of each tensor, found {shown(param)}"
            )
        name, shape, (begin, end, width, first, last) = param["name"], tuple(param["shape"]), (param[key] for key in NUMBERS)
        count = last - first
        dtype = DTYPES.get(str(param.get("dtype")))
        if dtype is None or torch.promote_types(dtype, values.form.dtype) != values.form.dtype:
            raise FormatError(
                f"{path}: tensor '{name}' is {shown(param.get('dtype'))} in values of {dtype_name(values.form.dtype)}; "
                f"expected {', '.join(DTYPES)}, and values that can hold it"
            )
        _check_count(path, name, shape, count)
        width = 0 if encoding == "dense" else width
        fits = width in ENCODINGS[encoding] and end - begin == count * width and (begin, first) == (at, value_at)
        if not fits or (encoding == "dense" and count != numel_of(shape)):
            raise FormatError(
                f"{path}: tensor '{name}': expected {encoding} from byte {at} and values from {value_at} on, one for each "
                f"position, found bytes {begin} to {end}, {width} a position, and values {first} to {last}"
            )
        at, value_at = end, last
        if encoding == "dense":
            where = None
        else:
            unit = torch.int32 if encoding == "indices" else {2: torch.uint16, 4: torch.uint32}[width]
            where = HeaderEntry(Form((count,), unit), positions.begin + begin, positions.begin + end)
        size = values.form.dtype.itemsize
        held = HeaderEntry(Form((count,), values.form.dtype), values.begin + first * size, values.begin + last * size)
        yield name, shape, PatchPiece(file, where, encoding != "indices", held, dtype)
    if at != positions.end - positions.begin or value_at != values.form.shape[0]:
        raise FormatError(
            f"{path}: the params end at byte {at} of {positions.end - positions.begin} and value {value_at} of "
            f"{values.form.shape[0]}; get it again"
        )
    if "checksum" in spec and checksum_of(_pieces(file, positions), _pieces(file, values)) != spec["checksum"]:
        raise FormatError(f"{path} has another checksum than its content; get it again")


def _pieces(file: BinaryIO, entry: HeaderEntry) -> Iterator[Tensor]:
    size = entry.form.dtype.itemsize
    for begin in range(entry.begin, entry.end, BLOCK):
        end = min(entry.end, begin + BLOCK)
        yield read_tensor(file, HeaderEntry(Form(((end - begin) // size,), entry.form.dtype), begin, end))


def _check_count(path: Path, name: str, shape: Shape, count: int) -> None:
    """Raise FormatError unless a tensor of this shape can have this number of entries. No memory is taken for it."""
    try:
        numel = numel_of(shape)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path}: tensor '{name}': {error}") from None
    if not 0 <= count <= numel:
        raise FormatError(f"{path}: tensor '{name}': expected at most {numel} entries in shape {list(shape)}, found {count}")


def _positions(part: PatchPiece, numel: int) -> Tensor:
    """The positions of a part, int32 or int64. Raises AdapterError if gaps lead out of the tensor."""
    if part.positions is None:
        return torch.arange(part.values.form.shape[0], device="cpu")
    stored = read_tensor(part.file, part.positions)
    if not part.gaps:
        return stored
    steps = stored.numpy().astype(np.int64)
    end = int(steps.sum()) + len(steps)
    if end > numel:
        raise AdapterError(f"indices must be from 0 to {numel - 1}, the gaps lead to {end - 1}")
    steps += 1
    np.cumsum(steps, out=steps)
    steps -= 1
    return torch.from_numpy(steps)
