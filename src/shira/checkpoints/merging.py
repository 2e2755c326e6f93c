"""Merge adapters into a plain checkpoint that any tool loads: each shard is copied, and the adapters' entries are replaced."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import kernels
from ..adapter import Adapter, check_unchanged, opened
from ..errors import BaseMismatch, CheckpointError
from ..files.paths import AnyPath, flush_folder, new_folder, path_of, temporary_folder
from ..fusion.combining import combine, overflow
from ..fusion.methods import Method
from ..fusion.strengths import CheckedStrength, File, Strength, as_given, check_strengths, given_strengths, strengths_of
from ..sparse.tensor import FLOAT_DTYPES, SparseTensor, all_finite
from ..texts import markdown
from ..weights.belonging import check_base
from .renaming import names_in, renamed
from .sources import Checkpoint, identity, rewrite

__all__ = ["merge"]
Weighted = tuple[Adapter, float]
CHUNK = 2**20  # entries written together
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def merge(
    base: AnyPath,
    adapter: Adapter | AnyPath | Mapping[File, Strength] | Mapping[str, tuple[Adapter, Strength]],
    out: AnyPath,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> int:
    """Write a checkpoint folder that is `base` with adapters in it: base + Σ α · (values − base) (SHiRA Appendix I).

    base: a checkpoint folder or a safetensors file.
    adapter: an Adapter or a file, with strength 1; or several: file -> strength α, or name -> (Adapter, strength), as in
        `fuse`. To use another method than the sum, `fuse` the adapters first.
    out: a folder that does not exist, or is empty. It appears when all of its content is on the disk, and not before.
    on_progress: called with the share of the work that is done, 0 to 1.

    Each entry has the bits that `Switcher.use` gives it. All other tensors are those of the base, byte for byte. The base's
    other files (configuration, tokenizer, licence) are copied, but not its subfolders and not its weights in other formats.
    A section at the end of README.md says what was merged. Only one tensor of the base is in memory at a time, with the entries
    that adapters in files have for it.

    A checkpoint may use other tensor names than the model in memory: GPT-2's are "h.0…" on the Hub, and "transformer.h.0…" in a
    language model. If replacing one prefix by another turns all of the adapters' names into names of the checkpoint, or if
    Transformers gives the checkpoint's tensors these names when it loads it, the adapters are merged under those.

    Returns how many of the adapters' entries still have the base's value: changes too small for its dtype are rounded away.

    Raises CheckpointError if base cannot be read or out is not empty; BaseMismatch for an adapter of another base;
    FormatError or AdapterError for adapters, strengths, or sums that overflow; OSError, for example for a full disk. Then
    nothing is left in out.

        shira.merge("SmolLM2-135M-Instruct", {"poet.safetensors": 1.0, "coder.safetensors": 0.5}, "SmolLM2-poet-coder")
    """
    call = "shira.merge('base', 'poet.safetensors', 'merged')"
    out = new_folder(path_of(out, call, CheckpointError))
    with contextlib.ExitStack() as files:
        adapters = _in_files(adapter, files)
        return _merge(Checkpoint(base), adapters, out, on_progress)


def _merge(
    checkpoint: Checkpoint,
    adapters: Mapping[str, tuple[Adapter, CheckedStrength]],
    out: Path,
    on_progress: Callable[[float], None] | None,
) -> int:
    """Check the adapters, then write the folder."""
    names = names_in(checkpoint, {label: content for label, (content, _) in adapters.items()})
    by_tensor: dict[str, list[Weighted]] = {}
    for label, (content, strength) in sorted(adapters.items()):
        there = renamed(content, names)
        check_base(label, there, checkpoint, kernels.gather)
        for name, scale in strengths_of(label, strength, content.tensors).items():
            name = names.get(name, name)
            dtype = checkpoint.form(name).dtype
            if dtype not in FLOAT_DTYPES:
                raise BaseMismatch(f"{label}: '{name}' is {dtype} in the base, which no adapter can change")
            if scale != 0:  # otherwise the base's bits stay, as in Switcher.use
                by_tensor.setdefault(name, []).append((there, scale))
    stayed: list[int] = []  # for each piece, how many of the adapters' entries have the base's value
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
        for content, _ in adapters.values():
            check_unchanged(content)
    return sum(stayed)


def _in_files(
    adapter: Adapter | AnyPath | Mapping[File, Strength] | Mapping[str, tuple[Adapter, Strength]], files: contextlib.ExitStack
) -> dict[str, tuple[Adapter, CheckedStrength]]:
    """Label -> (adapter, strength), for each form in which `merge` takes adapters. `files` closes the files that are opened."""
    if isinstance(adapter, Adapter):
        return {adapter.name or "the adapter": (adapter, 1.0)}
    if isinstance(adapter, str | os.PathLike):
        return {str(adapter): (files.enter_context(opened(adapter)), 1.0)}
    given = given_strengths("shira.merge", adapter)
    strengths = check_strengths({label: strength for label, (_, strength) in given.items()})
    return {
        label: (content if isinstance(content, Adapter) else files.enter_context(opened(content)), strengths[label])
        for label, (content, _) in given.items()
    }


def _merged(name: str, checkpoint: Checkpoint, parts: Sequence[Weighted], stayed: list[int]) -> Iterator[Tensor]:
    """One tensor with adapters in it, in flat pieces. Appends to `stayed` how many entries of a piece have the base's value."""
    held = [(adapter.tensors[name], strength) for adapter, strength in parts]
    for number, piece in enumerate(checkpoint.pieces(name, CHUNK)):
        start = number * CHUNK
        inside = [(_within(tensor, start, piece.numel()), strength) for tensor, strength in held]
        inside = [(tensor, strength) for tensor, strength in inside if tensor.nnz]
        if inside:
            union = kernels.unite([tensor.indices for tensor, _ in inside])
            indices, values, base = combine(name, inside, union, kernels.gather(piece, union.indices), Method("sum"))
            if not all_finite(values):
                raise overflow(name, piece.dtype, base)
            kernels.overwrite_(piece, indices, values)
            stayed.append(int((values == base).sum()))
        yield piece


