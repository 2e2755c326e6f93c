"""A model's tensors at this moment: their checkpoint names, and which of them share memory.

A model may change between two calls: weights are cast, moved, tied and replaced. So nothing is cached here. Callers ask again,
and `ModelTensors.same` says whether an earlier answer is still right.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShiraError
from ..sparse.tensor import is_dense
from .distributed import is_sharded
from .quantized import is_quantized

__all__ = [
    "COMPILED",
    "OFFLOADED",
    "OWN",
    "ModelTensors",
    "ModuleTree",
    "has_own_memory",
    "is_buffer",
    "is_own",
    "named_tensors",
    "plain_model",
    "python_modules",
    "unwrapped",
]

OWN = "shira_"  # prefix of every name under which a tuner keeps something in a module
KEPT = tuple(OWN + name for name in ("base", "before_", "values", "whole"))  # of parameters and buffers
OFFLOADED = (  # what a user can do about a weight on the meta device
    "if accelerate keeps it elsewhere (enable_sequential_cpu_offload, cpu_offload, device_map), remove its hooks first: "
    "pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
COMPILED = "_orig_mod"  # the name of the original module inside the wrapper of torch.compile


def plain_model(model: Any, error: type[ShiraError], call: str) -> nn.Module:
    """The model itself, without the wrappers of torch.compile.

    Raises `error` if it is not a torch.nn.Module, or if it or a part of it is TorchScript, which holds its modules and tensors
    outside of Python. call: the call that the message recommends.
    """
    if not isinstance(model, nn.Module):
        raise error(f"a model must be a torch.nn.Module, found {type(model).__name__}; load it first, then call {call}")
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            found = f"its part '{name}' is TorchScript" if name else "found TorchScript"
            raise error(
                f"a model must consist of Python modules alone, {found} ({type(part).__name__}); load the model that was "
                f"scripted or traced, then call {call}"
            )
    return unwrapped(model)


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the wrappers of torch.compile."""
    while COMPILED in module._modules:
        module = module.get_submodule(COMPILED)
    return module


