"""The entries of one weight that train: float32 masters of them, what lay there before, and which have trained earlier.

A model may be cast and moved while it trains, and the base must then be what the same acts make of it. So what is kept of the
base is a buffer of the module that holds the weight, and goes through each of them with it. `Masters.look` compares a weight
with what it was, before anything of it is used.
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from . import kernels
from .adapter import Kind
from .distributed import full, is_sharded, piece_of
from .errors import TuningError
from .masks import top_k
from .model_tensors import OWN
from .targets import VALUES, Use

__all__ = ["Held", "Masters", "overlap", "swapped"]

BASE = OWN + "base"  # the beginning of the names of buffers that hold what lay under the entries


class Held(NamedTuple):
    """Entries of one weight: positions [n], sorted; the base's values there and the present ones [n], the weight's dtype."""

    indices: Tensor
    base: Tensor
    values: Tensor


class Kept(NamedTuple):
    """What is known of the entries. One value, so that it is swapped at once when a mask moves.

    indices: those that train [k]; left: those that trained earlier and have kept their values [m]; both sorted.
    bits: in the weight's dtype, the base at both [k + m], then the values of those that have left [m].
    name: of the buffer that `bits` is.
    """

    indices: Tensor
    left: Tensor
    bits: Tensor
    pattern: kernels.Pattern | None
    name: str


class Seen(NamedTuple):
    """What a weight was when it was last looked at, or written."""

    storage: "weakref.ref[Any]"  # while it lives, nothing else can be at its address
    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    version: int


def overlap(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where the positions that two sorted lists share stand in the first and in the second, int64 [shared] each."""
    if old.numel() == 0:
        return old.long(), old.long()
    place = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
    in_new = (old[place] == new).nonzero().view(-1)
    return place[in_new], in_new