def _within(tensor: SparseTensor, start: int, length: int) -> SparseTensor:
    """The entries in one piece of a tensor; positions are counted from the beginning of the piece."""
    first, last = (int(torch.searchsorted(tensor.indices, edge)) for edge in (start, start + length))
    indices, values = tensor.indices[first:last].cpu() - start, tensor.values[first:last].cpu()
    return SparseTensor((length,), indices, values, tensor.kind)


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to write into. It is renamed to `out` if nothing fails, and removed otherwise."""
    try:
        with temporary_folder(out.parent) as temporary:
            yield temporary
            flush_folder(temporary)
            os.replace(temporary, out)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {out} ({error.strerror}); nothing was left there") from error
    flush_folder(out.parent)


def _note(readme: Path, base: str | None, adapters: Mapping[str, tuple[Adapter, CheckedStrength]], stayed: int) -> None:
    """Append to the model card what was merged. The card's header, which states the licence, stays first."""
    from ..version import __version__

    lines = [
        "",
        "## Merged adapters",
        "",
        f"`shira merge` (shira-adapters {__version__}) wrote these sparse adapters into the weights of {markdown(base)}:",
        "",
        "| adapter | strength | entries | base values | licence |",
        "|---|---|---|---|---|",
    ]
    for label, (adapter, strength) in sorted(adapters.items()):
        given = f"{strength:g}" if isinstance(strength, float) else json.dumps(as_given(strength), ensure_ascii=False)
        cells = [os.path.basename(label), given, adapter.nnz, adapter.fingerprint or "not recorded"]
        cells.append(adapter.metadata.get("license") or "not stated")
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    if stayed:
        lines += ["", f"{stayed} entries have the value of the base: no change, or one smaller than its dtype can hold."]
    with open(readme, "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
