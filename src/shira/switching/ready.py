"""The selections of a switcher: the one in the weights, and a bounded number held ready, all values computed and checked."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..errors import SwitchError
from ..fusion.methods import METHODS, Method, resolve
from ..fusion.strengths import CheckedStrength, Strength, as_given, check_strengths, is_nonzero
from ..kernels import Waiting, WritePlan
from ..texts import plain_number, shown
from .quantized_layers import AddedProduct

__all__ = ["BASE", "CheckedSelection", "InWeights", "Prepared", "Ready", "Selection", "checked_selection", "listed"]

SHOWN = 8  # names in a text


class CheckedSelection(NamedTuple):
    """What can be active: adapters in the order of their names, with their strengths, and the method that combines them."""

    strengths: tuple[tuple[str, CheckedStrength], ...]
    method: Method


BASE = CheckedSelection((), Method("sum"))
Selection = str | Mapping[str, Strength] | None


def checked_selection(
    selection: Selection, method: str, options: Mapping[str, float], check: Callable[[str], None]
) -> CheckedSelection:
    """The selection that the arguments of `Switcher.use` mean. check: raises an error for a name that is not known."""
    if method == "sum" and not options and (selection is None or type(selection) is str):  # most calls, understood fast
        if selection is None:
            return BASE
        check(selection)
        return CheckedSelection(((selection, 1.0),), BASE.method)
    if not isinstance(method, str) and isinstance(selection, str):
        raise SwitchError(f"a strength belongs to its name: use({{{selection!r}: {method!r}}})")
    if isinstance(selection, str) and "strength" in options:
        raise SwitchError(f"a strength belongs to its name: use({{{selection!r}: {options['strength']!r}}})")
    if not (selection is None or isinstance(selection, str | Mapping)):
        meant = 'a name, use("poet"); names with strengths, use({"poet": 1.0, "coder": 0.5}); or use(None) for the base'
        raise SwitchError(f"expected {meant}; found {selection!r}")
    wanted = {} if selection is None else {selection: 1.0} if isinstance(selection, str) else dict(selection)
    for name in wanted:
        check(name)
    if isinstance(selection, str) and method not in METHODS and _passes(check, method):
        raise SwitchError(f"several adapters are one mapping: use({{{selection!r}: 1.0, {method!r}: 1.0}})")
    strengths = sorted((name, strength) for name, strength in check_strengths(wanted).items() if is_nonzero(strength))
    resolved = resolve(method, options)
    return CheckedSelection(tuple(strengths), resolved) if strengths else BASE


def _passes(check: Callable[[str], None], name: str) -> bool:
    try:
        check(name)
    except SwitchError:
        return False
    return True


class Prepared(NamedTuple):
    """A prepared selection: what it writes over the base, and what it adds to the outputs of quantized layers."""

    plan: WritePlan
    products: tuple[AddedProduct, ...] = ()


class InWeights(NamedTuple):
    """What is in the weights."""

    selection: CheckedSelection | None  # None: a switch is under way
    plans: tuple[WritePlan, ...] = ()  # written over the base, each with its stash; the first is restored first

    def label(self) -> str:
        """The active adapters in messages."""
        return " + ".join(repr(name) for name, _ in (self.selection or BASE).strengths) or "an adapter"

    def described(self) -> str:
        """What is active, in a line."""
        if self.selection is None:
            return "a switch was interrupted; the next call restores the base"
        used = [shown(name) + f" × {as_given(strength)}" * (strength != 1.0) for name, strength in self.selection.strengths]
        return f"{listed(used, ' + ')} active" if used else "the base is active"


def listed(names: Sequence[str], between: str) -> str:
    """The first names, and how many there are if these are not all."""
    more = [f"… ({len(names):,})"] if len(names) > SHOWN else []
    return between.join([*names[:SHOWN], *more])


class Ready:
    """The selections used last, held ready; and older ones in host memory.

    here: those that are ready, at most `capacity`. waiting: those in host memory, at most `host`.
    arriving: those on their way back from host memory, at most `capacity`.
    pinned: those that never make room for others, fewer than `capacity`.

    Raises SwitchError for numbers that are not possible. Its message calls `capacity` "ready", the name that `Switcher` uses.
    """

    def __init__(self, capacity: int, host: int) -> None:
        capacity, host = plain_number(capacity), plain_number(host)
        for option, value, least in (("ready", capacity, 1), ("host", host, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SwitchError(f"{option} must be a whole number from {least} on, found {value!r}")
        self._capacity, self._host = capacity, host
        self.pinned: set[CheckedSelection] = set()
        self.here: OrderedDict[CheckedSelection, Prepared] = OrderedDict()
        self.waiting: OrderedDict[CheckedSelection, tuple[Waiting, tuple[AddedProduct, ...]]] = OrderedDict()
        self.arriving: OrderedDict[CheckedSelection, Prepared] = OrderedDict()

    def take(self, key: CheckedSelection) -> Prepared | None:
        """The selection if it is ready, waits or arrives; from now on it is ready. Otherwise None."""
        if key in self.here:
            self.here.move_to_end(key)
            return self.here[key]
        found = self.arriving.get(key) or self._arrive(key)
        if found is None:
            return None
        held = self.hold(key, found._replace(plan=kernels.arrived(found.plan)))
        self.arriving.pop(key, None)
        return held

    def fetch(self, key: CheckedSelection) -> bool:
        """Start to copy a selection that waits. Returns whether it is ready or arrives, so that nothing else must be done."""
        if key in self.here or key in self.arriving:
            return True
        found = self._arrive(key)
        if found is None:
            return False
        self.arriving[key] = found
        if len(self.arriving) > self._capacity:
            self.arriving.popitem(last=False)
        return True

    def _arrive(self, key: CheckedSelection) -> Prepared | None:
        if key not in self.waiting:
            return None
        self.waiting.move_to_end(key)
        waiting, products = self.waiting[key]
        return Prepared(waiting.arrive(), products)

    def hold(self, key: CheckedSelection, prepared: Prepared) -> Prepared:
        """Hold a selection ready. If there are too many, the one used longest ago moves to host memory or is dropped."""
        self.here[key] = prepared
        self.here.move_to_end(key)
        while len(self.here) > self._capacity:
            gone = next(other for other in self.here if other not in self.pinned)
            its = self.here.pop(gone)
            if self._host and not any(its.plan.sums):
                if gone not in self.waiting:
                    self.waiting[gone] = Waiting(its.plan), its.products
                self.waiting.move_to_end(gone)
            if len(self.waiting) > self._host:
                self.waiting.popitem(last=False)
        return prepared

    def pin(self, key: CheckedSelection) -> None:
        """Never let this selection make room for others. Raises SwitchError if no room would be left for others."""
        if len(self.pinned | {key}) >= self._capacity:
            raise SwitchError(f"{self._capacity} selections are held ready; at most {self._capacity - 1} of them can be pinned")
        self.pinned.add(key)

    def drop(self, name: str | None = None) -> None:
        """Drop every selection with this adapter, or all selections."""
        if name is not None:
            self.pinned = {key for key in self.pinned if name not in dict(key.strengths)}
        held: tuple[OrderedDict[CheckedSelection, Any], ...] = (self.here, self.waiting, self.arriving)
        for selections in held:
            for key in [key for key in selections if name is None or name in dict(key.strengths)]:
                del selections[key]

    def forget(self, key: CheckedSelection) -> None:
        """Drop one selection from those that are ready."""
        self.here.pop(key, None)

    def own_positions(self, weight: Tensor, indices: Tensor, *, fresh: bool = False) -> Tensor:
        """A copy of these positions, which nobody else changes; or the tensor of a ready plan with the same positions.

        So adapters with the same mask hold their positions once, and a switch from one to another is a single pass.
        fresh: nobody else holds these positions, so they need no copy.
        """
        for prepared in self.here.values():
            number = prepared.plan.numbers.get(id(weight))
            held = None if number is None else prepared.plan.writes[number].indices
            if held is not None and held.numel() == indices.numel() and torch.equal(held, indices):
                return held
        return indices if fresh else indices.clone()
