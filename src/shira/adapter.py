"""An adapter: for each adapted tensor a few positions and their values. How it is saved and loaded.

It is data only and knows no model. A `SparseTensor` is validated once, when it is made, so all other code can rely on it.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import AdapterError, FormatError
from .files.patches import StoredPatch, is_patch
from .files.paths import AnyPath, State, path_of
from .files.peft_files import StoredPeft, stored_peft
from .files.reading import FileChanged, StoredTensors
from .files.suggestions import adapter_in
from .files.writing import saving
from .sparse.tensor import SparseTensor
from .texts import described, shown

__all__ = [
    "Adapter",
    "Shapes",
    "as_stored",
    "check_unchanged",
    "lenders_of",
    "load",
    "open_lenders",
    "opened",
    "prefixed",
    "read",
]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A sparse high rank adapter (SHiRA, arXiv 2406.13175): a name and a `SparseTensor` for each adapted tensor.

    tensors: checkpoint name -> SparseTensor.
    metadata: anything that can be written as JSON; by convention `name`, `mask`, `base`, `training`, `license`, and
        `fingerprints` (tensor name -> `fingerprint` of the base values under it).

        adapter = shira.load("poet.safetensors")
        adapter.nnz, adapter.density, adapter.tensors["model.layers.0.mlp.up_proj.weight"].values
    """

    tensors: dict[str, SparseTensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.tensors, Mapping) or not isinstance(self.metadata, dict):
            wrong = self.metadata if isinstance(self.tensors, Mapping) else self.tensors
            raise AdapterError(
                f"an adapter is Adapter({{name: SparseTensor}}, {{...}}), two dictionaries; found {described(wrong)}"
            )
        for name, tensor in self.tensors.items() if isinstance(self.tensors, dict) else ():  # others are still in a file
            if not isinstance(name, str) or not isinstance(tensor, SparseTensor):
                raise AdapterError(
                    "an adapter's tensors are {name: SparseTensor}; "
                    f"found {described(tensor) if isinstance(name, str) else described(name)} as the "
                    f"{f'tensor {shown(name)}' if isinstance(name, str) else 'name of a tensor'}"
                )

    def check(self) -> tuple[Any, ...]:
        """Check again the tensors that others have changed in memory. Those that are still in a file are not read.

        Returns their state in memory, which is another one after each change. Raises AdapterError.
        """
        self.__post_init__()
        state = []
        for name, tensor in self.tensors.items() if isinstance(self.tensors, dict) else ():
            try:
                state.append((name, id(tensor), tensor.check()))
            except AdapterError as error:
                raise AdapterError(f"tensor '{name}' {error}") from None
        return tuple(state)

    def __repr__(self) -> str:
        """Two lines: how many entries, of what, and the mask and base that are recorded."""
        name = shown(self.name) if self.name else "without a name"
        if not isinstance(self.tensors, dict):  # still in a file, of which nothing is read for this
            return f"<shira.Adapter {name}, {len(self.tensors):,} tensors in an open file>"
        kinds = " and ".join(sorted({tensor.kind for tensor in self.tensors.values()}))
        mask, base = ((value if isinstance(value := self.metadata.get(key), dict) else {}) for key in ("mask", "base"))
        known = [f"{key} {shown(value)}" for key, value in (("mask", mask.get("name")), ("base", base.get("id"))) if value]
        return (
            f"<shira.Adapter {name}: {self.nnz:,} entries in {len(self.tensors):,} tensors, {self.density:.2%} of them, "
            f"{kinds or 'empty'}\n  {', '.join(known) or 'mask and base are not recorded'}>"
        )

    @property
    def nnz(self) -> int:
        """Number of entries that the adapter holds in all tensors."""
        return sum(t.nnz for t in self.tensors.values())

    @property
    def density(self) -> float:
        """Share of the adapted tensors' entries that the adapter holds, 0 to 1."""
        return self.nnz / max(1, sum(t.numel for t in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values in memory."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def name(self) -> str:
        """The adapter's name; '' if it has none."""
        return str(self.metadata.get("name") or "")

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Tensor name -> fingerprint of the base values under it; empty if unknown."""
        known: dict[str, str] = self.metadata.get("fingerprints") or {}
        return known if isinstance(known, dict) else {}

    @property
    def fingerprint(self) -> str | None:
        """One fingerprint of all base values that the adapter is for; None if unknown."""
        lines = "".join(f"{name} {value}\n" for name, value in sorted(self.fingerprints.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:32] if lines else None

    def save(self, path: AnyPath, *, like: AnyPath | None = None) -> None:
        """Write one safetensors file (docs/format.md), whole or not at all.

        path: of the file, "poet.safetensors". A name is taken as it is: "poet" gets no ending and becomes no folder.
        It is first a temporary file in the same folder, which is flushed and renamed. A symbolic link is followed: the file
        that it leads to is replaced, and the link stays.
        like: another file in the same folder, with an adapter of the same mask. Equal positions are not written again. A reader
            takes them from that file, so it must stay in the folder.

        Raises AdapterError if the path is a folder, if the metadata cannot be written as JSON, or for a tensor that was made
        invalid in memory; OSError (a full disk, a missing folder, a FIFO or device of that name). A file that already has the
        name is then unchanged.
        """
        with saving(path, self.metadata, like=like) as add:
            for name, tensor in self.tensors.items():
                add(name, tensor)


Stored = StoredTensors | StoredPatch | StoredPeft
Shapes = Callable[[], Mapping[str, Tensor]]  # of a model's tensors: each on the meta device
ATTEMPTS = 3  # to read a file that is replaced meanwhile


def load(path: AnyPath, *, revision: str | None = None) -> Adapter:
    """Read an adapter and check all of it.

    path: its file, or a folder with one adapter's file in it, or with `adapter.safetensors`, as a trainer saves it; or a weight
        patch of an RL trainer, a file or a folder, that holds the shapes of its tensors (docs/rl-patches.md); or a folder of
        PEFT's SHiRA or Super-Tuning whose base is found (docs/peft.md). If there is no such path, a repository of the Hugging
        Face Hub: "user/repo", "user/repo@revision". It is read from the cache of huggingface_hub, or downloaded into it.
    revision: a branch, tag or commit of the repository.
    Raises FormatError, which names the file, the tensor, what was expected and what was found; OSError if the file does not
    exist or may not be read; HubError if the hub does not have it or cannot be reached.

        adapter = shira.load("poet.safetensors")
        adapter = shira.load("user/poet", revision="v1")
    """
    return read(path, revision)[0]


def read(
    path: AnyPath, revision: str | None = None, model: Shapes | None = None, *, decoded: bool = True
) -> tuple[Adapter, tuple[State, ...]]:
    """`load`, and the states of the files that were read, the adapter's own first. model: see `opened`.

    decoded: without it, positions that the file stores as gaps are `Gaps`, and are checked when they are first used.
    The states are those of the opened files, even if other files have their names now. A file that changes while it is read is
    read again, up to ATTEMPTS times in all. Raises what `load` raises.
    """
    for _ in range(ATTEMPTS):
        try:
            with opened(path, revision, model) as adapter:
                held = dict(adapter.tensors) if decoded else {name: as_stored(adapter, name) for name in adapter.tensors}
                return Adapter(held, adapter.metadata), check_unchanged(adapter)
        except FileChanged as error:
            changed = error
    raise changed


@contextlib.contextmanager
def opened(path: AnyPath, revision: str | None = None, model: Shapes | None = None) -> Iterator[Adapter]:
    """An adapter that stays in its file. Inside the `with`, each tensor is read and checked when it is requested.

    model: the model that it is for, if there is one; for PEFT's files, which hold no shapes.
    Raises what `load` raises, and BaseMismatch if it does not belong to the model; at the end of the `with` FormatError, if the
    file has changed meanwhile.
    """
    found = adapter_in(path_of(path, "shira.load('poet.safetensors')", FormatError), revision)
    with contextlib.ExitStack() as stack:
        tensors: Stored
        try:
            tensors = StoredTensors(found, stack)
        except FormatError:
            other = StoredPatch(found, stack) if is_patch(found) else stored_peft(found, stack, model)
            if other is None:
                raise
            tensors = other
        adapter = Adapter(tensors, tensors.metadata)  # type: ignore[arg-type]  # read only
        yield adapter
        check_unchanged(adapter)


def check_unchanged(adapter: Adapter) -> tuple[State, ...]:
    """The states of the opened files of an adapter; () if it is in memory.

    Raises FormatError if one of the files has changed since it was opened.
    """
    return adapter.tensors.state() if isinstance(adapter.tensors, Stored) else ()


def lenders_of(adapter: Adapter) -> tuple[Path, ...]:
    """The files beside an opened adapter that hold positions of it. They are not opened."""
    return adapter.tensors.lenders() if isinstance(adapter.tensors, StoredTensors) else ()


def open_lenders(adapter: Adapter) -> None:
    """Open these files, so that `check_unchanged` tells their states, too. Raises FormatError."""
    if isinstance(adapter.tensors, StoredTensors):
        adapter.tensors.open_lenders()


def prefixed(adapter: Adapter, prefix: str) -> Adapter:
    """The same adapter for a model that holds its model as a part: each name begins with the prefix, such as "unet."."""
    metadata = dict(adapter.metadata)
    if adapter.fingerprints:
        metadata["fingerprints"] = {prefix + name: value for name, value in adapter.fingerprints.items()}
    return Adapter({prefix + name: tensor for name, tensor in adapter.tensors.items()}, metadata)


def as_stored(adapter: Adapter, name: str) -> SparseTensor:
    """One tensor of an adapter: `Gaps` if the adapter is still in a file that stores its positions as gaps."""
    tensors = adapter.tensors
    return tensors.tensor(name, decoded=False) if isinstance(tensors, StoredTensors) else tensors[name]