class Masters:
    """Float32 masters of one weight's entries, and whether the weight has them.

    Two signs that it may not: the masters' version counter, which every optimizer of plain torch operators moves, and a
    backward pass that has given them a gradient, for those that do not move it (AdamW with fused=True, Trainer's choice).

    What is derived from this computes its entries from other parameters (`decomposed`), or works beside the weight (`hybrid`,
    `deltas`).
    """

    kind: Kind = "overwrite"
    in_place = True  # whether the weight holds the entries
    side: Callable[[Tensor], Tensor] | None = None  # what is added to the module's output, of its input
    over = False  # whether the tuner is done with the model
    calls = 0  # forward passes that came by, those of compiled code not counted
    runs = 0  # of them, those that had a gradient to give
    learnt = False  # whether there ever was a gradient

    def __init__(self, name: str, weight: nn.Parameter, indices: Tensor, matrix: tuple[int, int]) -> None:
        """matrix: the rows and columns that the weight's entries are seen as, in the same order."""
        self.name, self.weight, self.matrix = name, weight, matrix
        self.piece = piece_of(name, weight) if is_sharded(weight) else None
        base = kernels.gather(full(weight), indices)
        self.kept = Kept(indices, indices[:0], base, kernels.find_pattern(indices, *matrix), BASE)
        self.uses: list[tuple[nn.Module, str, nn.Parameter]] = []  # who holds the weight, under which name, and as what
        self.values = nn.Parameter(base.to(torch.float32, copy=True))
        self.dense = False  # whether layers compute with the weight as any other, so that it has a gradient
        self.may_have_stepped = False
        self.written = self.values._version
        self._seen: Seen | None = None

    @property
    def indices(self) -> Tensor:
        return self.kept.indices

    @property
    def pattern(self) -> kernels.Pattern | None:
        return self.kept.pattern

    @property
    def base(self) -> Tensor:
        """The base's values at the entries that train [k]."""
        return self.kept.bits[: self.kept.indices.numel()]

    @property
    def left(self) -> Held:
        """The entries that trained earlier and have kept their values."""
        _, base, values = self.kept.bits.split([self.kept.indices.numel(), *[self.kept.left.numel()] * 2])
        return Held(self.kept.left, base, values)

    def live_in(self, uses: Collection[Use]) -> None:
        """Keep the base where the weight is: in the first module that holds it, unless it lies in pieces."""
        self.uses = [(use.holder, use.attribute, self._held_by(use)) for use in uses]
        holder, attribute, _ = self.uses[0]
        self.kept = self.kept._replace(name=BASE if attribute == "weight" else f"{BASE}_{attribute}")
        if self.piece is None:
            holder.register_buffer(self.kept.name, self.kept.bits, persistent=False)
        self._note()

    def _held_by(self, use: Use) -> nn.Parameter:
        weight = use.holder._parameters[use.attribute]
        return self.weight if weight is None else weight

    def leave(self) -> None:
        """Take back what `live_in` has done; whoever still holds a forward pass of the tuner's finds the module's own."""
        self.over = True
        for name in [name for name in self.uses[0][0]._buffers if _is_of(name, self.kept.name)] if self.uses else ():
            self.uses[0][0]._buffers.pop(name, None)
            self.uses[0][0]._non_persistent_buffers_set.discard(name)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What may train, by the endings of the names under which modules hold it."""
        return {"": self.values}

    def current(self) -> Tensor:
        """The entries [k] as what trains gives them, float32, for autograd."""
        return self.values

    @property
    def version(self) -> int:
        return sum(parameter._version for parameter in self.parameters().values())

    def has_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters().values())

    def rounded(self) -> Tensor:
        return self.current().detach().to(self.weight.dtype)

    def look(self) -> None:
        """Take note of what was done to the weight since the last time, a microsecond if that is nothing.

        What was cast or moved with its module is followed, and so is a weight that still has, or has again, the entries that it
        should. Raises TuningError for any other, until it is put right; nothing is written to the weight.
        """
        if self.uses and self.piece is None and not self.over and not self._is_as_seen():
            self._follow()

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
            and self._are_float32()
        )

    def _are_float32(self) -> bool:
        return self.values.dtype is torch.float32

    def _note(self) -> None:
        """What is there now is known."""
        weight = self.weight
        if self.piece is None and self.uses:
            version = sum(weight._version for _, _, weight in self.uses)
            storage = weakref.ref(weight.untyped_storage())
            self._seen = Seen(storage, weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), version)

    def _follow(self) -> None:
        """See `look`."""
        holder = self.uses[0][0]
        now = [(holder, attribute, holder._parameters.get(attribute)) for holder, attribute, _ in self.uses]
        same = all(weight is known for (_, _, weight), (_, _, known) in zip(now, self.uses, strict=True))
        weight = self._usable([found for _, _, found in now])
        self._check_registered()
        bits = holder._buffers.get(self.kept.name)
        bits = self.kept.bits if bits is None else bits
        if bits.dtype != weight.dtype:
            before = str(bits.dtype).removeprefix("torch.")
            self._refuse(f"was cast from {before} to {str(weight.dtype).removeprefix('torch.')} by itself", "cast its module")
        if bits.device != weight.device or self.values_device() != weight.device:
            self._refuse(f"was moved to {weight.device} by itself", f"move its module, module.to('{weight.device}')")
        kept = self.kept._replace(bits=bits)
        if kept.indices.device != weight.device:
            pattern = kept.pattern and kept.pattern.to(weight.device)
            kept = kept._replace(indices=kept.indices.to(weight.device), left=kept.left.to(weight.device), pattern=pattern)
        version = sum(found._version for _, _, found in now if found is not None)
        together = bits is not self.kept.bits and same and self._seen is not None and version == self._seen.version
        if not together and self._seen is not None:  # a copy of a model was not seen yet
            self._check_entries(weight, kept)
        self.uses = [(holder, attribute, found) for holder, attribute, found in now if found is not None]
        self.weight, self.kept = weight, kept
        self.put_back_to_float32()
        self.followed()
        self.written = -1  # whatever the weight holds, it is to hold the masters
        self._note()

    def values_device(self) -> torch.device:
        return next(iter(self.parameters().values())).device

    def followed(self) -> None:
        """The weight was cast, moved or replaced: what is derived from it must be computed again."""

    def put_back_to_float32(self) -> None:
        """A cast of the module takes the masters with it."""
        for parameter in self.parameters().values():
            if parameter.dtype != torch.float32:
                gradient, parameter.grad = parameter.grad, None
                parameter.data = parameter.data.float()
                parameter.grad = gradient if gradient is None else gradient.float()

    def _usable(self, found: list[nn.Parameter | None]) -> nn.Parameter:
        """The weight, if it is one that can be written to."""
        first = found[0]
        if first is None or any(weight is None for weight in found):
            self._refuse("is not there any more", "put it back")
        if is_sharded(first):
            self._refuse(
                "was replaced after attach(), as fully_shard and DeepSpeed's ZeRO-3 do",
                "shard the model first, then attach (docs/distributed.md)",
            )
        places = {(each.data_ptr(), each.stride(), each.dtype) for each in found if each is not None}
        if len(places) > 1:
            self._refuse(
                "stood for several parameters over one memory, which were parted (by a cast or a move)",
                "tie them as one Parameter, then attach",
            )
        if first.is_meta:
            self._refuse("has no data any more: it is on the meta device, as offloading leaves it", "put it back")
        if first.shape != self._shape():
            self._refuse(f"was replaced by one of shape {list(first.shape)}, it was {list(self._shape())}", "put it back")
        if not first.is_contiguous():
            self._refuse("is not contiguous any more", "call model.to(memory_format=torch.contiguous_format)")
        if not first.is_floating_point() or first.is_inference():
            self._refuse(f"was replaced by {'one made under inference_mode' if first.is_inference() else first.dtype}", "put it back")
        return first

    def _shape(self) -> torch.Size:
        return self.weight.shape if self._seen is None else self._seen.shape

    def _check_registered(self) -> None:
        for holder, attribute, _ in self.uses:
            for ending, parameter in self.parameters().items():
                found = holder._parameters.get(value_name(attribute) + ending, parameter)
                if found is not parameter:
                    self._refuse(
                        "has trained values that were replaced, as load_state_dict(assign=True) does",
                        "load without assign, or put tuner.parameters() back",
                    )

    def _check_entries(self, weight: Tensor, kept: Kept) -> None:
        """Raise TuningError unless the entries are the tuner's or the base's."""
        if not self.in_place:
            return
        k, m = kept.indices.numel(), kept.left.numel()
        found = kernels.gather(weight.detach(), torch.cat([kept.indices, kept.left]))
        base, left = kept.bits[: k + m], kept.bits[k + m :]
        ours = torch.cat([self.current().detach().to(weight.dtype), left])
        wrong = int((_differ(found, base) & _differ(found, ours)).sum())
        if wrong:
            self._refuse(
                f"was written to or replaced by others: {wrong} of its {k + m} entries in training are neither the base's nor "
                "what was trained, so what lies under them is not known",
                "load the base's weights, or those of before, into the model",
            )

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise TuningError(
            f"'{self.name}' {what}, while a tuner is attached; {remedy}, or call tuner.release(), which lets go of the model "
            "as it is"
        )

    def write(self) -> None:
        """Bring the weight up to date if the masters have changed, or may have. Raises what `look` does."""
        self.look()
        changed = self.version != self.written
        if changed or self.may_have_stepped:
            # known to have changed: autograd shall complain of a backward pass through the weight as it was; if not, most
            # likely the same values are written again, of which it need not know
            self._put(self.indices, self.rounded(), self.weight if changed else self.weight.data)
            self._note()
            self.written = self.version
            self.may_have_stepped = self.has_gradient()

    def write_step(self) -> None:
        """Bring the weight up to date after the step of an optimizer that trains the masters."""
        self.may_have_stepped |= self.has_gradient()
        self.write()
        self.may_have_stepped = False

    def _note_backward(self) -> None:
        """Compiled code has no side effects; there, the optimizer's step alone is the sign."""
        if not torch.compiler.is_compiling():
            self.may_have_stepped = self.learnt = True

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        """The masters' gradient [k], of grad_outputᵀ · input: from grad_output [tokens, rows] and what `keep` kept of the input
        [tokens, columns]."""
        self._note_backward()
        if self.pattern is not None:
            return self.pattern.gradient(grad_output, kept)
        return kernels.sampled_gradient(grad_output, kept, self.indices)

    def gradient_of_rows(self, rows: Tensor, gradients: Tensor) -> Tensor:
        """The masters' gradient [k], where row rows[i] of the weight has gradients[i]: see `kernels.gradient_of_rows`."""
        self._note_backward()
        return kernels.gradient_of_rows(rows, gradients, self.indices)

    def sample(self, gradient: Tensor) -> Tensor:
        """The masters' gradient [k] out of the weight's."""
        self._note_backward()
        return kernels.gather(gradient.contiguous(), self.indices).float()

    def keep(self, input: Tensor) -> Tensor:
        """What `gradient` needs of an input [..., columns]."""
        if self.pattern is not None and self.pattern.keeps_columns_only:
            return input.index_select(-1, self.pattern.lines)
        return input

    def held(self) -> Held:
        """Every entry that may differ from the base: those that train and those that did."""
        now = Held(self.indices, self.base, self.rounded())
        if self.left.indices.numel() == 0:
            return now
        merged = [torch.cat(parts) for parts in zip(now, self.left, strict=True)]
        order = merged[0].argsort()
        return Held(*(part[order] for part in merged))

    def move(self, indices: Tensor, room: int) -> None:
        """Train the entries at `indices` [k] from now on, starting at what the weight holds there.

        Of the entries that leave, now or earlier, the `room` that changed the most keep their values; the others are the
        base's again. The weight must have the masters' values.
        """
        held = self.held()
        in_old, in_new = overlap(self.indices, indices)
        below = kernels.gather(self.weight, indices)  # nothing else has changed the weight: this is the base, but where held
        values = below.to(torch.float32, copy=True)
        values[in_new] = self.values.detach()[in_old]
        in_held, where = overlap(held.indices, indices)
        below[where] = held.base[in_held]
        gone = torch.ones(held.indices.numel(), dtype=torch.bool, device=indices.device)
        gone[in_held] = False
        left = Held(*(part[gone] for part in held))
        change = (left.values.double() - left.base.double()).abs()
        stays = torch.zeros_like(change, dtype=torch.bool)
        stays[top_k(change, min(room, change.numel()))] = True
        old, holder = self.kept.name, self.uses[0][0]
        bits = torch.cat([below, left.base[stays], left.values[stays]])
        name = old[:-1] if old.endswith("_") else old + "_"  # another one, so that either is whole at any moment
        if self.piece is None:
            holder.register_buffer(name, bits, persistent=False)
        kernels.overwrite_(self.weight, left.indices[~stays], left.base[~stays])
        self._note()
        self.kept = Kept(indices, left.indices[stays], bits, kernels.find_pattern(indices, *self.matrix), name)
        holder._buffers.pop(old, None)
        with torch.no_grad():
            self.values.copy_(values)
        self.written = self.version

    def restore(self) -> None:
        """Put the base back. Raises what `look` does."""
        self.look()
        self._put(self.indices, self.base, self.weight)
        self._put(self.left.indices, self.left.base, self.weight)
        self._note()

    def _put(self, indices: Tensor, values: Tensor, weight: Tensor) -> None:
        """Write entries of the weight, or of what lies here of it."""
        if self.piece is not None:
            span = self.piece.span(indices)
            weight, indices, values = self.piece.local, indices[span] - self.piece.start, values[span]
        kernels.overwrite_(weight, indices, values)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has not seen its weight yet."""
        return self.__dict__ | {"_seen": None}


def value_name(attribute: str) -> str:
    """The beginning of the names under which a module holds the masters of one of its parameters."""
    return VALUES if attribute == "weight" else f"{VALUES}_{attribute}"


def _is_of(name: str, kept: str) -> bool:
    return name.rstrip("_") == kept.rstrip("_")


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Where the bits of two tensors [n] of one dtype differ, bool [n]."""
    rows = [tensor.contiguous().view(-1, 1).view(torch.uint8) for tensor in (one, other)]
    differ: Tensor = (rows[0] != rows[1]).any(1)
    return differ


