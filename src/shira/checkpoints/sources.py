"""The tensors of a base, wherever it is: a checkpoint on disk (`files.checkpoint`), a model, or a mapping of tensors."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.checkpoint import Checkpoint, LazyTensors, form_of
from ..files.metadata import name_of
from ..files.paths import AnyPath, open_regular
from ..files.tensorfiles import BLOCK, HeaderEntry
from ..sparse.tensor import bytes_of, is_dense
from ..texts import described
from ..weights.distributed import is_sharded
from ..weights.model_tensors import is_own, unwrapped
from ..weights.owners import claim
from ..weights.quantized import is_quantized

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "LazyTensors",
    "base_tensors",
    "form_of",
    "identity",
    "pieces_of",
    "rewrite",
    "tensors_of",
]

CheckpointSource = AnyPath | nn.Module | Mapping[str, Tensor]


def base_tensors(base: CheckpointSource) -> Mapping[str, Tensor]:
    """The tensors of a base: those of `tensors_of`, but not of a model that has an adapter active or a tuner attached.

    Raises CheckpointError for such a model, and what `tensors_of` raises.
    """
    if isinstance(base, nn.Module):
        claim(base, "", CheckpointError)  # with an adapter in it, it is not the base
    return tensors_of(base)


def tensors_of(source: CheckpointSource) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint on disk, of a model (named as in its `state_dict`), or of a mapping.

    Sparse, nested and torch's quantized tensors are left out.

    Raises CheckpointError for a model with quantized or sharded weights and for any other source, and what `Checkpoint` raises.
    """
    if isinstance(source, nn.Module):
        for name, weight in source.named_parameters():
            if is_quantized(weight) or is_sharded(weight):
                state = "quantized" if is_quantized(weight) else "sharded"
                raise CheckpointError(f"'{name}' is {state} in this model; give a plain model or checkpoint")
        tensors = unwrapped(source).state_dict()
        return _dense({name: tensor for name, tensor in tensors.items() if not is_own(name.rpartition(".")[2])})
    if isinstance(source, Mapping):
        for name, tensor in () if isinstance(source, LazyTensors) else source.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise CheckpointError(f"expected tensors by name, found {described(tensor if isinstance(name, str) else name)}")
        return source if isinstance(source, LazyTensors) else _dense(source)
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(
            f"expected a checkpoint's folder or .safetensors file, a model, or tensors by name; found {described(source)}"
        )
    return Checkpoint(source)


def _dense(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    others = {name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and not is_dense(tensor)}
    return {name: tensors[name] for name in tensors if name not in others} if others else tensors


def pieces_of(tensors: Mapping[str, Tensor], name: str, length: int) -> Iterator[Tensor]:
    """The flat entries of a tensor in C order, on the CPU, in pieces of `length`. On disk, one piece is read at a time.

    Raises CheckpointError for a tensor on the meta device.
    """
    if isinstance(tensors, Checkpoint):
        yield from tensors.pieces(name, length)
        return
    flat = tensors[name].detach().reshape(-1)
    if flat.is_meta:
        raise CheckpointError(f"'{name}' has no data, it is on the meta device; load the model with its weights")
    for piece in flat.split(length):
        yield piece.cpu()


def identity(source: CheckpointSource) -> str | None:
    """A checkpoint's name, as `name_of` gives it; None in memory."""
    if not isinstance(source, str | os.PathLike):
        return None
    return name_of(Path(source))


def rewrite(
    file: Path,
    target: Path,
    replaced: Iterable[tuple[HeaderEntry, Iterable[Tensor]]],
    wrote: Callable[[int], None] = lambda count: None,
) -> None:
    """Copy a file piece by piece, replace some of its tensors, and flush the copy to disk.

    replaced: where a tensor is in the file, and its new content as flat tensors that fill it together; in the file's order.
    wrote: called after each write with the number of bytes written.
    """
    with open_regular(file) as reader, open(target, "xb", buffering=0) as writer:

        def write(block: memoryview) -> None:
            while block:  # an unbuffered file may write only a part
                count = writer.write(block)
                wrote(count)
                block = block[count:]

        def copy(count: int) -> None:
            while count > 0:
                block = reader.read(min(count, BLOCK))
                if not block:
                    raise CheckpointError(f"{file} became shorter while it was read; get it again")
                write(memoryview(block))
                count -= len(block)

        for entry, parts in replaced:
            copy(entry.begin - reader.tell())
            for part in parts:
                write(bytes_of(part).numpy().data)
            reader.seek(entry.end)
            if writer.tell() != entry.end:
                raise ValueError(f"{writer.tell() - entry.begin} bytes for the {entry.end - entry.begin} of {entry}")
        copy(os.fstat(reader.fileno()).st_size - reader.tell())
        os.fsync(writer.fileno())
