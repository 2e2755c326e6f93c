"""Modes that are set for a while: training or evaluation, module by module (a user may keep a dropout or a BatchNorm in
evaluation mode); and no inference mode."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .undo import Undo

__all__ = ["evaluating", "modes_kept", "writable"]

AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, modes may change. Afterwards each module has its own mode again."""
    with Undo().inner() as undo:
        undo.callback(_set_modes, [(module, module.training) for module in model.modules()])
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode. Afterwards each has its own mode again."""
    with modes_kept(model):
        for module in model.modules():
            module.training = False
        yield


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def writable() -> contextlib.AbstractContextManager[Any]:
    """A context outside of inference mode, because tensors made in inference mode cannot be written to later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else AS_IT_IS
