"""Adapters into a plain checkpoint that any tool loads: copied shard by shard, the adapters' entries replaced on the way."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import kernels
from .adapter import FLOAT_DTYPES, Adapter, SparseTensor, all_finite
from .checkpoints import Checkpoint, identity, rewrite
from .errors import AdapterError, BaseMismatch, CheckpointError
from .format import opened
from .fusion import check_base, combine
from .methods import Method
from .strengths import Fixed, Strength, as_given, check_strengths, strengths_of

__all__ = ["merge"]

Path_ = str | os.PathLike[str]
Part = tuple[Adapter, float]
CHUNK = 2**20  # entries written together
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def merge(
    base: Path_,
    adapter: Adapter | Path_ | Mapping[str, Strength] | Mapping[str, tuple[Adapter, Strength]],
    out: Path_,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> int:
    """Write a checkpoint folder that is `base` with adapters in it: base + Σ α · (values − base) (SHiRA Appendix I).

    base: a checkpoint folder or a safetensors file.
    adapter: one, as it is or as a file, at strength 1; or several: file -> strength α, or name -> (Adapter, strength), as in
        `fuse`, whose other methods are for adapters that are fused first.
    out: a folder that does not exist, or is empty. It is there when all of it is on the disk, and not before.
    on_progress: called with the share of the work that is done, 0 to 1.

    Each entry has the bits that `Switcher.use` gives it; all other tensors are those of the base, byte for byte. The base's
    other files (configuration, tokenizer, licence) come along, but not its subfolders, or its weights in other formats; and
    README.md ends on what was merged. It holds one tensor of the base, and what adapters that lie in files have for it.

    Returns how many of the adapters' entries have the base's value still: changes too small for its dtype are rounded away.

    Raises CheckpointError if base cannot be read or out is not empty; BaseMismatch for an adapter of another base;
    FormatError or AdapterError for adapters, strengths, or sums that overflow; OSError (a full disk). Nothing is left then.

        shira.merge("SmolLM2-135M-Instruct", {"poet.safetensors": 1.0, "coder.safetensors": 0.5}, "SmolLM2-poet-coder")
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; name a folder that does not exist, or is empty")
    checkpoint = Checkpoint(base)
    with contextlib.ExitStack() as files:
        return _merge(checkpoint, _in_files(adapter, files), out, on_progress)


def _merge(
    checkpoint: Checkpoint,
    adapters: Mapping[str, tuple[Adapter, Fixed]],
    out: Path,
    on_progress: Callable[[float], None] | None,
) -> int:
    """Check the adapters, then write all."""
    by_tensor: dict[str, list[Part]] = {}
    for label, (content, strength) in sorted(adapters.items()):
        check_base(label, content, checkpoint, kernels.gather)
        for name, scale in strengths_of(label, strength, content.tensors).items():
            dtype = checkpoint.form(name).dtype
            if dtype not in FLOAT_DTYPES:
                raise BaseMismatch(f"{label}: '{name}' is {dtype} in the base, which no adapter can change")
            if scale != 0:  # else the base's bits stay, as in Switcher.use
                by_tensor.setdefault(name, []).append((content, scale))
    stayed: list[int] = []  # entries of each piece
    seen, total = 0, sum(file.stat().st_size for file in checkpoint.shards)

    def wrote(count: int) -> None:
        nonlocal seen
        seen += count
        if on_progress is not None:
            on_progress(min(1.0, seen / total))

    with _whole_folder(out) as folder:
        for file, entries in checkpoint.shards.items():
            touched = [name for name in entries if name in by_tensor]
            rewrite(
                file,
                folder / file.name,
                [(entries[name], _merged(name, checkpoint, by_tensor[name], stayed)) for name in touched],
                wrote,
            )
        for file in checkpoint.other_files():
            if not file.name.endswith(WEIGHTS) or file == checkpoint.index:
                rewrite(file, folder / file.name, [])
        _note(folder / "README.md", identity(checkpoint.path), adapters, sum(stayed))
    return sum(stayed)


def _in_files(
    adapter: Adapter | Path_ | Mapping[str, Strength] | Mapping[str, tuple[Adapter, Strength]], files: contextlib.ExitStack
) -> dict[str, tuple[Adapter, Fixed]]:
    """Label -> adapter and strength, whatever way they were given. `files` closes those that are read."""
    if isinstance(adapter, Adapter):
        return {adapter.name or "the adapter": (adapter, 1.0)}
    if not isinstance(adapter, Mapping):
        return {str(adapter): (files.enter_context(opened(adapter)), 1.0)}
    if not adapter:
        raise AdapterError("nothing to merge: give at least one adapter")
    strengths = check_strengths({str(key): value[1] if isinstance(value, tuple) else value for key, value in adapter.items()})
    return {
        str(key): (value[0] if isinstance(value, tuple) else files.enter_context(opened(key)), strengths[str(key)])
        for key, value in adapter.items()
    }


def _merged(name: str, checkpoint: Checkpoint, parts: Sequence[Part], stayed: list[int]) -> Iterator[Tensor]:
    """One tensor with adapters in it, piece by piece, flat; and how many entries each piece has that are as they were."""
    held = [(adapter.tensors[name], strength) for adapter, strength in parts]
    for number, piece in enumerate(checkpoint.pieces(name, CHUNK)):
        start = number * CHUNK
        inside = [(_within(tensor, start, piece.numel()), strength) for tensor, strength in held]
        inside = [(tensor, strength) for tensor, strength in inside if tensor.nnz]
        if inside:
            overlap = kernels.merge([tensor.indices for tensor, _ in inside])
            indices, values, base = combine(name, inside, overlap, kernels.gather(piece, overlap.indices), Method("sum"))
            if not all_finite(values):
                raise AdapterError(f"'{name}' would overflow {piece.dtype} at these strengths; use smaller ones")
            kernels.overwrite_(piece, indices, values)
            stayed.append(int((values == base).sum()))
        yield piece


def _within(tensor: SparseTensor, start: int, length: int) -> SparseTensor:
    """The entries of one piece of a tensor, which counts from its own beginning."""
    first, last = (int(torch.searchsorted(tensor.indices, edge)) for edge in (start, start + length))
    indices, values = tensor.indices[first:last].cpu() - start, tensor.values[first:last].cpu()
    return SparseTensor((length,), indices, values, tensor.kind)


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name if all goes well, and goes away otherwise."""
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {out} ({error.strerror}); nothing was left there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush(out.parent)


def _flush(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _note(readme: Path, base: str | None, adapters: Mapping[str, tuple[Adapter, Fixed]], stayed: int) -> None:
    """Add to the model card what was merged; what it says of the licence stays at its head."""
    from . import __version__

    lines = [
        "",
        "## Merged adapters",
        "",
        f"`shira merge` (shira-adapters {__version__}) wrote these sparse adapters into the weights of `{base}`:",
        "",
        "| adapter | strength | entries | base values | licence |",
        "|---|---|---|---|---|",
    ]
    for label, (adapter, strength) in sorted(adapters.items()):
        name = os.path.basename(label).replace("|", "\\|")
        stated = adapter.metadata.get("license") or "not stated"
        given = f"{strength:g}" if isinstance(strength, float) else json.dumps(as_given(strength))
        lines.append(f"| {name} | {given} | {adapter.nnz} | {adapter.fingerprint or 'not recorded'} | {stated} |")
    if stayed:
        lines += ["", f"{stayed} entries have the value of the base: no change, or one smaller than its dtype can hold."]
    with open(readme, "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