def python_modules(model: nn.Module) -> Iterator[nn.Module]:
    """A model and its parts, without TorchScript that was put in later: its modules and tensors are outside of Python."""
    return (module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, and every floating-point buffer that a checkpoint holds, under each of its checkpoint names.

    Buffers that are sparse, nested or negated views are left out.
    """
    return {name: tensor for name, tensor, _ in _walk(model, "")}


def is_buffer(tensor: Tensor) -> bool:
    """Whether a tensor of a model is a buffer, which a forward pass in training may change."""
    return not isinstance(tensor, nn.Parameter)


class ModuleTree:
    """The modules of a model when this was made.

    further: other objects to watch, as (dictionary that holds it, key, object).
    """

    def __init__(self, model: nn.Module, further: Sequence[tuple[dict[str, Any], str, Any]] = ()) -> None:
        held = [*further, *_children(model)]
        self._where: list[dict[str, Any]] = [where for where, _, _ in held]
        self._keys, self._held = [key for _, key, _ in held], [each for _, _, each in held]

    def same(self) -> bool:
        """Whether the same objects are still in the same places. Their contents are not compared."""
        return all(map(is_, map(dict.get, self._where, self._keys), self._held))

    def has_all_of(self, other: "ModuleTree") -> bool:
        """Whether each module and watched tensor of another tree, of the model later on, is in this one."""
        known = set(map(id, self._held))
        return all(id(each) in known for each in other._held if not isinstance(each, dict))


class ModelTensors:
    """A model's tensors when this was made.

    by_name: each checkpoint name -> its tensor. For tensors that are the same memory, it is the first of them.
    overlapping: the name of a tensor -> the name of a different tensor that shares some of its memory.
    first_of: the id of every tensor object in the model -> the tensor that `by_name` has for it.
    """

    def __init__(self, model: nn.Module) -> None:
        found = list(_walk(model, ""))
        self._tree = ModuleTree(model, [(where, key, tensor) for _, tensor, (where, key) in found])
        self.by_name, self.overlapping = _by_memory({name: tensor for name, tensor, _ in found})
        self._all = {name: tensor for name, tensor, _ in found}
        self.first_of = {id(tensor): self.by_name[name] for name, tensor in self._all.items()}

    def same(self) -> bool:
        """Whether the model still has the same module and tensor objects. Their contents are not compared."""
        return self._tree.same()

    def only_lost(self, later: "ModelTensors") -> bool:
        """Whether the model, as it is later, has no module and no tensor that it did not have."""
        return self._tree.has_all_of(later._tree)

    def replace_new_buffers(self, model: nn.Module, names: Collection[str]) -> None:
        """Put a copy in the place of each of these buffers that came into the model since. It may be a user's batch.

        One that shares its memory with another tensor of the model is not the user's, and stays.
        """
        known, copies = {id(tensor) for tensor in self._all.values()}, dict[int, Tensor]()
        found = list(_walk(model, "")) if names else []
        objects = {id(tensor): tensor for _, tensor, _ in found if has_own_memory(tensor)}
        tensors_in = Counter(tensor.untyped_storage()._cdata for tensor in objects.values())
        for name, tensor, (where, key) in found:
            is_new = name in names and is_buffer(tensor) and id(tensor) in objects.keys() - known
            if is_new and tensors_in[tensor.untyped_storage()._cdata] == 1:
                where[key] = copies.setdefault(id(tensor), tensor.detach().clone())

    def objects(self, names: Iterable[str]) -> list[Tensor]:
        """Every tensor object of these weights: several for one weight, if they are the same memory."""
        wanted = {id(self.by_name[name]) for name in names}
        return list({id(t): t for name, t in self._all.items() if id(self.by_name[name]) in wanted}.values())


def has_own_memory(tensor: Tensor) -> bool:
    """Whether a tensor's entries lie in its own memory: it is dense, and neither sharded nor quantized."""
    return not (is_sharded(tensor) or is_quantized(tensor)) and is_dense(tensor) and torch._C._has_storage(tensor)


_Place = tuple[dict[str, Any], str]  # the dictionary of a module that holds a tensor, and the tensor's key there


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, _Place]]:
    """Name, tensor and place of all that an adapter may change.

    Without what a lazy module has not created yet, and without TorchScript (`python_modules`).
    """
    for key, parameter in module._parameters.items():
        if parameter is not None and not is_own(key) and not nn.parameter.is_lazy(parameter):
            yield prefix + key, parameter, (module._parameters, key)
    for key, buffer in module._buffers.items():
        kept = buffer is not None and key not in module._non_persistent_buffers_set and not is_own(key)
        if not kept or buffer is None or nn.parameter.is_lazy(buffer):
            continue
        if buffer.is_floating_point() and is_dense(buffer):
            yield prefix + key, buffer, (module._buffers, key)
    for key, child in module._modules.items():
        if child is not None and not isinstance(child, torch.jit.ScriptModule):
            yield from _walk(child, prefix if key == COMPILED else f"{prefix}{key}.")


def _children(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The children of all modules; and the dictionaries that hold children and tensors, which `__setstate__` replaces."""
    for module in python_modules(model):
        for key, child in module._modules.items():
            yield module._modules, key, child
        for key in ("_modules", "_parameters", "_buffers"):
            if held := module.__dict__[key]:
                yield module.__dict__, key, held


def _by_memory(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`by_name` and `overlapping` of `ModelTensors`."""
    first: dict[tuple[Any, ...], Tensor] = {}
    by_name: dict[str, Tensor] = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if not has_own_memory(tensor):
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


def is_own(name: str) -> bool:
    """Whether a parameter or buffer of this name, without its module's, is one that a tuner keeps there."""
    return name.startswith(KEPT)
