"""Model checkpoints on disk, one tensor at a time: safetensors in the Hugging Face layout, sharded or not.

A tensor is read when it is asked for. Nothing here keeps it: its memory is freed with the caller's last reference.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor, nn

from ..errors import CheckpointError
from ..texts import described, shown, strict_json
from .paths import AnyPath, State, open_regular, path_of, state_of
from .tensorfiles import Form, HeaderEntry, malformed, read_header, read_tensor

__all__ = ["Checkpoint", "LazyTensors", "form_of", "prefix_swaps"]


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each of which is made when it is asked for. Their forms are known without."""

    def form(self, name: str) -> Form:
        """Shape and dtype of a tensor, without making it."""
        raise NotImplementedError


class Checkpoint(LazyTensors):
    """A checkpoint folder, or one .safetensors file, as a mapping of its tensors.

    path: a folder with `*.safetensors` and, if there are several, their `*.safetensors.index.json`.
    shards: file -> name -> HeaderEntry, in the file's order. A tensor of a dtype unknown here is seen as flat bytes.
    index: the file that says which tensor is in which shard; None if there is none.

    Raises CheckpointError for a malformed file, or weights in another file format; OSError if there is nothing to read.

        Checkpoint("SmolLM2-135M")["model.norm.weight"]
    """

    def __init__(self, path: AnyPath) -> None:
        if isinstance(path, nn.Module):
            raise CheckpointError(
                "expected the path of a checkpoint, as in shira.merge('SmolLM2-135M', 'poet.safetensors', 'merged'); found "
                f"{described(path)}, a model in memory. To save one with an adapter: switcher.use('poet'), switcher.release(), "
                "model.save_pretrained('merged')"
            )
        self.path = path_of(path, "Checkpoint('SmolLM2-135M')", CheckpointError)
        read = {file: _entries(file) for file in _weight_files(self.path)}
        self.shards = {file: entries for file, (entries, _) in read.items()}
        self._states = {file: state for file, (_, state) in read.items()}
        self._files: dict[str, Path] = {}
        for file, entries in self.shards.items():
            for name in entries:
                other = self._files.setdefault(name, file)
                if other != file:
                    raise CheckpointError(f"{self.path}: tensor '{name}' is in two files, {other.name} and {file.name}")
        self.index = _index(self.path)
        for name, shard in (_weight_map(self.index) if self.index else {}).items():
            if self._files.get(name) != self.path / shard:
                found = self._files[name].name if name in self._files else "no file"
                raise CheckpointError(
                    f"{self.index}: tensor '{name}' should be in {shard}, it is in {found}; get the files again"
                )

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        with self._open(file) as opened:
            return read_tensor(opened, self.shards[file][name])

    def pieces(self, name: str, length: int) -> Iterator[Tensor]:
        """The flat entries of a tensor in C order, in pieces of `length`. Each piece is read when it is asked for."""
        file = self._files[name]
        form, first, end = self.shards[file][name]
        step = length * form.dtype.itemsize
        with self._open(file) as opened:
            for begin in range(first, end, step):
                size = min(step, end - begin)
                yield read_tensor(opened, HeaderEntry(Form((size // form.dtype.itemsize,), form.dtype), begin, begin + size))

    def _open(self, file: Path) -> BinaryIO:
        """A shard, opened. Raises CheckpointError if it is no longer the file whose header was read."""
        opened = open_regular(file)
        if state_of(opened) != self._states[file]:
            opened.close()
            raise CheckpointError(f"{file} has changed since it was first looked at; begin again when nobody writes to it")
        return opened

    def form(self, name: str) -> Form:
        """Shape and dtype of a tensor, without reading it."""
        return self.shards[self._files[name]][name].form

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def other_files(self) -> list[Path]:
        """The other files in the folder, by name, without subfolders."""
        beside = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(file for file in beside if file.is_file() and file not in self.shards)


def form_of(tensors: Mapping[str, Tensor], name: str) -> Form | None:
    """Shape and dtype of a tensor, without reading it; None if there is no tensor of that name."""
    if name not in tensors:
        return None
    if isinstance(tensors, LazyTensors):
        return tensors.form(name)
    return Form(tuple(tensors[name].shape), tensors[name].dtype)


def prefix_swaps(
    names: Sequence[str], candidates: Sequence[str], known: Container[str], fits: Callable[[str, str], bool]
) -> list[dict[str, str]]:
    """The ways to replace one prefix by another that turn every name into a known name that fits.

    candidates: known names that the first name may mean. fits(name, other): whether `name` may mean the known name `other`.
    """
    mappings: list[dict[str, str]] = []
    for candidate in candidates:
        for prefix, new in _prefixes(names[0], candidate):
            mapped = {each: new + each.removeprefix(prefix) for each in names if each.startswith(prefix)}
            whole = len(mapped) == len(names) and all(other in known and fits(each, other) for each, other in mapped.items())
            if whole and mapped not in mappings:
                mappings.append(mapped)
    return mappings


def _prefixes(name: str, other: str) -> Iterator[tuple[str, str]]:
    """(prefix of `name`, prefix of `other`) for every ending of whole words that both have."""
    words, others = name.split("."), other.split(".")
    for length in range(1, min(len(words), len(others)) + 1):
        if words[-length] != others[-length]:
            return
        yield name.removesuffix(".".join(words[-length:])), other.removesuffix(".".join(others[-length:]))


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name. Raises CheckpointError if it is not clear which they are."""
    if not path.is_dir():
        if path.suffix != ".safetensors" and path.exists():
            raise CheckpointError(f"{path} is no checkpoint: expected a folder or a .safetensors file")
        return [path]
    index = _index(path)
    if index is not None:
        shards = sorted(set(_weight_map(index).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{index} names files that are not there: {', '.join(missing)}; get them, or the index, again"
            )
        return [path / shard for shard in shards]
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        files = [file for file in files if file.name == "model.safetensors"] or files
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(
            f"{path} holds {len(files)} safetensors files and no index ({files[0].name}, …); name the one that is meant"
        )
    if (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path} is no checkpoint but a Diffusers pipeline; name the folder of one of its components, such as "
            f"{path / 'unet'}"
        )
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    hint = (
        f"{pickled[0]} is a pickle, which may run code: load that model and save it as safetensors" if pickled else "found none"
    )
    raise CheckpointError(f"{path} is no checkpoint: expected .safetensors files, {hint}")


def _index(path: Path) -> Path | None:
    found = sorted(path.glob("*.safetensors.index.json")) if path.is_dir() else []
    if len(found) > 1:
        raise CheckpointError(f"{path} holds several indices: {', '.join(file.name for file in found)}; expected one")
    return found[0] if found else None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of a file in the same folder."""
    with malformed(index):
        with open_regular(index) as opened:
            weight_map = strict_json(opened.read())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    for name, file in files.items():
        if file in ("", ".", "..") or Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{index}: tensor '{name}' must lie in a file of the same folder, found {shown(file)}")
    return files


def _entries(file: Path) -> tuple[dict[str, HeaderEntry], State]:
    """The tensors of a file, name -> HeaderEntry, and the state of the file that was read."""
    with open_regular(file) as opened:
        return read_header(opened)[0], state_of(opened)
