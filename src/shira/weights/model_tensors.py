"""A model's tensors as they are at this moment: what a checkpoint calls them, and which of them are one memory.

A model may change between two calls: weights are cast, moved, tied and replaced. So nothing here is remembered: whoever needs
to know asks again, and `ModelTensors.same` says whether the answer is still the last one.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShiraError
from .distributed import is_sharded
from .quantized import is_quantized

__all__ = ["OWN", "ModelTensors", "Tree", "is_buffer", "named_tensors", "plain_model"]

OWN = "shira_"  # the beginning of every name under which a tuner keeps something in a module
COMPILED = "_orig_mod"  # the name under which torch.compile keeps a module in its wrapper


def plain_model(model: Any, error: type[ShiraError], call: str) -> nn.Module:
    """The model itself, taken out of what torch.compile has made of it.

    Raises `error` if it is no model, with the call that was meant.
    """
    if not isinstance(model, nn.Module):
        raise error(f"a model must be a torch.nn.Module, found {type(model).__name__}; load it first, then call {call}")
    plain: nn.Module = model
    while (inner := plain._modules.get(COMPILED)) is not None:
        plain = inner
    return plain


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, and every floating-point buffer that a checkpoint holds, by each name that it has there."""
    return {name: tensor for name, tensor, _ in _walk(model, "")}


def is_buffer(tensor: Tensor) -> bool:
    """Whether one of a model's tensors is a buffer, which a forward pass in training may change."""
    return not isinstance(tensor, nn.Parameter)


class Tree:
    """The modules that a model consists of, when this was made; and what else is held in some of their dictionaries."""

    def __init__(self, model: nn.Module, further: Sequence[tuple[dict[str, Any], str, Any]] = ()) -> None:
        held = [*further, *_children(model)]
        self._where: list[dict[str, Any]] = [where for where, _, _ in held]
        self._keys, self._held = [key for _, key, _ in held], [each for _, _, each in held]

    def same(self) -> bool:
        """Whether they are still where they were: objects, not what is in them."""
        return all(map(is_, map(dict.get, self._where, self._keys), self._held))


class ModelTensors:
    """What a model's tensors were when this was made.

    by_name: each tensor by every name that it has in a checkpoint; tensors that are one memory are one here, the first.
    overlapping: the name of a tensor -> that of another one that shares a part of its memory, but is not the same.
    numbers: of every tensor object in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        found = list(_walk(model, ""))
        self._tree = Tree(model, [(where, key, tensor) for _, tensor, (where, key) in found])
        self.by_name, self.overlapping = _by_memory({name: tensor for name, tensor, _ in found})
        self._all = {name: tensor for name, tensor, _ in found}
        self.numbers = {id(tensor) for tensor in self._all.values()}

    def same(self) -> bool:
        """Whether the model still consists of the same modules and tensors: objects, not what is in them."""
        return self._tree.same()

    def objects(self, names: Iterator[str] | list[str]) -> list[Tensor]:
        """Every parameter object that stands for one of these weights: several, if they are one memory."""
        wanted = {id(self.by_name[name]) for name in names}
        return list({id(t): t for name, t in self._all.items() if id(self.by_name[name]) in wanted}.values())


_Place = tuple[dict[str, Any], str]  # the dictionary of a module in which a tensor is held, and its name there


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, _Place]]:
    """Name, tensor and place of everything that an adapter may touch; what a lazy module will make once it is called is not."""
    for key, parameter in module._parameters.items():
        if parameter is not None and not key.startswith(OWN) and not nn.parameter.is_lazy(parameter):
            yield prefix + key, parameter, (module._parameters, key)
    for key, buffer in module._buffers.items():
        kept = buffer is not None and key not in module._non_persistent_buffers_set and not key.startswith(OWN)
        if kept and buffer is not None and buffer.is_floating_point():
            yield prefix + key, buffer, (module._buffers, key)
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if key == COMPILED else f"{prefix}{key}.")


def _children(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for module in model.modules():
        for key, child in module._modules.items():
            yield module._modules, key, child


def _by_memory(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each name's tensor, the first of those that are one memory; and which share a part of theirs with which other."""
    first: dict[tuple[Any, ...], Tensor] = {}
    by_name: dict[str, Tensor] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor) or is_quantized(tensor) or not torch._C._has_storage(tensor):
            by_name[name] = tensor
            continue
        storage, begin = tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.itemsize
        key = (storage, begin, tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor),)
        by_name[name] = first.setdefault(key, tensor)
        if by_name[name] is tensor and tensor.numel():
            reach = sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            spans.setdefault(storage, []).append((begin, begin + (reach + 1) * tensor.itemsize, name))
    overlapping: dict[str, str] = {}
    for together in spans.values():
        together.sort()
        for number, (_, end, name) in enumerate(together):
            for begin, _, other in together[number + 1 :]:
                if begin >= end:
                    break
                if by_name[name] is not by_name[other]:
                    overlapping.setdefault(name, other)
                    overlapping.setdefault(other, name)
    return by_name, overlapping
