"""Follow a weight in training that other code casts, moves, replaces or writes to.

The base's values are a buffer of the module that holds the weight. So casts and moves of the module change them as they would
change the base itself. `Followed.look` compares a weight with its last known state before the tuner uses it.
"""

import contextlib
import weakref
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import TuningError
from ..sparse.memory_order import is_in_order
from ..sparse.tensor import FLOAT_DTYPES, Kind, dtype_name
from ..weights.distributed import Piece, is_sharded
from ..weights.model_tensors import OWN
from ..weights.targets import Use
from ..weights.undo import Undo

__all__ = ["BASE", "NEAR", "Entries", "Followed", "Touched", "Trained", "is_cast_of", "know_shared_counters", "value_name"]

BASE = OWN + "base"  # prefix of the names of buffers that hold the base's values at the entries
VALUES = OWN + "values"  # prefix of the names of parameters that hold masters
NEAR = {"rtol": 2**-6, "atol": 2**-14}  # what casts to bfloat16, or to float16, which has no small numbers, may change


class Touched(NamedTuple):
    """Entries of one weight: sorted positions [n]; the base's values and the trained values there, [n] in the weight's dtype.

    `Deltas` are the exception: their trained values are float32 differences.
    """

    indices: Tensor
    base: Tensor
    values: Tensor


class Trained(NamedTuple):
    """The trained entries of one weight or buffer."""

    shape: tuple[int, ...]
    touched: Touched
    kind: Kind


class Entries(NamedTuple):
    """What is known of a weight's entries. It is one object, so that one assignment replaces all of it when a mask moves.

    indices: positions that train [k]. earlier: positions that trained earlier and kept their values [m]. Both are sorted.
    bits: [k + 2m], in the weight's dtype: the base's values at indices and at earlier, then the trained values at earlier.
    whole_lines: what `kernels.find_whole_lines` found in indices. name: the name of the buffer `bits`.
    """

    indices: Tensor
    earlier: Tensor
    bits: Tensor
    whole_lines: kernels.WholeLines | None
    name: str


class Seen(NamedTuple):
    """The state of a weight when the tuner last looked at it or wrote to it."""

    storage: "weakref.ref[Any]"  # while it lives, no other storage can have its address
    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    version: int


