"""One live model, many adapters: overwrite a few entries in place, put the old bits back.

The model is always just the model. While adapters are active the switcher holds what lay under their entries (the
stash), and whatever it does starts from there: base values are never computed, only kept. What it has written, and what it
has kept for that, is one value (`_State`), swapped at once: whoever is interrupted leaves a state from which the next call
finds the base. What others do to the model between two calls is looked for at each.
"""

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import kernels
from ..adapter import Adapter
from ..errors import AdapterError, SwitchError, did_you_mean
from ..fusion.strengths import as_given
from ..kernels import WeightChanged, WritePlan
from ..sparse.tensor import all_finite
from ..weights.distributed import reshard
from ..weights.model_tensors import ModelTensors, named_tensors, plain_model
from ..weights.owners import check_free
from .model_now import ModelNow
from .preparing import checked, overflow, prepare
from .putting_back import put_back
from .ready import BASE, Chosen, Prepared, Ready, Selection, chosen
from .sources import AdapterSource

__all__ = ["Switcher"]

AS_IT_IS = contextlib.nullcontext()


class _State(NamedTuple):
    """What is in the weights."""

    chosen: Chosen | None  # None: on the way from one to another
    plans: tuple[WritePlan, ...] = ()  # written over the base, with what lay there; what is to be put back first comes first


