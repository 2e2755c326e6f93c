"""What a switcher holds ready: selections whose values are all computed and checked, a bounded number of them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..errors import SwitchError
from ..fusion.methods import Method, resolve
from ..fusion.strengths import CheckedStrength, Strength, check_strengths, is_there
from ..kernels import Waiting, WritePlan
from .beside import AddedProduct

__all__ = ["BASE", "Chosen", "Prepared", "Ready", "Selection", "chosen"]


class Chosen(NamedTuple):
    """What can be active: adapters in order, with their strengths, and how they are combined."""

    strengths: tuple[tuple[str, CheckedStrength], ...]
    method: Method


BASE = Chosen((), Method("sum"))
Selection = str | Mapping[str, Strength] | None


def chosen(selection: Selection, method: str, options: Mapping[str, float], check: Callable[[str], None]) -> Chosen:
    """What a user's words mean: see `Switcher.use`. check: raises what is to be said of a name that is not known."""
    if method == "sum" and not options and (selection is None or type(selection) is str):  # most calls: no time to lose
        if selection is None:
            return BASE
        check(selection)
        return Chosen(((selection, 1.0),), BASE.method)
    if not isinstance(method, str) and isinstance(selection, str):
        raise SwitchError(f"a strength belongs to its name: use({{{selection!r}: {method!r}}})")
    if not (selection is None or isinstance(selection, str | Mapping)):
        meant = 'a name, use("poet"); names with strengths, use({"poet": 1.0, "coder": 0.5}); or use(None) for the base'
        raise SwitchError(f"expected {meant}; found {selection!r}")
    wanted = {} if selection is None else {selection: 1.0} if isinstance(selection, str) else dict(selection)
    for name in wanted:
        check(name)
    strengths = sorted((name, fixed) for name, fixed in check_strengths(wanted).items() if is_there(fixed))
    resolved = resolve(method, options)
    return Chosen(tuple(strengths), resolved) if strengths else BASE


class Prepared(NamedTuple):
    """A selection: what it writes over the base, and what it adds to the outputs of quantized layers."""

    plan: WritePlan
    beside: tuple[AddedProduct, ...] = ()


class Ready:
    """Selections held ready, those used last; and in host memory those that had to make room, or are on their way back.

    capacity, host: how many of each.
    """

    def __init__(self, capacity: int, host: int) -> None:
        self._capacity, self._host = capacity, host
        self.here: OrderedDict[Chosen, Prepared] = OrderedDict()
        self.waiting: OrderedDict[Chosen, tuple[Waiting, tuple[AddedProduct, ...]]] = OrderedDict()
        self.arriving: OrderedDict[Chosen, Prepared] = OrderedDict()

    def take(self, key: Chosen) -> Prepared | None:
        """A selection that is ready; or that waits, or is arriving, and then is ready from now on."""
        if key in self.here:
            self.here.move_to_end(key)
            return self.here[key]
        found = self.arriving.get(key) or self._arrive(key)
        if found is None:
            return None
        held = self.hold(key, found._replace(plan=kernels.arrived(found.plan)))
        self.arriving.pop(key, None)
        return held

    def fetch(self, key: Chosen) -> bool:
        """Let a selection that waits come; whether there is nothing else to do to have it ready."""
        if key in self.here or key in self.arriving:
            return True
        found = self._arrive(key)
        if found is None:
            return False
        self.arriving[key] = found
        if len(self.arriving) > self._capacity:
            self.arriving.popitem(last=False)
        return True

    def _arrive(self, key: Chosen) -> Prepared | None:
        if key not in self.waiting:
            return None
        self.waiting.move_to_end(key)
        waiting, beside = self.waiting[key]
        return Prepared(waiting.arrive(), beside)

    def hold(self, key: Chosen, prepared: Prepared) -> Prepared:
        """Hold a selection ready. What no longer fits waits in host memory, or is gone."""
        self.here[key] = prepared
        while len(self.here) > self._capacity:
            gone, its = self.here.popitem(last=False)
            if self._host and not any(its.plan.sums):
                if gone not in self.waiting:
                    self.waiting[gone] = Waiting(its.plan), its.beside
                self.waiting.move_to_end(gone)
            if len(self.waiting) > self._host:
                self.waiting.popitem(last=False)
        return prepared

    def drop(self, name: str | None = None) -> None:
        """Forget all that has to do with an adapter, or everything."""
        held: tuple[OrderedDict[Chosen, Any], ...] = (self.here, self.waiting, self.arriving)
        for selections in held:
            for key in [key for key in selections if name is None or name in dict(key.strengths)]:
                del selections[key]

    def forget(self, key: Chosen) -> None:
        """Forget one selection."""
        self.here.pop(key, None)

    def own(self, weight: Tensor, indices: Tensor) -> Tensor:
        """A copy of these positions, which nobody else changes; or the very tensor of a plan that is ready and has the same:
        adapters of one mask then hold them once, and switch among each other in one pass."""
        for prepared in self.here.values():
            for part in prepared.plan.parts:
                if part.weight is weight and part.indices.numel() == indices.numel() and torch.equal(part.indices, indices):
                    return part.indices
        return indices.clone()
