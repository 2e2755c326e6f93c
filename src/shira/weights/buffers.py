"""Buffers that change in training, such as BatchNorm's statistics and spectral norm's vectors.

A model's output depends on them. So they are restored with the base. Those that a checkpoint holds belong to what was trained.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import same_bits
from ..sparse.tensor import FLOAT_DTYPES
from .distributed import is_sharded
from .model_tensors import OWN, is_buffer, named_tensors
from .undo import Undo

__all__ = ["Buffers"]

BEFORE = OWN + "before_"  # prefix of the names of buffers that hold the old values of others
MOST = 2**16  # entries of an integer or bool buffer; larger ones are masks and codes, which do not change


class _Known(NamedTuple):
    module: nn.Module
    name: str
    before: Tensor


class Buffers:
    """The values of a model's buffers when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._along = False
        self._known = [_Known(module, name, buffer.detach().clone()) for module, name, buffer in _buffers(model)]

    def go_along(self, undo: Undo) -> None:
        """Let the kept values be cast and moved with the model, until `undo`. A sharded model is neither cast nor moved."""
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            return
        undo.callback(self._forget)
        self._along = True
        for module, name, before in self._known:
            module.register_buffer(BEFORE + name, before, persistent=False)

    def put_back(self) -> None:
        """Restore the buffers."""
        self._follow()
        for known in self._known:
            self._put(known.module, known.name, known.before)

    def moved(self) -> list[_Known]:
        """Copies of the buffers that have changed, for `put`."""
        self._follow()
        return [known._replace(before=now.detach().clone()) for known, now in self._moved()]

    def put(self, present: list[_Known]) -> None:
        """Give buffers the values that `moved` returned."""
        for known in present:
            self._put(known.module, known.name, known.before)

    def changed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Checkpoint name -> (old value, current value) of each floating-point buffer of a checkpoint that has changed."""
        self._follow()
        names = {id(tensor): name for name, tensor in reversed(named_tensors(self.model).items()) if is_buffer(tensor)}
        return {
            names[id(now)]: (known.before, now.detach())
            for known, now in self._moved()
            if id(now) in names and now.dtype in FLOAT_DTYPES and _alike(known.before, now) and now.numel()
        }

    def _moved(self) -> Iterator[tuple[_Known, Tensor]]:
        for known in self._known:
            now = known.module._buffers.get(known.name)
            if now is not None and not (_alike(known.before, now) and same_bits(known.before, now)):
                yield known, now

    def _follow(self) -> None:
        """Fetch the kept values again: casts and moves of the model have replaced their tensors."""
        if self._along:
            self._known = [known._replace(before=_found(known)) for known in self._known]

    def _forget(self) -> None:
        self._follow()
        for module, name, _ in self._known:
            module._buffers.pop(BEFORE + name, None)
            module._non_persistent_buffers_set.discard(BEFORE + name)

    def _put(self, module: nn.Module, name: str, before: Tensor) -> None:
        now = module._buffers.get(name)
        if now is None:
            return
        if not _alike(before, now) or now.is_inference():
            module._buffers[name] = before.clone()
        elif not same_bits(before, now):
            now.detach().copy_(before)


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, buffer in module._buffers.items():
            plain: Any = type(buffer) in (Tensor, nn.Buffer)
            if not plain or buffer is None or name.startswith(OWN) or buffer.is_meta or buffer.is_sparse:
                continue
            if buffer.is_floating_point() or buffer.numel() <= MOST:
                yield module, name, buffer


def _found(known: _Known) -> Tensor:
    found = known.module._buffers.get(BEFORE + known.name)
    return known.before if found is None else found


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
