"""Training and evaluation mode, module by module: a user may keep a dropout or a BatchNorm in evaluation mode."""

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ["evaluating", "modes_kept"]


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, modes may change. Afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode. Afterwards each has its own mode again."""
    with modes_kept(model):
        for module in model.modules():
            module.training = False
        yield
