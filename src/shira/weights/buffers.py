"""Buffers that change in training, such as BatchNorm's statistics and spectral norm's vectors.

A model's output depends on them. So they are restored with the base. Those that a checkpoint holds belong to what was trained.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TuningError
from ..kernels import same_bits
from ..sparse.tensor import FLOAT_DTYPES, is_dense
from ..texts import described
from .distributed import is_sharded
from .model_tensors import OWN, is_buffer, is_own, named_tensors
from .undo import Undo

__all__ = ["Buffers", "same_form"]

BEFORE = OWN + "before_"  # prefix of the names of buffers that hold the old values of others
MOST = 2**16  # entries of an integer or bool buffer; larger ones are masks and codes, which do not change


class _Value(NamedTuple):
    module: nn.Module
    name: str  # of a buffer of the module
    value: Tensor


class _Aside(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor | None  # the object that was there
    value: Tensor | None  # its value, if it may be written to

    @property
    def now(self) -> Tensor | None:
        return self.buffer if self.value is None else self.value


class Buffers:
    """The values of a model's buffers when this was made.

    Only the tensors that were the model's then, and those that were put there from here, are written to. A module may have
    assigned any other tensor, such as the user's batch, to its buffer. That one is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._with_model = False
        self._aside: list[_Aside] | None = None  # what training has made of them, while they have the base's values
        self._own = {(module, name): buffer for module, name, buffer in _buffers(model)}  # those that may be written to
        self._kept = [_Value(module, name, buffer.detach().clone()) for (module, name), buffer in self._own.items()]

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

    def set_aside(self) -> None:
        """Give the buffers their kept values until `put_back`."""
        self._follow()
        self._aside = [
            _Aside(module, name, now, now.detach().clone() if now is not None and self._may_write(module, name, now) else None)
            for (module, name, _), now in self._changed()
        ]
        self.restore()

    def put_back(self) -> None:
        """Put the buffers back that were there before `set_aside`, with their values."""
        for module, name, buffer, value in self._aside or ():
            if name in module._buffers:
                module._buffers[name] = buffer
            if buffer is not None and value is not None:
                self._own[module, name] = buffer
                self.put([_Value(module, name, value)])
        self._aside = None

    def named_changed(self) -> dict[str, Tensor]:
        """Name -> present value of every buffer that has changed, also of those that no checkpoint holds.

        Without those that have another shape or dtype now, or are None, since `with_values` cannot take them.
        """
        self._follow()
        names = self._names()
        return {
            names[id(kept.module)] + kept.name: now.detach()
            for kept, now in self._changed()
            if id(kept.module) in names and now is not None and same_form(kept.value, now)
        }

    def with_values(self, values: Mapping[str, Tensor]) -> list[_Value]:
        """Values by the names of `named_changed`, for `put`. Raises TuningError for a buffer that is not there in this form."""
        self._follow()
        names = self._names()
        known = {names[id(kept.module)] + kept.name: kept for kept in self._kept if id(kept.module) in names}
        found = []
        for name, value in values.items():
            kept = known.get(name)
            if (
                kept is None
                or not isinstance(value, Tensor)
                or (value.dtype, value.shape) != (kept.value.dtype, kept.value.shape)
            ):
                here = "none" if kept is None else f"{kept.value.dtype} {list(kept.value.shape)}"
                raise TuningError(f"the checkpoint has a buffer '{name}', {described(value)}, and this model has {here}")
            found.append(kept._replace(value=value.to(kept.value.device)))
        return found

    def names(self) -> dict[int, str]:
        """id of a buffer -> its name in `named_changed`."""
        names = self._names()
        return {
            id(kept.module._buffers[kept.name]): names[id(kept.module)] + kept.name
            for kept in self._kept
            if id(kept.module) in names and kept.name in kept.module._buffers
        }

    def _names(self) -> dict[int, str]:
        """id of a module -> its name with a dot behind, "" for the model itself."""
        return {id(module): f"{name}.".lstrip(".") for name, module in self.model.named_modules()}

    def put(self, values: list[_Value]) -> None:
        """Give buffers these values."""
        for module, name, value in values:
            now = module._buffers.get(name)
            if name not in module._buffers or not _is_examined(now):
                continue
            fits = now is not None and same_form(value, now) and not now.is_inference()
            if now is None or not fits or not (same_bits(value, now) or self._may_write(module, name, now)):
                self._own[module, name] = module._buffers[name] = value.clone()
            elif not same_bits(value, now):
                now.detach().copy_(value)

    def _may_write(self, module: nn.Module, name: str, now: Tensor) -> bool:
        """Whether a buffer is not somebody else's tensor, and not expanded, with several entries in one place."""
        return now is self._own.get((module, name)) and torch._debug_has_internal_overlap(now) != 1

    def changed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Checkpoint name -> (kept value, present value) of each floating-point buffer of a checkpoint that has changed."""
        self._follow()
        names = {id(tensor): name for name, tensor in reversed(named_tensors(self.model).items()) if is_buffer(tensor)}
        return {
            names[here]: (kept.value, now.detach())
            for kept, now in self._changed()
            if (here := id(kept.module._buffers[kept.name])) in names
            and now is not None
            and now.dtype in FLOAT_DTYPES
            and same_form(kept.value, now)
            and now.numel()
        }

    def _changed(self) -> Iterator[tuple[_Value, Tensor | None]]:
        aside = {(each.module, each.name): each.now for each in self._aside or ()}
        for kept in self._kept:
            if kept.name not in kept.module._buffers:
                continue
            now = aside.get((kept.module, kept.name), kept.module._buffers[kept.name])
            if _is_examined(now) and (now is None or not (same_form(kept.value, now) and same_bits(kept.value, now))):
                yield kept, now

    def _follow(self) -> None:
        """Fetch the kept values again: casts and moves of the model have replaced their tensors, and the buffers."""
        for number, kept in enumerate(self._kept if self._with_model else ()):
            found = _found(kept)
            if found is not kept.value:
                self._own.pop((kept.module, kept.name), None)
                self._kept[number] = kept._replace(value=found)

    def _leave_model(self) -> None:
        self._follow()
        for module, name, _ in self._kept:
            module._buffers.pop(BEFORE + name, None)
            module._non_persistent_buffers_set.discard(BEFORE + name)


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or is_own(name) or buffer.is_meta or not _is_examined(buffer):
                continue
            if buffer.is_floating_point() or buffer.numel() <= MOST:
                yield module, name, buffer


def _is_examined(buffer: Tensor | None) -> bool:
    return buffer is None or (type(buffer) in (Tensor, nn.Buffer) and is_dense(buffer))


def _found(kept: _Value) -> Tensor:
    found = kept.module._buffers.get(BEFORE + kept.name)
    return kept.value if found is None else found


def same_form(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and device."""
    return (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
