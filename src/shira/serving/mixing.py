"""Selections that share a step: the base is in the weights, and each request adds what its own selection changes, W x + ΔW x.

A step of a small model takes nearly as long for one request as for eight, because it reads all weights. So where many
selections have few requests each, one step for all is faster than turns. It rounds otherwise than the weights in place: W x is
rounded to the dtype of the model, and then the sum.
"""

import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..kernels import Group, RowChange
from ..weights.model_tensors import named_tensors
from ..weights.quantized import is_quantized
from .resident import Resident

__all__ = ["MIXED", "Mixing"]

MIXED = "mixed"  # in the place of a selection's key, which is "" or begins with a bracket

Changes = dict[int, RowChange]  # id of a weight -> what a selection changes in it
REMEMBERED = 4096  # selections of which it is known that they take turns


class Mixing:
    """Adds to the outputs of linear layers what the selections of a step change.

    most: a selection with more requests has turns of its own. held: changes of so many selections are held, 8 bytes an entry;
    those used longest ago, and not present, make room.
    wanted: called with a selection whose changes must be read, by `read` in another thread.
    `keep_fitting` chooses the layers, after forward passes: those that get each token of a step once, in their order.
    """

    def __init__(self, model: nn.Module, resident: Resident, most: int, held: int) -> None:
        self._model, self._resident, self._most, self._capacity = model, resident, most, held
        self.wanted: Callable[[str], None] = lambda key: None
        self._lock = threading.Lock()  # of the next six
        self._held: OrderedDict[str, Changes] = OrderedDict()
        self._alone: OrderedDict[str, None] = OrderedDict()  # selections that take turns, whatever the reason
        self._suspended: OrderedDict[str, None] = OrderedDict()  # those that take turns until one has succeeded
        self._reading: set[str] = set()
        self._present: set[str] = set()
        self._queued: set[str] = set()
        self._layers = _linear_layers(model)
        self._chosen = False
        self._fits: dict[int, bool] = {}  # id of a weight -> whether its layer got every token so far
        self._sharing: dict[str, Changes] = {}
        self._rows: Sequence[tuple[str, int]] = ()
        self._tokens = 0  # of the forward pass
        self._groups: dict[int, list[Group]] = {}  # id of a weight -> its changes in this step
        self._hooks = [model.register_forward_pre_hook(self._count, with_kwargs=True)]
        self._hooks += [module.register_forward_hook(self._add) for module in self._layers]

    @property
    def held(self) -> list[str]:
        """The selections whose changes are held, the one used longest ago first."""
        with self._lock:
            return list(self._held)

    def close(self) -> None:
        """Leave the model as it was found."""
        self.begin(())
        for hook in self._hooks:
            hook.remove()
        self._layers = []

    # In any thread

    def read(self, key: str) -> bool:
        """Read what a selection changes, and hold it. Returns whether it can share steps now.

        False, too, if there is no room for it. Raises what `Resident.use` raises.
        """
        with self._lock:
            self._queued.discard(key)
            if key in self._held or key in self._alone or not self._make_room():
                return key in self._held
            self._reading.add(key)
        found = None
        try:
            found = self._of(self._resident.changes(key))
        finally:
            with self._lock:
                self._reading.discard(key)
                if found is not None:
                    self._held[key] = found
                else:  # after an error, too: a turn of its own will raise it
                    _remember(self._alone, key)
        return found is not None

    def _make_room(self) -> bool:
        """Whether there is room for one more, after the selections that are not present have made room."""
        for old in [other for other in self._held if other not in self._present and other not in self._sharing]:
            if len(self._held) + len(self._reading) < self._capacity:
                break
            del self._held[old]
        return len(self._held) + len(self._reading) < self._capacity

    # In the thread that runs the model

    def keep_fitting(self) -> int:
        """After forward passes: how many layers can be shared. The others are left alone from now on."""
        kept = []
        for module, hook in zip(self._layers, self._hooks[1:], strict=True):
            kept.append(module) if self._fits.get(id(module.weight)) else hook.remove()
        self._layers, self._chosen = kept, True
        return len(kept)

    def share(self, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
        """The selections that share the next step, none or at least two; and those that wait until they can.

        sizes: key -> number of requests, in the order in which the selections should be read.
        """
        with self._lock:
            small = [key for key, size in sizes.items() if size <= self._most and key not in self._suspended]
            self._present = set(sizes)
            together = [key for key in small if not key or key in self._held]
            self._sharing = {key: self._held.get(key, {}) for key in together}
            for key in together:
                if key:
                    self._held.move_to_end(key)
            missing = [key for key in small if key and key not in self._held and key not in self._alone]
            room = self._capacity - sum(key in self._held for key in sizes)
            waiting = missing[: max(0, room)]
            new = [key for key in waiting if key not in self._queued and key not in self._reading]
            self._queued.update(new)
        for key in new:
            self.wanted(key)
        return together if len(together) > 1 else [], waiting

    def begin(self, rows: Sequence[tuple[str, int]]) -> None:
        """Before a step: (key, number of tokens) of its requests in their order, those of a selection one after another.

        The keys are among those that `share` has returned last. Nothing, if the selection of the step is in the weights.
        """
        groups: dict[int, list[Group]] = {}
        end = 0
        for key, its in itertools.groupby(rows, lambda row: row[0]):
            first, end = end, end + sum(tokens for _, tokens in its)
            for weight, change in self._sharing[key].items():
                groups.setdefault(weight, []).append((first, end, change))
        self._groups, self._rows = groups, rows

    def step_failed(self) -> None:
        """After a step that failed. The selections that shared it take turns, each until one has succeeded."""
        with self._lock:
            for key, _ in self._rows:
                _remember(self._suspended, key)
        self.begin(())

    def step_succeeded(self, key: str) -> None:
        """After a step of one selection."""
        with self._lock:
            self._suspended.pop(key, None)

    def _count(self, _model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
        if first is not None:  # numbers of tokens [..., tokens], or [..., tokens, width]
            self._tokens = (first.shape[:-1] if first.is_floating_point() else first.shape).numel()

    def _add(self, module: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight = id(module.weight)
        groups = self._groups.get(weight)
        if groups is None and self._chosen:
            return
        fits = len(inputs) == 1 and output.shape[:-1].numel() == self._tokens
        if groups is None:
            self._fits[weight] = fits and self._fits.get(weight, True)
        else:
            if not fits:
                raise RuntimeError(
                    f"a layer {list(module.weight.shape)} got {list(output.shape[:-1])} of {self._tokens} tokens"
                )
            kernels.add_products_(output, inputs[0], groups)

    def _of(self, tensors: Mapping[str, Any]) -> Changes | None:
        """The changes of a selection by weight; None if it changes other tensors than those of these layers."""
        weights, ours = named_tensors(self._model), {id(module.weight) for module in self._layers}
        if not all(id(weights[name]) in ours for name in tensors):
            return None
        return {
            id(weights[name]): kernels.row_change(tensor.indices, tensor.values.float(), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }


def _remember(keys: OrderedDict[str, None], key: str) -> None:
    keys[key] = None
    while len(keys) > REMEMBERED:
        keys.popitem(last=False)


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The plain linear layers whose weights nothing else uses."""
    parameters = [each for module in model.modules() for each in module._parameters.values() if each is not None]
    count = Counter(each.data_ptr() for each in parameters)
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear and count[module.weight.data_ptr()] == 1 and not is_quantized(module.weight)
    ]
