"""Buffers that change in training, such as BatchNorm's statistics and spectral norm's vectors.

A model's output depends on them. So they are restored with the base. Those that a checkpoint holds belong to what was trained.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import TuningError
from ..kernels import same_bits
from ..sparse.tensor import FLOAT_DTYPES
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


class Buffers:
    """The values of a model's buffers when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._with_model = False
        self._aside: list[_Value] | None = None  # what training has made of them, while they have the base's values
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

    def set_aside(self) -> None:
        """Give the buffers their kept values until `put_back`."""
        self._follow()
        self._aside = [kept._replace(value=now.detach().clone()) for kept, now in self._changed()]
        self.restore()

    def put_back(self) -> None:
        """Give the buffers the values that they had before `set_aside`."""
        if self._aside is not None:
            self.put(self._aside)
            self._aside = None

    def named_changed(self) -> dict[str, Tensor]:
        """Name -> present value of every buffer that has changed, also of those that no checkpoint holds."""
        self._follow()
        names = self._names()
        return {names[id(kept.module)] + kept.name: now.detach() for kept, now in self._changed() if id(kept.module) in names}

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
            names[here]: (kept.value, now.detach())
            for kept, now in self._changed()
            if (here := id(kept.module._buffers[kept.name])) in names
            and now.dtype in FLOAT_DTYPES
            and same_form(kept.value, now)
            and now.numel()
        }

    def _changed(self) -> Iterator[tuple[_Value, Tensor]]:
        aside = {(id(each.module), each.name): each.value for each in self._aside or ()}
        for kept in self._kept:
            now = kept.module._buffers.get(kept.name)
            if now is not None:
                now = aside.get((id(kept.module), kept.name), now)
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
        for name, buffer in module._buffers.items():
            plain: Any = type(buffer) in (Tensor, nn.Buffer)
            if not plain or buffer is None or is_own(name) or buffer.is_meta or buffer.is_sparse:
                continue
            if buffer.is_floating_point() or buffer.numel() <= MOST:
                yield module, name, buffer


def _found(kept: _Value) -> Tensor:
    found = kept.module._buffers.get(BEFORE + kept.name)
    return kept.value if found is None else found


def same_form(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and device."""
    return (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