class Switcher:
    """Switches a model among adapters, and sums of them, in place (SHiRA §3.2 and Appendix I, arXiv 2406.13175).

    While something is active the model is its own: a tuner, or another switcher, is refused. Calls from several threads take
    turns; a forward pass in one thread while another switches computes with a mixture, so keep these apart. If the model is
    sharded over processes (`fully_shard`), each of them must make the same calls. docs/guarantees.md says what may be done to
    the model meanwhile.

    ready: how many selections (an adapter, or a sum) are held ready to switch to, positions, values and room for the
        stash in memory; the one used longest ago goes first. An adapter added as a file is otherwise left on disk.
    host: how many selections are kept in host memory once they had to make room, all values computed and checked: pinned, if
        the model is on a GPU, so that `prefetch` brings them while a forward pass runs.

        switcher = shira.Switcher(model)
        switcher.add("poet", "poet.safetensors")
        switcher.use("poet")
        switcher.use({"poet": 1.0, "coder": 0.5})
        switcher.use({"poet": 1.0, "coder": {"*": 1.0, "*.mlp.*": 0.5}}, method="ties", density=0.5)
        switcher.use(None)
    """

    def __init__(self, model: nn.Module, *, ready: int = 8, host: int = 0) -> None:
        self._model = plain_model(model, SwitchError, "shira.Switcher(model)")
        for option, value, least in (("ready", ready, 1), ("host", host, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SwitchError(f"{option} must be a whole number from {least} on, found {value!r}")
        self._turn = threading.RLock()
        self._sources: dict[str, AdapterSource] = {}
        self._ready = Ready(ready, host)
        self._nothing = WritePlan.of([])
        self._blocks: list[list[Chosen]] = []  # of `using`, those that are open
        self._state: _State = _State(BASE)
        self._owner = functools.partial(_owner, weakref.ref(self))
        self._now = ModelNow(self._model, self._owner)

    @property
    def names(self) -> list[str]:
        """The adapters that can be used."""
        return list(self._sources)

    @property
    def active(self) -> dict[str, float | dict[str, float]]:
        """Name -> strength of what is active, as `use` was given it; empty on the base."""
        return {name: as_given(strength) for name, strength in self._chosen_now().strengths}

    @property
    def method(self) -> dict[str, Any]:
        """The method that combines what is active, and all its options: {"method": "ties", "density": 0.2}."""
        return self._chosen_now().method.described()

    def _chosen_now(self) -> Chosen:
        with self._turn, _writable():
            self._settle()
            return self._state.chosen or BASE

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Register an adapter, or a file of one, under a name, after checking that it belongs to this model.

        A file is read again when it is used after others have taken its place, so it must stay where it is.

        Raises SwitchError if the name is taken, or somebody else has the model; FormatError or OSError for the file;
        BaseMismatch if a tensor is missing, has another shape or, for an overwrite adapter, other base values. The model is not
        written to.
        """
        if not isinstance(name, str) or not name:
            raise SwitchError(f'a name must be a string that is not empty, found {name!r}: add("poet", adapter)')
        source = AdapterSource(adapter)
        with self._turn, _writable():
            if name in self._sources:
                raise SwitchError(f"there is an adapter {name!r} already; remove it first, or choose another name")
            self._follow()
            if named_tensors(self._model).keys() != self._now.weights.keys():  # a head was put on meanwhile
                self._begin_again()
            checked(name, source, self._now, self._state.plans)
            self._sources[name] = source

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises SwitchError if it is unknown or active."""
        with self._turn, _writable():
            self._known(name)
            if name in dict(self._chosen_now().strengths):
                raise SwitchError(f"adapter {name!r} is active; switch to another or to None first")
            self._ready.drop(name)
            del self._sources[name]

    def use(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Activate one adapter, several with strengths (the paper's α), or None: the base, bit for bit.

        selection: a name; or name -> strength, a number, below 0 to negate, or pattern -> number, of which the last that fits
            a tensor's name counts; those that are 0 are not there.
        method, options: how changes that meet are combined: docs/fusion.md.

        Several are base + what the method makes of the changes α · (value − base), in float32, in the order of the names,
        rounded once; an entry that one adapter alone touches at strength 1 gets its value bit for bit.

        Raises SwitchError for an unknown name, if somebody else has the model, or if what lies under what is active cannot be
        told any more (docs/guarantees.md); AdapterError for a method, option or strength that cannot be, or a result that
        overflows, and what `add` raises if a file or the model has changed: then nothing has changed here. After any other
        exception, half way, the base is active.
        """
        with self._turn, _writable():
            self._activate(chosen(selection, method, options, self._known))

    def prefetch(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Make ready what `use` will be asked for, while a forward pass may still run: what waits in host memory is sent to the
        model's GPU by a copy of its own stream, and nobody waits for it; anything else is read, checked and computed now.

        Nothing in the model changes. Raises what `use` raises.

            switcher.prefetch("coder")
            model(**inputs)  # with what is active now
            switcher.use("coder")
        """
        with self._turn, _writable():
            key = chosen(selection, method, options, self._known)
            self._follow()
            if key.strengths and not self._ready.fetch(key):
                kernels.prepare(self._prepare(key).plan)

    def release(self) -> None:
        """Give the model up as it is: nothing is written, and whatever is in its weights now is the base from here on.

        For a model whose base is not known any more, after `use` has said so; or to keep an adapter in the weights for good.
        """
        with self._turn, _writable():
            self._now.sides.show(())
            self._state = _State(BASE)
            self._take_up()

    @contextlib.contextmanager
    def using(self, selection: Selection, method: str = "sum", **options: float) -> Iterator[None]:
        """`use` inside a `with`, then whatever was active before.

        There is one model: of blocks that overlap in time (in threads, asyncio, generators) the latest one has it, and when all
        are left, what was active before the first is active again.
        """
        block = [BASE]  # what is active after it
        with self._turn, _writable():
            block[0] = self._chosen_now()
            self._activate(chosen(selection, method, options, self._known))
            self._blocks = [*self._blocks, block]
        try:
            yield
        finally:
            with self._turn, _writable():
                self._leave(block)

    def _leave(self, block: list[Chosen]) -> None:
        """Activate what was active before a block; if others were entered after it, leave that to the next of them."""
        later = [each for each in self._blocks if each is not block]
        place = next(number for number, each in enumerate(self._blocks) if each is block)
        if place < len(later):
            later[place][0] = block[0]
            self._blocks = later
            return
        self._blocks = later
        for name, _ in block[0].strengths:
            self._known(name)
        self._activate(block[0])

    def _settle(self) -> None:
        """The base, if a call was interrupted half way. Can itself be interrupted: the next call begins with it."""
        state = self._state
        if state.chosen is not None:
            return
        self._now.sides.show(())
        try:
            for plan in state.plans:
                if plan.begun[0]:
                    kernels.restore_(plan, look=False)
                    plan.begun[0] = 0
        except WeightChanged:
            self._put_back(state)
        self._was_written()
        self._state = _State(BASE)

    def _was_written(self) -> None:
        self._now.was_written()
        torch.clear_autocast_cache()  # which may hold casts of what the weights were

    def _put_back(self, state: _State) -> None:
        active = " + ".join(repr(name) for name, _ in (state.chosen or BASE).strengths) or "an adapter"
        put_back(state.plans, self._now.names(), ModelTensors(self._model), active)
        torch.clear_autocast_cache()

    def _follow(self) -> None:
        """Take note of what was done to the model since the last call; what is active stays so."""
        self._settle()
        try:
            check_free(self._now.claim, SwitchError)
            for plan in self._state.plans:
                plan.check()
            if not self._now.is_another():
                return
        except WeightChanged:
            pass
        self._begin_again()

    def _begin_again(self) -> None:
        """See the model as it is now, with the same active in it."""
        before = self._state.chosen or BASE
        self._adopt()
        self._switch(before)

    def _adopt(self) -> None:
        """The base of the model as it is now, with nothing active; and all that is known is of that."""
        if self._state.plans:
            self._put_back(self._state)
        self._now.sides.show(())
        self._state = _State(BASE)
        self._take_up()

    def _take_up(self) -> None:
        """Begin anew with the model as it is now, of which nothing is known yet."""
        self._ready.drop()
        for source in self._sources.values():
            source.check_again()
        self._now = ModelNow(self._model, self._owner)

    def _activate(self, wanted: Chosen) -> None:
        self._settle()
        if not (wanted.strengths or self._state.plans):
            return  # the model may be somebody else's
        if self._now.is_another():
            check_free(self._now.claim, SwitchError)
            self._adopt()
        try:
            self._switch(wanted)
        except WeightChanged:  # before anything was written
            self._adopt()
            self._switch(wanted)

    def _switch(self, wanted: Chosen) -> None:
        state = self._state
        if wanted == state.chosen:
            return
        prepared = self._prepare(wanted)
        leaving = state.plans[0] if state.plans else self._nothing
        over = prepared.plan.over(leaving)
        coming = prepared.plan if over is None else over
        finite = True
        self._state = _State(None, (coming, leaving))
        try:
            if not state.plans:  # then it is taken now: what others see of that is there before it looks for others
                check_free(self._now.claim, SwitchError)
            if over is not None:
                kernels.write_(over, leaving)
            elif any(coming.sums):
                finite = kernels.write_sums_(coming, leaving)
            else:
                kernels.change_(leaving, coming)
            self._now.sides.show(prepared.beside)
            self._was_written()
            if finite:
                self._state = _State(wanted, (coming,)) if wanted.strengths else _State(BASE)
        except (WeightChanged, SwitchError):  # before anything was written
            self._state = state
            raise
        except BaseException:
            self._settle()
            raise
        finally:
            if self._now.pieces:  # what was gathered of them is out of date
                reshard(self._model)
        if not finite:
            self._undo_overflow(wanted, coming, state.chosen or BASE)

    def _undo_overflow(self, wanted: Chosen, plan: WritePlan, before: Chosen) -> None:
        """Sums that were computed as they were written, some of them infinite: back to what was active."""
        weight = next(part.weight for part in plan.parts if not all_finite(part.values))
        name = next(name for name, other in self._now.weights.items() if other is weight)
        self._ready.forget(wanted)
        self._settle()
        self._switch(before)
        raise AdapterError(overflow(name, weight))

    def _known(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._sources:
            raise SwitchError(f"no adapter {name!r}; {did_you_mean(str(name), self._sources)}")

    def _prepare(self, key: Chosen) -> Prepared:
        """What to write over the base, every value computed and checked; made once, kept while it is among the latest."""
        if not key.strengths:
            return Prepared(self._nothing)
        return self._ready.take(key) or prepare(key, self._sources, self._ready, self._now, self._state.plans)


def _owner(switcher: "weakref.ref[Switcher]") -> str:
    """What is said to others who want its model."""
    state = _State(BASE) if (alive := switcher()) is None else alive._state
    active = " + ".join(repr(name) for name, _ in (state.chosen or BASE).strengths) or "an adapter"
    return f"a Switcher has {active} active in it; call its use(None) first" if state.plans else ""


def _writable() -> contextlib.AbstractContextManager[Any]:
    """Outside of inference mode, whose tensors cannot be written to later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else AS_IT_IS
