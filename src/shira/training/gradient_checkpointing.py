"""Gradient checkpointing, which computes a block of layers again in the backward pass, while only a few weights train."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..weights.undo import Undo, hooks_of, set_hook

__all__ = ["let_gradients_into_blocks"]

SWITCH = "gradient_checkpointing"  # the attribute by which Transformers turns it on, in blocks and stacks of blocks


def let_gradients_into_blocks(model: nn.Module, trained: Iterable[nn.Module], undo: Undo) -> None:
    """Let gradients reach blocks under reentrant gradient checkpointing, until `undo`. trained: the modules that train.

    Reentrant checkpointing drops every gradient of a block if none of its inputs needs a gradient. The inputs of a stack of
    blocks come from frozen parts: the embeddings, or the convolutions of an audio encoder. So while checkpointing is on, the
    outputs of the input embeddings need a gradient, and so do those of a stack's parts in which nothing trains.
    """
    switches = [module for module in model.modules() if hasattr(module, SWITCH)]
    trains = {id(module) for module in trained}
    first: dict[int, nn.Module] = {}
    for stack in switches:
        if any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(stack).__mro__):  # a block, not a stack of them
            continue
        parts = [(part, {id(module) for module in part.modules()}) for part in stack.children()]
        if any(trains & inside for _, inside in parts):
            first |= {id(part): part for part, inside in parts if not trains & inside and _has_parameters(part)}
    get_input = getattr(model, "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        embedding = get_input() if callable(get_input) else None
        if isinstance(embedding, nn.Module):
            first[id(embedding)] = embedding
    hook = _NeedGradient(switches)
    for module in first.values():
        set_hook(undo, hooks_of(module, "_forward_hooks"), module.register_forward_hook, hook)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class _NeedGradient:
    """A forward hook: the module's output needs a gradient if checkpointing is on in one of the modules `switches`."""

    def __init__(self, switches: list[nn.Module]) -> None:
        self.switches = switches

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if torch.is_grad_enabled() and any(getattr(module, SWITCH, False) for module in self.switches):
            return _needing_gradient(output)
        return None


def _needing_gradient(output: Any) -> Any:
    """The same output, needing a gradient that nothing uses. It is no leaf: autograd forbids changing such leaves in place."""
    if isinstance(output, tuple) and type(output) is tuple:
        return tuple(_needing_gradient(part) for part in output)
    if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
        wanted = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        needing: Tensor = _Needing.apply(output, wanted)  # type: ignore[no-untyped-call]
        return needing
    return output


class _Needing(torch.autograd.Function):
    """The unchanged tensor. A view is copied, since autograd cannot follow a view whose creation it has not seen."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _wanted: Tensor) -> Tensor:
        if output._is_view() or torch.compiler.is_compiling():
            return output.clone()
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[None, None]:
        return None, None
