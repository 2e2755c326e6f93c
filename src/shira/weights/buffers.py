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

__all__ = ["Buffers", "same_form"]

BEFORE = OWN + "before_"  # prefix of the names of buffers that hold the old values of others
MOST = 2**16  # entries of an integer or bool buffer; larger ones are masks and codes, which do not change


class _Value(NamedTuple):
    module: nn.Module
    name: str  # of a buffer of the module
    value: Tensor


class Buffers:
    """The values of a model's buffers when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._with_model = False
        self._kept = [_Value(module, name, buffer.detach().clone()) for module, name, buffer in _buffers(model)]

    def move_with_model(self, undo: Undo) -> None:
        """Let the kept values be cast and moved with the model, until `undo`. A sharded model is neither cast nor moved."""
        if any(is_sharded(parameter) for parameter in self.model.parameters()):
            return
        undo.callback(self._leave_model)
        self._with_model = True
        for module, name, value in self._kept:
            module.register_buffer(BEFORE + name, value, persistent=False)

    def restore(self) -> None:
        """Give the buffers their kept values again."""
        self._follow()
        self.put(self._kept)

    def copies_of_changed(self) -> list[_Value]:
        """Copies of the buffers that have changed, for `put`."""
        self._follow()
        return [kept._replace(value=now.detach().clone()) for kept, now in self._changed()]

    def put(self, values: list[_Value]) -> None:
        """Give buffers these values."""
        for module, name, value in values:
            now = module._buffers.get(name)
            if now is None:
                continue
            if not same_form(value, now) or now.is_inference():
                module._buffers[name] = value.clone()
            elif not same_bits(value, now):
                now.detach().copy_(value)

    def changed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Checkpoint name -> (kept value, present value) of each floating-point buffer of a checkpoint that has changed."""
        self._follow()
        names = {id(tensor): name for name, tensor in reversed(named_tensors(self.model).items()) if is_buffer(tensor)}
        return {
            names[id(now)]: (kept.value, now.detach())
            for kept, now in self._changed()
            if id(now) in names and now.dtype in FLOAT_DTYPES and same_form(kept.value, now) and now.numel()
        }

    def _changed(self) -> Iterator[tuple[_Value, Tensor]]:
        for kept in self._kept:
            now = kept.module._buffers.get(kept.name)
            if now is not None and not (same_form(kept.value, now) and same_bits(kept.value, now)):
                yield kept, now

    def _follow(self) -> None:
        """Fetch the kept values again: casts and moves of the model have replaced their tensors."""
        if self._with_model:
            self._kept = [kept._replace(value=_found(kept)) for kept in self._kept]

    def _leave_model(self) -> None:
        self._follow()
        for module, name, _ in self._kept:
            module._buffers.pop(BEFORE + name, None)
            module._non_persistent_buffers_set.discard(BEFORE + name)


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


def _found(kept: _Value) -> Tensor:
    found = kept.module._buffers.get(BEFORE + kept.name)
    return kept.value if found is None else found


def same_form(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and device."""
    return (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
