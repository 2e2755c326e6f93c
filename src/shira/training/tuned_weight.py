"""What a tuner holds of each weight that trains, in either of the paper's two ways (§3.3)."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..errors import TuningError
from ..weights.model_tensors import OWN
from ..weights.targets import Target
from ..weights.undoing import Undo, hooks_of, set_hook
from .following import Held
from .masters import Masters

__all__ = ["TunedWeight", "with_hook", "with_values"]

WHOLE = OWN + "whole"  # the beginning of the names of buffers that hold a base whole


class TunedWeight:
    """One weight in training.

    count: how many of its entries train. parameter: float32 masters [k], or the weight itself. held(): all entries that may
    differ from the base. look(), restore(): as of `Masters`. masters: with the method "values".
    """

    def __init__(self, name: str, count: int, parameter: nn.Parameter, of: "Masters | _Hooked") -> None:
        self.name, self.count, self.parameter, self._of = name, count, parameter, of
        self.held: Callable[[], Held] = of.held
        self.look: Callable[[], None] = of.look
        self.restore: Callable[[], None] = of.restore
        self.masters = of if isinstance(of, Masters) else None

    @property
    def weight(self) -> nn.Parameter:
        return self._of.weight


def with_values(target: Target, masters: Masters, undo: Undo) -> TunedWeight:
    """The sparse-values way: masters, with which the modules compute until the tuner is detached."""
    undo.callback(masters.leave)
    masters.live_in(target.uses)
    first = next(iter(masters.parameters().values()))
    return TunedWeight(target.name, masters.indices.numel(), first, masters)


def with_hook(target: Target, indices: Tensor, undo: Undo) -> TunedWeight:
    """The gradient-hook way: the weight trains, its gradient is cleared off the mask."""
    hooked = _Hooked(target, indices)
    hooked.install(target, undo)
    return TunedWeight(target.name, indices.numel(), target.weight, hooked)


class _Hooked:
    """A weight that trains, and its base, which is cast and moved with it."""

    def __init__(self, target: Target, indices: Tensor) -> None:
        self.name, self.weight, self.indices = target.name, target.weight, indices
        self.base = target.weight.detach().clone()
        self.holder, self.key = target.uses[0].holder, f"{WHOLE}_{target.uses[0].attribute}"
        self.attribute, self.seen = target.uses[0].attribute, target.weight._version

    def install(self, target: Target, undo: Undo) -> None:
        undo.callback(self._leave)
        self.holder.register_buffer(self.key, self.base, persistent=False)
        self.weight.requires_grad_(True)
        kept = hooks_of(self.weight, "_post_accumulate_grad_hooks")
        clear = functools.partial(_clear_off_mask, self)
        set_hook(undo, kept, self.weight.register_post_accumulate_grad_hook, clear)
        for module in target.modules:
            keep = functools.partial(_keep_off_mask, self)
            set_hook(undo, hooks_of(module, "_forward_pre_hooks"), module.register_forward_pre_hook, keep)

    def _leave(self) -> None:
        self.holder._buffers.pop(self.key, None)
        self.holder._non_persistent_buffers_set.discard(self.key)
        self.weight.grad = None

    def look(self) -> None:
        found = self.holder._buffers.get(self.key)
        self.base = self.base if found is None else found
        weight, base = self.holder._parameters.get(self.attribute), self.base
        if weight is not self.weight or (weight.dtype, weight.shape, weight.device) != (base.dtype, base.shape, base.device):
            raise TuningError(
                f"'{self.name}' was replaced, cast or moved by itself while a tuner is attached; put it back, or call "
                "tuner.release(), which lets go of the model as it is"
            )
        self.indices = self.indices.to(weight.device)

    def held(self) -> Held:
        return Held(self.indices, kernels.gather(self.base, self.indices), kernels.gather(self.weight, self.indices))

    def restore(self) -> None:
        self.look()
        self.weight.detach().copy_(self.base)


def _clear_off_mask(hooked: _Hooked, parameter: Tensor) -> None:
    if parameter.grad is not None:
        hooked.look()
        if parameter.grad.is_sparse:  # of an embedding that was made so
            parameter.grad = parameter.grad.to_dense()
        kept = kernels.gather(parameter.grad, hooked.indices)
        parameter.grad.zero_()
        kernels.overwrite_(parameter.grad, hooked.indices, kept)


def _keep_off_mask(hooked: _Hooked, *_: Any) -> None:
    """Weight decay shrinks entries that have no gradient, too: put those back."""
    hooked.look()
    weight = hooked.weight
    if weight._version != hooked.seen:
        kept = kernels.gather(weight, hooked.indices)
        weight.detach().copy_(hooked.base)
        kernels.overwrite_(weight, hooked.indices, kept)
        hooked.seen = weight._version