@contextlib.contextmanager
def swapped(masters: Collection[Masters], still: Callable[[], bool]) -> Iterator[None]:
    """Let the weights hold the base, and the layers compute with them as they are; then what was there before, if `still`.

    Autograd is not told: by its backward pass the weights have the bits again that it saw in the forward pass. If they were cast
    or moved inside, the masters are written into what became of them.
    Raises TuningError for weights that are sharded.
    """
    if any(each.piece is not None for each in masters):
        raise TuningError("an adapter cannot be switched off on sharded weights; train with DDP, or load the base again")
    parts = []
    for each in masters:
        each.look()
        held = each.held()
        if each.in_place:
            parts.append(kernels.Write(each.weight.data, held.indices, held.base))
    plan = kernels.Plan.of(parts)
    known = [(each, each.written, each.may_have_stepped) for each in masters]

    def back() -> None:
        if still():
            if all(each._is_as_seen() or not each.in_place for each in masters):
                kernels.restore_(plan)
                for each, written, may_have_stepped in known:  # what an optimizer may have written meanwhile is gone
                    each.written, each.may_have_stepped = written, may_have_stepped
            else:
                for each in masters:
                    each.written = -1
        for each in masters:
            each.dense = False

    try:
        for each in masters:
            each.dense = True
        kernels.swap_(plan)
        yield
    finally:
        try:
            back()
        except KeyboardInterrupt:
            back()
            raise
