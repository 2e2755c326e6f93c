"""The trained entries of one weight: their float32 masters, the base's values, and the entries that trained earlier."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import TuningError
from ..sparse.memory_order import in_memory
from ..sparse.positions import overlap
from ..sparse.tensor import Kind, all_finite
from ..sparse.topk import top_k
from ..weights.distributed import full, is_sharded, piece_of
from ..weights.quantized import dense
from ..weights.targets import Target, is_conv1d
from ..weights.undo import Undo
from .following import BASE, Entries, Followed, Touched
from .variants.factors import Factors

__all__ = ["Masters", "Plain", "swapped"]


class Masters(Followed):
    """The parameters that train for one weight, float32, and whether the weight holds their values.

    `Plain` masters are the entries themselves. Other kinds compute the entries from other parameters (`decomposed`), or add to
    the layer's output (`hybrid`, `deltas`). Each kind says what it supports. A kind sets `parameters` and defines `current`;
    everything else has a default.

    Two signs say that the weight may not hold the masters' values. One is the masters' version counter, which every optimizer
    of plain torch operators increases. The other is a backward pass that gave them a gradient: AdamW with fused=True, Trainer's
    default, does not increase the counter.
    """

    kind: Kind = "overwrite"
    can_move = False  # whether other positions can replace the present ones
    can_stay_near = False  # whether each trained number is one entry of a whole weight, so that it can be pulled to the base
    low_rank: Factors | None = None  # a low-rank product that trains beside the entries
    added: Callable[[Tensor], Tensor] | None = None  # module's input -> what is added to the module's output
    calls = 0  # forward passes so far, without those of compiled code
    calls_with_gradients = 0  # those of them in which gradients were enabled
    had_gradient = False  # whether the masters ever had a gradient
    is_base = False  # whether the base has been written back to the weight for good
    scale = 1.0  # a trained number of the entries counts this much, a power of two, so that multiplication is exact

    def __init__(self, target: Target, indices: Tensor) -> None:
        """indices: sorted positions [k] in the target's flat entries."""
        self.name, self.weight, self.matrix_shape = target.name, target.weight, target.matrix_shape
        self.output_dim = int(any(is_conv1d(use.module) for use in target.uses))  # of the matrix
        sharded = is_sharded(self.weight)
        self.piece = piece_of(self.name, self.weight) if sharded else None
        base = kernels.gather(full(self.weight) if sharded else dense(self.weight), indices)
        if not all_finite(base):
            count = int((~base.isfinite()).sum())
            raise TuningError(
                f"'{self.name}': {count} of the {base.numel()} entries that the mask has chosen are infinite or NaN, which an "
                "adapter cannot hold; mend the model, or leave the tensor out: exclude=[…]"
            )
        whole_lines = kernels.find_whole_lines(indices, *self.matrix_shape) if self.in_place else None
        self.entries = Entries(indices, indices[:0], base, whole_lines, BASE)
        self.uses, self.parameters = [], {}
        self.ignored = False  # True: layers ignore the masters and compute with the weight, which then can get a dense gradient
        self.may_have_stepped = False
        self.written = -1
        self._seen = None

    def entries_of(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """The entries [k], float32, that other values of `parameters` would give; None if that is not computed."""
        return None

    def has_gradient(self) -> bool:
        return any(parameter.grad is not None for parameter in self.parameters.values())

    def rounded(self) -> Tensor:
        return self.current().detach().to(self.weight.dtype)

    def write(self) -> None:
        """Write the masters to the weight if they have changed, or may have changed. Raises what `look` raises."""
        self.look()
        changed = self.version != self.written
        if changed or self.may_have_stepped:
            # After a known change, autograd should raise if a backward pass needs the old weight: write to the weight itself.
            # Else most likely the same values are written again, and it should not raise: write to the weight's data.
            if self.written == -1:  # the weight may hold the base at all entries
                self._put(self.earlier.indices, self.earlier.values, self.weight)
            self._put(self.indices, self.rounded(), self.weight if changed else self.weight.data)
            self._note()
            self.written = self.version
            if torch.is_grad_enabled():  # another thread may train meanwhile, and `.grad` cannot be read while it is written
                self.may_have_stepped = self.has_gradient()
            if self.is_base:  # the tuner was detached in the middle of this, by a signal handler or another thread
                self._put_base()

    def write_step(self) -> None:
        """Write the masters to the weight after a step of an optimizer that trains them."""
        self.may_have_stepped |= self.has_gradient()
        if self.ignored:  # in reference(), the weight must hold the base; it is written afterwards
            return
        self.write()
        self.may_have_stepped = False

    def _note_backward(self) -> None:
        """Record that a backward pass gave a gradient. Compiled code has no side effects; there a step is the only sign.

        Raises TuningError if the weight holds the base now, with which the gradients of earlier layers would be wrong.
        """
        if torch.compiler.is_compiling():
            return
        if self.ignored and self.in_place:
            raise TuningError(
                f"a backward pass inside reference() reached '{self.name}', whose forward pass was before the block: the "
                "weight holds the base here; call backward() after the block"
            )
        self.may_have_stepped = self.had_gradient = True

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        """The masters' gradient [k], float32: grad_outputᵀ · input at the positions.

        grad_output: [tokens, rows]. kept: what `keep` returned for the input [tokens, columns].
        """
        self._note_backward()
        if self.whole_lines is not None:
            return self.whole_lines.gradient(grad_output, kept)
        return kernels.sampled_gradient(grad_output, kept, self.indices)

    def gradient_of_images(self, grad_output: Tensor, input: Tensor, sliding: kernels.Sliding) -> Tensor:
        """The masters' gradient [k] of a convolution's weight (`kernels.sampled_images`)."""
        self._note_backward()
        return kernels.sampled_images(grad_output, input, self.indices, sliding)

    def gradient_of_rows(self, rows: Tensor, gradients: Tensor) -> Tensor:
        """The masters' gradient [k] if row rows[i] of the weight has the gradient gradients[i] (`kernels.gradient_of_rows`)."""
        self._note_backward()
        return kernels.gradient_of_rows(rows, gradients, self.indices)

    def sample(self, gradient: Tensor) -> Tensor:
        """The masters' gradient [k], sampled from the weight's."""
        self._note_backward()
        dense = gradient.to_dense() if gradient.is_sparse else gradient.contiguous()
        return kernels.gather(dense, self.indices).float()

    def keep(self, input: Tensor) -> Tensor:
        """The part of an input [..., columns] that `gradient` needs."""
        return input if self.whole_lines is None else self.whole_lines.keep(input)

    def touched(self) -> Touched:
        """Every entry that may differ from the base: those that train, and those that trained earlier."""
        now = Touched(self.indices, self.base, self.rounded())
        if self.earlier.indices.numel() == 0:
            return now
        merged = [torch.cat(fields) for fields in zip(now, self.earlier, strict=True)]
        order = merged[0].argsort()
        return Touched(*(field[order] for field in merged))

    def move(self, indices: Tensor, room: int) -> None:
        """Train the entries at `indices` [k] from now on; see `Plain.move`. Only masters with `can_move` support this."""
        raise NotImplementedError

    def restore(self) -> None:
        """Write the base's values back to the weight. Raises what `look` raises."""
        self.look(to_leave=True)
        self.is_base = True  # before it is written: a `write` that is under way sees it, and puts the base back
        self._put_base()
        self._note()

    def _put_base(self) -> None:
        self._put(self.indices, self.base, self.weight)
        self._put(self.earlier.indices, self.earlier.base, self.weight)

    def _put(self, indices: Tensor, values: Tensor, weight: Tensor) -> None:
        """Write entries of the weight, or those in this process's piece of it."""
        if self.piece is not None:
            span = self.piece.span(indices)
            weight, indices, values = self.piece.local, indices[span] - self.piece.start, values[span]
        before = [other.counter for other in self.sharing]
        try:
            kernels.overwrite_(*in_memory(weight, indices, values))
        finally:
            for other, old in zip(self.sharing, before, strict=True):
                other.note_write_of(other.counter - old)


class Plain(Masters):
    """Masters that are the entries themselves, divided by `scale`."""

    def __init__(self, target: Target, indices: Tensor, scale: float = 1.0) -> None:
        super().__init__(target, indices)
        self.scale = scale
        base = self.base.to(torch.float32, copy=True)
        self.values = nn.Parameter(base / scale)
        if scale != 1 and not torch.equal(self.values.detach() * scale, base) and bool(torch.isfinite(base).all()):
            raise TuningError(
                f"'{self.name}' holds values that lr_scale={scale:g} takes out of float32's range; give lr_scale=1"
            )
        self.parameters = {"": self.values}
        self.can_move = self.can_stay_near = self.piece is None

    def current(self) -> Tensor:
        return self.values if self.scale == 1 else self.values * self.scale

    def entries_of(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        return parameters[""].float() * self.scale

    def put_back_to_float32(self) -> None:
        """Also give values that float16 could not hold in this scale those of the weight, which was cast with them."""
        narrowed = self.values.dtype is torch.float16 and self.scale != 1 and self.piece is None
        super().put_back_to_float32()
        if narrowed:
            values = self.values.data
            lost = (values.abs() < torch.finfo(torch.float16).smallest_normal) | values.isinf()
            own = kernels.gather(self.weight.detach(), self.indices).float() / self.scale
            values[lost] = own[lost]

    def move(self, indices: Tensor, room: int) -> None:
        """Train the entries at `indices` [k] from now on. New entries start at the values that the weight holds there.

        Of the entries that leave, now or earlier, the `room` ones that changed most keep their values. The others get the
        base's values again. The weight must hold the masters' values.
        """
        touched = self.touched()
        in_old, in_new = overlap(self.indices, indices)
        below = kernels.gather(self.weight, indices)  # nothing else changes the weight: the base's values, except where touched
        values = below.to(torch.float32, copy=True)
        values[in_new] = self.current().detach()[in_old]
        in_touched, where = overlap(touched.indices, indices)
        below[where] = touched.base[in_touched]
        leaves = torch.ones(touched.indices.numel(), dtype=torch.bool, device=indices.device)
        leaves[in_touched] = False
        gone = Touched(*(field[leaves] for field in touched))
        change = (gone.values.double() - gone.base.double()).abs()
        stays = torch.zeros_like(change, dtype=torch.bool)
        stays[top_k(change, min(room, change.numel()))] = True
        old, holder = self.entries.name, self.uses[0][0]
        bits = torch.cat([below, gone.base[stays], gone.values[stays]])
        name = old[:-1] if old.endswith("_") else old + "_"  # a second buffer, so that one of the two is complete at any moment
        holder.register_buffer(name, bits, persistent=False)
        self._put(gone.indices[~stays], gone.base[~stays], self.weight)
        self._note()
        self.entries = Entries(indices, gone.indices[stays], bits, kernels.find_whole_lines(indices, *self.matrix_shape), name)
        holder._buffers.pop(old, None)
        self.values.detach().copy_(values / self.scale)
        self.written = self.version


@contextlib.contextmanager
def swapped(masters: Collection[Masters], still: Callable[[], bool], undo: Undo) -> Iterator[Undo]:
    """Inside, weights hold the base and layers ignore the masters. Afterwards, if `still()`, weights hold the trained values.

    Yields an Undo whose steps run before the trained values are written back. undo: runs them if an interrupt prevented that.
    Autograd does not notice the swap: in a later backward pass the weights have the bits of the forward pass again. If the
    weights were cast or moved inside, the masters are written to them.
    Raises TuningError for sharded weights, and what `look` raises.
    """
    if any(each.piece is not None for each in masters):
        raise TuningError("an adapter cannot be switched off on sharded weights; train with DDP, or load the base again")
    writes = []
    for each in masters:
        each.look()
        touched = each.touched()
        if each.in_place:
            writes.append(kernels.Write(*in_memory(each.weight.data, touched.indices, touched.base)))
    plan = kernels.WritePlan.of(writes)
    known = [(each, each.written, each.may_have_stepped) for each in masters]

    def back() -> None:
        if still():
            if all(each._is_as_seen() or not each.in_place for each in masters):
                kernels.restore_(plan, check=False)
                for each in masters:
                    if each.is_base:  # as in `Masters.write`
                        each._put_base()
                for each, written, may_have_stepped in known:  # a step may have been taken inside; it is not written yet
                    each.written, each.may_have_stepped = written, each.may_have_stepped or may_have_stepped
            else:
                for each in masters:
                    each.written = -1
        for each in masters:
            each.ignored = False

    with undo.inner() as steps:
        steps.callback(back)
        for each in masters:
            each.ignored = True
        kernels.swap_(plan)
        yield steps
