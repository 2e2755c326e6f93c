"""Switching in all processes of a tensor-parallel model: each has a part of every adapter, and all agree on each switch.

An adapter's fingerprint is over the base values at all positions of a tensor, and each process has the values of its own block
only. So before positions are cut, each process notes which are its own and what the base is there. At the first switch to an
adapter the processes put these values together (a bitwise or over buffers that are zero elsewhere) and compare the whole with
the fingerprint. All of them see the same bits, so all of them accept or all of them refuse.

At a switch each process tells the others twice, in a few bytes, whether it has failed: when the selection is ready, and when
it is in the weights. After a failure anywhere all processes are back on the base before anything is computed.

These questions are only asked by `Ranks.use`, which the engine calls in the same order in every process. What runs in other
threads (reading ahead) asks nothing.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import SwitchError
from ...sparse.tensor import SparseTensor
from ...weights.belonging import check_fingerprint, identifying
from ..resident import Resident
from ..selections import Part, of_key
from .mapping import Mapped, Surface, check, cut

__all__ = ["Alone", "Group", "Ranks", "Together"]


class Group(Protocol):
    """The processes that hold a model together. Each must make the same calls in the same order."""

    size: int

    def gathered(self, own: Any) -> list[Any]:
        """What each process tells the others, in their order."""

    def combined(self, content: Tensor) -> Tensor:
        """The bitwise or of bytes [n] over all processes."""


class Alone:
    """One process."""

    size = 1

    def gathered(self, own: Any) -> list[Any]:
        return [own]

    def combined(self, content: Tensor) -> Tensor:
        return content


class Together:
    """The processes of a group of torch.distributed for tensors on the CPU (gloo)."""

    def __init__(self, group: Any) -> None:
        self._group, self.size = group, torch.distributed.get_world_size(group)

    def gathered(self, own: Any) -> list[Any]:
        every = [None] * self.size
        torch.distributed.all_gather_object(every, own, group=self._group)
        return every

    def combined(self, content: Tensor) -> Tensor:
        torch.distributed.all_reduce(content, torch.distributed.ReduceOp.BOR, group=self._group)
        return content


_File = tuple[str, str]  # name and version of an adapter


class _Evidence(NamedTuple):
    """What a process knows about the base under one tensor of an adapter: values [n] at its positions, with their numbers."""

    name: str
    size: int  # positions of the whole tensor
    numbers: Tensor
    values: Tensor


class Ranks:
    """A `Resident` in each process, which all switch together or not at all.

    mapped: where the checkpoint's tensors are in this process. group: the processes. Other arguments are those of `Resident`.
    """

    def __init__(
        self,
        surface: Surface,
        mapped: Mapped,
        folder: str | os.PathLike[str],
        group: Group,
        *,
        ready: int = 8,
        host: int = 0,
    ) -> None:
        self.resident = Resident(surface, folder, ready=ready, host=host, cut=self._cut)
        self._mapped, self._group = mapped, group
        self._evidence: dict[_File, tuple[Adapter, list[_Evidence]]] = {}
        self._compared: set[_File] = set()  # the same in all processes, because only `use` changes it
        self._active: str | None = ""  # None: as in `Resident`

    def use(self, key: str) -> bool:
        """`Resident.use` in all processes. Returns whether it was another selection than before.

        Raises what it raises in any of them, in all of them; then the base is active in all of them.
        """
        if key == self._active:
            return False
        try:
            self.agree(key)
            self._in_all_processes(functools.partial(self._put, key))
        except Exception:  # it was raised in all processes
            self._active = None
            self._in_all_processes(functools.partial(self._put, ""))
            self._active = ""
            raise
        self._active = key
        return True

    def _put(self, key: str) -> None:
        self.resident.use(key)

    def _in_all_processes(self, call: Callable[[], Any]) -> None:
        """Make a call. Raise an error if it has failed in any process, or has returned different things."""
        error: Exception | None = None
        found = None
        try:
            found = call()
        except Exception as raised:  # the others wait for an answer, whatever was raised
            error = raised
        gathered = self._group.gathered((None if error is None else f"{type(error).__name__}: {error}", found))
        if error is not None:
            raise error
        for number, (message, others) in enumerate(gathered):
            if message is not None:
                raise SwitchError(f"the switch failed in process {number} of this model: {message}")
            if others != found:
                raise SwitchError("the processes of this model have read different files; all of them must see one folder")

    def agree(self, key: str) -> None:
        """Make a selection ready in all processes, and compare the base with fingerprints that were not compared before.

        One process alone has nothing to do here. Raises BaseMismatch in all processes.
        """
        if self._group.size == 1:
            return

        def ready() -> list[tuple[_File, list[int]]]:
            self.resident.prefetch(key)
            files = [(part.name, part.version) for part in of_key(key).parts]
            return [(file, [each.size for each in self._evidence[file][1]]) for file in files if file not in self._compared]

        self._in_all_processes(ready)
        for file in [(part.name, part.version) for part in of_key(key).parts]:
            if file in self._compared:
                continue
            recorded, evidence = self._evidence[file]
            for each in evidence:
                own = each.values.new_zeros(each.size)
                own[each.numbers] = each.values
                whole = self._group.combined(own.view(torch.uint8)).view(own.dtype)
                check_fingerprint(f"'{file[0]}'", each.name, recorded, whole, own.dtype)
            self._compared.add(file)
            del self._evidence[file]

    def _cut(self, part: Part, adapter: Adapter) -> Adapter:
        """This process's part of an adapter. With several processes its fingerprints are left out, and kept to be compared."""
        for name, tensor in adapter.tensors.items():
            check(f"'{part.name}'", name, tensor.shape, self._mapped)
        if self._group.size == 1:
            return adapter
        evidence: list[_Evidence] = []
        tensors: dict[str, SparseTensor] = {}
        identifies = identifying(adapter)
        for name, tensor in adapter.tensors.items():
            tensors[name], numbers = cut(name, tensor, self._mapped)
            if identifies(name, tensor):
                values = self.resident.base_values(name, tensors[name].indices).cpu()
                evidence.append(_Evidence(name, tensor.nnz, numbers, values))
        if (part.name, part.version) not in self._compared:
            self._evidence[part.name, part.version] = Adapter({}, dict(adapter.metadata)), evidence
        return Adapter(tensors, {key: value for key, value in adapter.metadata.items() if key != "fingerprints"})
