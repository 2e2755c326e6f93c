"""The entries of one weight that train: float32 masters of them, what lay there before, and which have trained earlier."""

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import TuningError
from ..sparse.positions import overlap
from ..sparse.tensor import Kind
from ..sparse.topk import top_k
from ..weights.distributed import full, is_sharded, piece_of
from ..weights.quantized import dense
from ..weights.targets import Target, is_conv1d
from ..weights.undoing import Undo
from .following import BASE, Followed, Held, Kept
from .variants.factors import Factors

__all__ = ["Masters", "Plain", "swapped"]


class Masters(Followed):
    """What trains of one weight, float32, and whether the weight has it. Each kind says what can be done with it.

    `Plain` masters are the entries themselves. Others compute the entries from other parameters (`decomposed`), or work beside
    the weight (`hybrid`, `deltas`). A kind sets `own` and defines `current`; all else has a default.

    Two signs say that the weight may not have the masters. One is their version counter, which every optimizer of plain torch
    operators moves. The other is a backward pass that has given them a gradient: AdamW with fused=True, Trainer's choice, does
    not move the counter.
    """

    kind: Kind = "overwrite"
    can_move = False  # whether other positions can take the place of its own
    can_stay_near = False  # whether each number that trains has an entry of a whole base to stay near
    beside: Factors | None = None  # a low-rank product that trains beside the entries
    side: Callable[[Tensor], Tensor] | None = None  # what is added to the module's output, of its input
    calls = 0  # forward passes that came by, those of compiled code not counted
    runs = 0  # of them, those that had a gradient to give
    learnt = False  # whether there ever was a gradient

    def __init__(self, target: Target, indices: Tensor) -> None:
        """indices: positions [k] in the target's flat entries, sorted."""
        self.name, self.weight, self.matrix = target.name, target.weight, target.matrix
        self.outputs = int(any(is_conv1d(use.module) for use in target.uses))  # the side of the matrix that the outputs are on
        sharded = is_sharded(self.weight)
        self.piece = piece_of(self.name, self.weight) if sharded else None
        base = kernels.gather(full(self.weight) if sharded else dense(self.weight), indices)
        pattern = kernels.find_pattern(indices, *self.matrix) if self.in_place else None
        self.kept = Kept(indices, indices[:0], base, pattern, BASE)
        self.uses, self.own = [], {}
        self.dense = False  # whether layers compute with the weight as any other, so that it has a gradient
        self.may_have_stepped = False
        self.written = -1
        self._seen = None

    def has_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self.own.values())

    def rounded(self) -> Tensor:
        return self.current().detach().to(self.weight.dtype)

    def write(self) -> None:
        """Bring the weight up to date if the masters have changed, or may have. Raises what `look` does."""
        self.look()
        changed = self.version != self.written
        if changed or self.may_have_stepped:
            # after a known change, autograd should raise in a backward pass through the weight as it was; otherwise most likely
            # the same values are written again, which need not raise
            self._put(self.indices, self.rounded(), self.weight if changed else self.weight.data)
            self._note()
            self.written = self.version
            self.may_have_stepped = self.has_gradient()

    def write_step(self) -> None:
        """Bring the weight up to date after the step of an optimizer that trains the masters."""
        self.may_have_stepped |= self.has_gradient()
        if self.dense:  # the base is wanted: the weight is written when it is no more
            return
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
        """Train the entries at `indices` [k] from now on. Only masters that `can_move` have this."""
        raise NotImplementedError

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


class Plain(Masters):
    """Masters of the entries themselves, one for each."""

    def __init__(self, target: Target, indices: Tensor) -> None:
        super().__init__(target, indices)
        self.values = nn.Parameter(self.base.to(torch.float32, copy=True))
        self.own = {"": self.values}
        self.can_move = self.can_stay_near = self.piece is None

    def current(self) -> Tensor:
        return self.values

    def move(self, indices: Tensor, room: int) -> None:
        """Start at what the weight holds there.

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
        holder.register_buffer(name, bits, persistent=False)
        kernels.overwrite_(self.weight, left.indices[~stays], left.base[~stays])
        self._note()
        self.kept = Kept(indices, left.indices[stays], bits, kernels.find_pattern(indices, *self.matrix), name)
        holder._buffers.pop(old, None)
        self.values.detach().copy_(values)
        self.written = self.version


@contextlib.contextmanager
def swapped(masters: Collection[Masters], still: Callable[[], bool], undo: Undo) -> Iterator[Undo]:
    """Let the weights hold the base, and the layers compute with them as they are; then what was there before, if `still`.
    Yields steps that are taken before that. undo: takes them, too, if an interrupt does not let them be taken in time.

    Autograd is not told: by its backward pass the weights have the bits again that it saw in the forward pass. If they were
    cast or moved inside, the masters are written into what became of them.
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
    plan = kernels.WritePlan.of(parts)
    known = [(each, each.written, each.may_have_stepped) for each in masters]

    def back() -> None:
        if still():
            if all(each._is_as_seen() or not each.in_place for each in masters):
                kernels.restore_(plan, look=False)
                for each, written, may_have_stepped in known:  # a step may have been taken meanwhile, and is not written yet
                    each.written, each.may_have_stepped = written, each.may_have_stepped or may_have_stepped
            else:
                for each in masters:
                    each.written = -1
        for each in masters:
            each.dense = False

    with undo.part() as steps:
        steps.callback(back)
        for each in masters:
            each.dense = True
        kernels.swap_(plan)
        yield steps
