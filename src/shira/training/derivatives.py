"""What layers that train do not compute: second and forward derivatives, torch.func. Each is one error in place of zeros."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..errors import TuningError

__all__ = ["check_no_transform", "first_only"]

Backward = Callable[..., Any]


def first_only(backward: Backward) -> Backward:
    """A backward pass that raises TuningError if second derivatives are asked for.

    Torch's own `once_differentiable` does not where the incoming gradient is a constant: then they would silently be zero.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise TuningError(
                f"create_graph=True asks for second derivatives, and through '{ctx.masters.name}', which trains, they are not "
                "computed; leave it out, or attach with method='hook', which has them"
            )
        return backward(ctx, *gradients)

    return checked


def check_no_transform() -> None:
    """Raise TuningError inside a transform of torch.func, such as grad or vmap, and of forward-mode differentiation."""
    forward_mode = forward_ad._current_level >= 0
    if forward_mode or torch._C._are_functorch_transforms_active():
        found = "forward-mode differentiation (forward_ad)" if forward_mode else "torch.func (grad, vmap, jvp …)"
        raise TuningError(
            f"{found} cannot be applied to a model while a tuner is attached; call backward() or torch.autograd.grad, or "
            "detach() first"
        )
