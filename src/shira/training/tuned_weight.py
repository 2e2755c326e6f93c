"""What a tuner keeps for each weight that trains, in either of the paper's two ways (§3.3)."""

import functools
from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor, nn

from .. import kernels
from ..errors import TuningError
from ..sparse.memory_order import in_memory
from ..sparse.tensor import Kind
from ..weights.model_tensors import OWN
from ..weights.targets import Target, Use
from ..weights.undo import Undo, hooks_of, set_hook
from .following import Touched, is_cast_of

__all__ = ["Hooked", "TunedWeight"]

WHOLE = OWN + "whole"  # prefix of the names of buffers that hold a whole base weight


class TunedWeight(Protocol):
    """One weight in training: `masters.Masters`, or `Hooked`."""

    name: str
    weight: nn.Parameter
    kind: Kind
    parameters: dict[str, nn.Parameter]  # for an optimizer

    @property
    def indices(self) -> Tensor:
        """The sorted positions [k] that train."""

    def live_in(self, uses: Collection[Use], undo: Undo) -> None:
        """Start training in the modules that compute with the weight, until `undo`."""

    def touched(self) -> Touched:
        """Every entry that may differ from the base."""

    def look(self, *, to_leave: bool = False) -> None:
        """Find out what other code did to the weight. Raises TuningError if its base is no longer known."""

    def restore(self) -> None:
        """Write the base's values back to the weight. Raises what `look` raises."""


class Hooked:
    """The gradient-hook way: the weight trains, a hook clears its gradient off the mask, and a copy of its base is kept."""

    kind: Kind = "overwrite"

    def __init__(self, target: Target, indices: Tensor) -> None:
        self.name, self.weight, self.indices = target.name, target.weight, indices
        self.parameters = {"": target.weight}
        self.base = target.weight.detach().clone()
        self.holder, self.key = target.uses[0].holder, f"{WHOLE}_{target.uses[0].attribute}"
        self.attribute, self.seen = target.uses[0].attribute, target.weight._version

    def live_in(self, uses: Collection[Use], undo: Undo) -> None:
        undo.callback(self._leave)
        self.holder.register_buffer(self.key, self.base, persistent=False)
        self.weight.requires_grad_(True)
        kept = hooks_of(self.weight, "_post_accumulate_grad_hooks")
        clear = functools.partial(_clear_off_mask, self)
        set_hook(undo, kept, self.weight.register_post_accumulate_grad_hook, clear)
        for module, _, _ in uses:
            keep = functools.partial(_keep_off_mask, self)
            set_hook(undo, hooks_of(module, "_forward_pre_hooks"), module.register_forward_pre_hook, keep)

    def _leave(self) -> None:
        self.holder._buffers.pop(self.key, None)
        self.holder._non_persistent_buffers_set.discard(self.key)
        self.weight.grad = None

    def look(self, *, to_leave: bool = False) -> None:
        found = self.holder._buffers.get(self.key)
        weight, base = self.holder._parameters.get(self.attribute), self.base if found is None else found
        if weight is not self.weight or (weight.dtype, weight.shape, weight.device) != (base.dtype, base.shape, base.device):
            raise TuningError(
                f"'{self.name}' was replaced, cast or moved by itself while a tuner is attached; put it back, or call "
                "tuner.release(), which detaches and leaves the weights as they are"
            )
        if base is not self.base and not is_cast_of(self.base, base):
            raise TuningError(
                f"'{self.name}' has lost its base, which '{self.key}' beside it keeps: others have emptied or replaced that "
                "buffer while a tuner is attached, as to_empty() does; put it back, or call tuner.release()"
            )
        self.base = base
        self.indices = self.indices.to(weight.device)

    def touched(self) -> Touched:
        return Touched(self.indices, kernels.gather(self.base, self.indices), kernels.gather(self.weight, self.indices))

    def restore(self) -> None:
        self.look()
        self.weight.detach().copy_(self.base)


def _clear_off_mask(hooked: Hooked, parameter: Tensor) -> None:
    if parameter.grad is not None:
        hooked.look()
        if parameter.grad.is_sparse:  # nn.Embedding(sparse=True)
            parameter.grad = parameter.grad.to_dense()
        kept = kernels.gather(parameter.grad, hooked.indices)
        parameter.grad.zero_()
        kernels.overwrite_(*in_memory(parameter.grad, hooked.indices, kept))


def _keep_off_mask(hooked: Hooked, *_: Any) -> None:
    """Restore the entries off the mask: weight decay shrinks entries without a gradient, too."""
    hooked.look()
    weight = hooked.weight.data  # a step has increased the version counter; other weights may share it
    if hooked.weight._version != hooked.seen:
        kept = kernels.gather(weight, hooked.indices)
        weight.copy_(hooked.base)
        kernels.overwrite_(*in_memory(weight, hooked.indices, kept))
        hooked.seen = hooked.weight._version
