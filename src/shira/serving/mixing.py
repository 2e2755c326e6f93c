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


class Mixing:
    """Adds to the outputs of linear layers what the selections of a step change.

    most: a selection with more requests has turns of its own. held: changes of so many selections are held, 8 bytes an entry;
    those used longest ago, and not present, make room.
    wanted: called with a selection whose changes must be read, by `read` in another thread.
    Only layers whose output a forward pass has asked for count (`keep_called`): some modules use a layer's weight alone.
    """

    def __init__(self, model: nn.Module, resident: Resident, most: int, held: int) -> None:
        self._model, self._resident, self._most, self._capacity = model, resident, most, held
        self.wanted: Callable[[str], None] = lambda key: None
        self._lock = threading.Lock()
        self._held: OrderedDict[str, Changes | None] = OrderedDict()  # None: a selection that cannot share a step
        self._reading: set[str] = set()
        self._present: set[str] = set()
        self._called: set[int] = set()
        self._layers = _linear_layers(model)
        self._rows: Sequence[tuple[str, int]] = ()
        self._groups: dict[int, list[Group]] = {}  # id of a weight -> its changes in this step
        self._hooks = [module.register_forward_hook(self._add) for module in self._layers]

    @property
    def held(self) -> list[str]:
        """The selections whose changes are held, the one used longest ago first."""
        with self._lock:
            return [key for key, changes in self._held.items() if changes is not None]

    # In any thread

    def read(self, key: str) -> bool:
        """Read what a selection changes, and hold it. Returns whether it can share steps. Raises what `Resident.use` raises."""
        found = None
        try:
            found = self._of(self._resident.changes(key))
            return found is not None
        finally:
            with self._lock:
                self._reading.discard(key)
                self._held[key] = found  # after an error too: a turn of its own will raise it
                self._held.move_to_end(key)
                for old in [other for other in self._held if other not in self._present and other != key]:
                    if len(self._held) > self._capacity:
                        del self._held[old]

    # In the thread that runs the model

    def keep_called(self) -> None:
        """After forward passes: layers that none of them has called are left alone from now on."""
        for module, hook in zip(list(self._layers), self._hooks, strict=True):
            if id(module.weight) not in self._called:
                hook.remove()
                self._layers.remove(module)

    def share(self, sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
        """The selections that share the next step, none or at least two; and those that wait until they can.

        sizes: key -> number of requests, in the order in which the selections should be read.
        """
        small = [key for key, size in sizes.items() if size <= self._most]
        with self._lock:
            self._present = set(sizes)
            together = [key for key in small if not key or self._held.get(key) is not None]
            for key in together:
                if key:
                    self._held.move_to_end(key)
            missing = [key for key in small if key and key not in self._held]
            room = self._capacity - sum(key in self._held for key in sizes)
            waiting = missing[: max(0, room)]
            new = [key for key in waiting if key not in self._reading]
            self._reading.update(new)
        for key in new:
            self.wanted(key)
        return together if len(together) > 1 else [], waiting

    def begin(self, rows: Sequence[tuple[str, int]]) -> None:
        """Before a step: (key, number of tokens) of its requests in their order, those of a selection one after another.

        Nothing, if the selection of the step is in the weights.
        """
        if rows == self._rows:
            return
        self._rows, self._groups, end = list(rows), {}, 0
        for key, its in itertools.groupby(rows, lambda row: row[0]):
            first, end = end, end + sum(tokens for _, tokens in its)
            for weight, change in (self._held[key] or {}).items() if key else ():
                self._groups.setdefault(weight, []).append((first, end, change))

    def _add(self, module: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
        groups = self._groups.get(id(module.weight))
        if groups:
            kernels.add_products_(output, inputs[0], groups)
        elif not self._rows:
            self._called.add(id(module.weight))

    def _of(self, tensors: Mapping[str, Any]) -> Changes | None:
        """The changes of a selection by weight; None if it changes other tensors than those of these layers."""
        weights, ours = named_tensors(self._model), {id(module.weight) for module in self._layers}
        if not all(id(weights[name]) in ours for name in tensors):
            return None
        return {
            id(weights[name]): kernels.row_change(tensor.indices, tensor.values.float(), tuple(tensor.shape))
            for name, tensor in tensors.items()
        }


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The plain linear layers whose weights nothing else uses. Not the last: it sees the last token of each request alone."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    count = Counter(id(each) for module in model.modules() for each in module._parameters.values() if each is not None)
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module is not head
        and count[id(module.weight)] == 1
        and not is_quantized(module.weight)
    ]