class Followed:
    """A weight, and what is known of its entries. `masters.Masters` adds their training."""

    name: str
    weight: nn.Parameter
    entries: Entries
    piece: Piece | None  # this process's piece of a sharded weight
    uses: list[tuple[nn.Module, str, nn.Parameter]]  # (module that holds the weight, attribute, parameter found there)
    parameters: dict[str, nn.Parameter]  # what trains, float32, by the ending of its names in modules
    written: int  # the `version` whose values the weight holds; -1 if that is unknown
    in_place = True  # whether the trained values are written to the weight
    detached = False  # whether the tuner has left the model
    sharing: "Sequence[Followed]" = ()  # others whose weights have the same version counter
    _seen: Seen | None

    def current(self) -> Tensor:
        """The entries [k], float32, computed from the parameters that train; differentiable."""
        raise NotImplementedError

    def write(self) -> None:
        """Write the trained values to the weight, if it may not hold them."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """A number that changes when an operator of torch changes the parameters that train, or `data` is replaced."""
        return sum(parameter._version + parameter.data_ptr() for parameter in self.parameters.values())

    @property
    def counter(self) -> int:
        """A number that changes when an operator of torch changes the weight, or one that shares its version counter."""
        return sum(weight._version for _, _, weight in self.uses)

    @property
    def indices(self) -> Tensor:
        return self.entries.indices

    @property
    def whole_lines(self) -> kernels.WholeLines | None:
        return self.entries.whole_lines

    @property
    def base(self) -> Tensor:
        """The base's values at the entries that train [k]."""
        return self.entries.bits[: self.entries.indices.numel()]

    @property
    def earlier(self) -> Touched:
        """The entries that trained earlier and kept their values."""
        _, base, values = self.entries.bits.split([self.entries.indices.numel(), *[self.entries.earlier.numel()] * 2])
        return Touched(self.entries.earlier, base, values)

    def live_in(self, uses: Collection[Use], undo: Undo) -> None:
        """Register the base's values as a buffer of the first module that holds the weight, until `undo`.

        A sharded weight gets no buffer, nor does a weight to which no entries are written.
        """
        undo.callback(self.leave)
        self.uses = [(use.holder, use.attribute, self._found_in(use)) for use in uses]
        holder, attribute, _ = self.uses[0]
        self.entries = self.entries._replace(name=BASE if attribute == "weight" else f"{BASE}_{attribute}")
        self.written = self.version
        if self.piece is None and self.in_place:
            holder.register_buffer(self.entries.name, self.entries.bits, persistent=False)
            self._note()

    def _found_in(self, use: Use) -> nn.Parameter:
        weight = use.holder._parameters[use.attribute]
        return self.weight if weight is None else weight

    def leave(self) -> None:
        """Undo `live_in`. From then on a forward of the tuner that other code still holds does what the module's own does."""
        self.detached = True
        for name in [name for name in self.uses[0][0]._buffers if _is_of(name, self.entries.name)] if self.uses else ():
            self.uses[0][0]._buffers.pop(name, None)
            self.uses[0][0]._non_persistent_buffers_set.discard(name)

    def look(self, *, to_leave: bool = False) -> None:
        """Find out what other code did to the weight since the last call. If it did nothing, this takes a microsecond.

        A weight that was cast or moved with its module is followed. So is any other weight in which every entry has its trained
        value or the base's value. For all other weights, each call raises TuningError until the weight is put right.
        Nothing is written to the weight. to_leave: the tuner only wants to restore the base, whatever became of the masters.
        """
        if self.uses and self.piece is None and not self.detached and not self._is_as_seen():
            self._follow(to_leave)

    def _is_as_seen(self) -> bool:
        seen = self._seen
        if seen is None:
            return False
        version = 0
        for holder, attribute, weight in self.uses:
            if holder._parameters.get(attribute) is not weight or weight.data_ptr() != seen.address:
                return False
            version += weight._version
        return (
            version == seen.version
            and self.weight.dtype is seen.dtype
            and self.weight.shape == seen.shape
            and self.weight.stride() == seen.stride
            and seen.storage() is not None
            and all(parameter.dtype is torch.float32 for parameter in self.parameters.values())
        )

    def _is_where_it_was(self, weight: Tensor) -> bool:
        """Whether the weight has the memory in which it was last seen: only the masters were cast, or both to its own dtype."""
        seen = self._seen
        return (
            seen is not None
            and (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
            == (seen.address, seen.dtype, seen.shape, seen.stride)
            and seen.storage() is not None
        )

    def _note(self) -> None:
        """Record the present state of the weight as the known one."""
        weight = self.weight
        if self.piece is None and self.uses:
            storage = weakref.ref(weight.untyped_storage())
            self._seen = Seen(storage, weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), self.counter)

    def note_write_of(self, writes: int) -> None:
        """Record so many writes of the tuner to a weight that shares this one's version counter."""
        if self._seen is not None:
            self._seen = self._seen._replace(version=self._seen.version + writes)

    def _follow(self, to_leave: bool) -> None:
        """The slow part of `look`: the weight is not as it was last seen."""
        holder = self.uses[0][0]
        now = [(holder, attribute, holder._parameters.get(attribute)) for holder, attribute, _ in self.uses]
        same = all(weight is known for (_, _, weight), (_, _, known) in zip(now, self.uses, strict=True))
        weight = self._usable([found for _, _, found in now])
        if not to_leave:
            self._check_registered()
        bits = holder._buffers.get(self.entries.name)
        bits = self.entries.bits if bits is None else bits
        if bits.dtype != weight.dtype:
            before = dtype_name(bits.dtype)
            self._refuse(f"was cast from {before} to {dtype_name(weight.dtype)} by itself", "cast its module")
        if bits.device != weight.device or any(each.device != weight.device for each in self.parameters.values()):
            self._refuse(f"was moved to {weight.device} by itself", f"move its module, module.to('{weight.device}')")
        with_base = bits is not self.entries.bits  # the module's buffers were cast or moved, and the weight with them
        if with_base and not is_cast_of(self.entries.bits, bits):
            self._refuse(
                f"has lost the base's values that '{self.entries.name}' beside it keeps: others have emptied or replaced that "
                "buffer, as to_empty() does",
                "put the buffer back",
            )
        entries = self.entries._replace(bits=bits)
        if entries.indices.device != weight.device:
            whole_lines = entries.whole_lines and entries.whole_lines.to(weight.device)
            entries = entries._replace(
                indices=entries.indices.to(weight.device), earlier=entries.earlier.to(weight.device), whole_lines=whole_lines
            )
        version = sum(found._version for _, _, found in now if found is not None)
        unwritten = same and self._seen is not None and version == self._seen.version
        if not (unwritten and (with_base or self._is_where_it_was(weight))):
            self._check_entries(weight, entries)
        self.uses = [(holder, attribute, found) for holder, attribute, found in now if found is not None]
        self.weight, self.entries = weight, entries
        self.put_back_to_float32()
        self.followed()
        self.written = -1  # so that the next `write` writes the masters, whatever the weight holds
        self._note()

    def followed(self) -> None:
        """Called after the weight was cast, moved or replaced. A subclass computes again what it derives from the weight."""

    def put_back_to_float32(self) -> None:
        """Cast the masters back to float32: a cast of the module casts them, too."""
        for parameter in self.parameters.values():
            if parameter.dtype != torch.float32:
                gradient, parameter.grad = parameter.grad, None
                parameter.data = parameter.data.float()
                parameter.grad = gradient if gradient is None else gradient.float()

    def _usable(self, found: list[nn.Parameter | None]) -> nn.Parameter:
        """The weight. Raises TuningError unless the tuner can write to it."""
        first = found[0]
        if first is None or any(weight is None for weight in found):
            self._refuse("is not there any more", "put it back")
        if not all(isinstance(weight, nn.Parameter) for weight in found):
            self._refuse("is a tensor and no Parameter here, as in torch.func.functional_call", "call the model itself")
        if is_sharded(first):
            self._refuse(
                "was replaced after attach(), as fully_shard and DeepSpeed's ZeRO-3 do",
                "shard the model first, then attach (docs/distributed.md)",
            )
        places = {(each.data_ptr(), each.stride(), each.dtype) for each in found if each is not None}
        if len(places) > 1:
            self._refuse(
                "was several parameters that shared memory, and a cast or a move has separated them",
                "tie them as one Parameter, then attach",
            )
        if first.is_meta:
            self._refuse("has no data any more: it is on the meta device, as offloading leaves it", "put it back")
        if first.shape != self._shape():
            self._refuse(f"was replaced by one of shape {list(first.shape)}, it was {list(self._shape())}", "put it back")
        if not is_in_order(first):
            self._refuse("is not contiguous: it has gaps, or entries that share memory", "replace it by its contiguous()")
        if first.is_inference():
            self._refuse("was replaced by one made under inference_mode", "put it back")
        if first.dtype not in FLOAT_DTYPES:
            self._refuse(f"was replaced by {first.dtype}, or cast to it", "put it back, or cast the model back")
        return first

    def _shape(self) -> torch.Size:
        return self.weight.shape if self._seen is None else self._seen.shape

    def _check_registered(self) -> None:
        """Register the masters again where an equal copy took their place, as hooks of Accelerate leave it behind.

        Raises TuningError for any other parameter; and for a copy in one of several processes, which may be a gathered piece.
        """
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        for holder, attribute, _ in self.uses:
            for ending, parameter in self.parameters.items():
                name = value_name(attribute) + ending
                found = holder._parameters.get(name, parameter)
                if found is parameter:
                    continue
                if alone and found is not None and _equal(found, parameter):
                    holder._parameters[name] = parameter
                else:
                    self._refuse(
                        "or what trains of it was replaced after attach(), as load_state_dict(assign=True), fully_shard and "
                        "DeepSpeed's ZeRO-3 do",
                        "load without assign, and shard the model first, then attach (docs/distributed.md)",
                    )

    def _check_entries(self, weight: Tensor, entries: Entries) -> None:
        """Raise TuningError unless every entry has its trained value or the base's value."""
        if not self.in_place:
            return
        k, m = entries.indices.numel(), entries.earlier.numel()
        found = kernels.gather(weight.detach(), torch.cat([entries.indices, entries.earlier]))
        base, earlier = entries.bits[: k + m], entries.bits[k + m :]
        current = self.current().detach()
        before = current if self._seen is None else current.to(self._seen.dtype)  # as it was written before a cast
        wrong = _differ(found, base)
        for ours in (current, before):
            wrong &= _differ(found, torch.cat([ours.to(weight.dtype), earlier]))
        count = int(wrong.sum())
        if count:
            self._refuse(
                f"was written to or replaced by others: {count} of its {k + m} entries in training are neither the base's nor "
                "what was trained, so the base's values there are not known",
                "load the base's weights, or those of before, into the model",
            )

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise TuningError(
            f"'{self.name}' {what}, while a tuner is attached; {remedy}, or call tuner.release(), which detaches and "
            "leaves the weights as they are"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy or unpickled object knows its weight if this one does. Its weight has a version counter of its own."""
        with contextlib.suppress(TuningError):  # then the copy will raise it
            self.look()
        return self.__dict__ | {"_seen": self._seen and self._is_as_seen(), "sharing": (), "written": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        known, self._seen = self._seen, None
        if known:
            self._note()


def know_shared_counters(followed: Collection[Followed]) -> None:
    """Tell weights that share one version counter of each other: Parameters made of parts of one tensor do, as of a `chunk`.

    Otherwise what the tuner writes to one of them would look as if others had written to the rest.
    """
    there = [each for each in followed if each._seen is not None]
    before = [each.counter for each in there]
    torch.autograd.graph.increment_version([each.weight for each in there])
    if any(each.counter != old + len(each.uses) for each, old in zip(there, before, strict=True)):
        for each in there:
            before = [other.counter for other in there]
            torch.autograd.graph.increment_version(each.weight)
            each.sharing = [
                other for other, old in zip(there, before, strict=True) if other.counter != old and other is not each
            ]
    for each in there:
        each._note()


def is_cast_of(before: Tensor, now: Tensor) -> bool:
    """Whether casts and moves can have made one tensor of another."""
    if before.shape != now.shape:
        return False
    largest = torch.finfo(torch.float16).max  # what is larger may have become infinite
    before, now = before.to(now.device), now.float().clamp(-largest, largest)
    coarse = (torch.float8_e4m3fn, torch.float8_e5m2)
    between = (before.to(dtype).float() for dtype in (before.dtype, *coarse))
    return any(torch.allclose(each.clamp(-largest, largest), now, equal_nan=True, **NEAR) for each in between)


def value_name(attribute: str) -> str:
    """The prefix of the names under which a module holds the masters of one of its parameters."""
    return VALUES if attribute == "weight" else f"{VALUES}_{attribute}"


def _is_of(name: str, buffer: str) -> bool:
    """Whether a name is that of a buffer, or of the second one that `Plain.move` makes beside it."""
    return name.rstrip("_") == buffer.rstrip("_")


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Where the bits of two tensors [n] of one dtype differ, bool [n]."""
    rows = [tensor.contiguous().view(-1, 1).view(torch.uint8) for tensor in (one, other)]
    differ: Tensor = (rows[0] != rows[1]).any(1)
    return differ


def _equal(one: Tensor, other: Tensor) -> bool:
    return (one.device, one.dtype) == (other.device, other.dtype) and torch.equal(one, other)
