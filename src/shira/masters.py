"""The entries of one weight that train: float32 masters of them, what lay there before, and which have trained earlier."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .masks import top_k

__all__ = ["Held", "Masters", "overlap", "swapped"]


class Held(NamedTuple):
    """Entries of one weight: positions [n], sorted; the base's values there and the present ones [n], the weight's dtype."""

    indices: Tensor
    base: Tensor
    values: Tensor


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
    """

    def __init__(self, weight: nn.Parameter, indices: Tensor) -> None:
        self.weight, self.indices = weight, indices
        self.base = kernels.gather(weight, indices)
        self.pattern = kernels.find_pattern(indices, *weight.shape)
        self.left = Held(indices[:0], self.base[:0], self.base[:0])
        self.values = nn.Parameter(self.base.to(torch.float32, copy=True))
        self.written = self.values._version
        self.may_have_stepped = False
        self.dense = False  # whether layers compute with the weight as any other, so that it has a gradient

    def rounded(self) -> Tensor:
        return self.values.detach().to(self.weight.dtype)

    def write(self) -> None:
        """Bring the weight up to date if the masters have changed, or may have."""
        self.follow_weight()
        changed = self.values._version != self.written
        if changed or self.may_have_stepped:
            # known to have changed: autograd shall complain of a backward pass through the weight as it was; if not, most
            # likely the same values are written again, of which it need not know
            weight = self.weight if changed else self.weight.data
            kernels.overwrite_(weight, self.indices, self.rounded())
            self.written = self.values._version
            self.may_have_stepped = self.values.grad is not None

    def gradient(self, grad_output: Tensor, kept: Tensor) -> Tensor:
        """The masters' gradient [k] from the output's [tokens, out] and what `keep` kept [tokens, …]."""
        if self.pattern is not None:
            return self.pattern.gradient(grad_output, kept)
        return kernels.sampled_gradient(grad_output, kept, self.indices)

    def keep(self, input: Tensor) -> Tensor:
        """What the backward pass needs of a layer's input [..., in]."""
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
        kept = torch.zeros_like(change, dtype=torch.bool)
        kept[top_k(change, min(room, change.numel()))] = True
        kernels.overwrite_(self.weight, left.indices[~kept], left.base[~kept])
        self.indices, self.base, self.left = indices, below, Held(*(part[kept] for part in left))
        self.pattern = kernels.find_pattern(indices, *self.weight.shape)
        with torch.no_grad():
            self.values.copy_(values)
        self.written = self.values._version

    def restore(self) -> None:
        self.follow_weight()
        kernels.overwrite_(self.weight, self.indices, self.base)
        kernels.overwrite_(self.weight, self.left.indices, self.left.base)

    def follow_weight(self) -> None:
        """The masters move with the model, being its parameters; positions and base values must be told."""
        if self.indices.device != self.weight.device:
            self.indices, self.base = self.indices.to(self.weight.device), self.base.to(self.weight.device)
            self.left = Held(*(part.to(self.weight.device) for part in self.left))
            self.pattern = self.pattern and self.pattern.to(self.weight.device)


@contextlib.contextmanager
def swapped(masters: Collection[Masters], still: Callable[[], bool]) -> Iterator[None]:
    """Let the weights hold the base, and the layers compute with them as they are; then what was there before, if `still`.

    Autograd is not told: by its backward pass the weights have the bits again that it saw in the forward pass.
    """
    parts = []
    for each in masters:
        each.follow_weight()
        held = each.held()
        parts.append(kernels.Write(each.weight.data, held.indices, held.base))
    plan = kernels.Plan.of(parts)
    try:
        for each in masters:
            each.dense = True
        kernels.swap_(plan)
        yield
    finally:
        for each in masters:
            each.dense = False
        if still():
            kernels.restore_(plan)
