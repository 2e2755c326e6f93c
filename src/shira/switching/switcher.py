"""One live model, many adapters: overwrite a few entries in place, and put the old bits back.

No module is wrapped or added. While adapters are active, the switcher keeps the base values of their entries (the stash).
Every action starts from the stash: base values are never computed, only kept. What is written and what is stashed is one
value (`InWeights`), which is replaced at once. So after an interrupt at any point, the next call finds the base. Each call
checks what others have done to the model since the last one.
"""

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor, nn

from .. import kernels
from ..adapter import Adapter
from ..errors import ShiraError, SwitchError, did_you_mean
from ..fusion.combining import overflow
from ..fusion.strengths import as_given
from ..kernels import WeightChanged, WritePlan
from ..sparse.tensor import SparseTensor, all_finite
from ..texts import shown
from ..weights.model_tensors import named_tensors, plain_model
from ..weights.modes import writable
from ..weights.owners import check_free
from .left_behind import leave_behind, no_copy, owner_text
from .model_state import ModelState
from .preparing import changes, checked, prepare
from .ready import BASE, CheckedSelection, InWeights, Prepared, Ready, Selection, checked_selection, listed
from .sources import AdapterSource
from .turns import Block, Blocks, Turn

__all__ = ["Switcher"]


class Switcher:
    """Switches a model among adapters, and sums of them, in place (SHiRA §3.2 and Appendix I, arXiv 2406.13175).

    While something is active, the switcher owns the model: a tuner or another switcher is refused. Calls from several threads
    take turns. A forward pass in one thread while another thread switches computes with a mixture of both; so keep these apart.
    If the model is sharded over processes (`fully_shard`), each process must make the same calls. docs/guarantees.md says what
    you may do to the model meanwhile.

    ready: how many selections (an adapter, or a sum) are held ready in memory: positions, values and room for the stash. The
        one used longest ago makes room for a new one. Otherwise an adapter that was added as a file stays on disk.
    host: how many selections are kept in host memory after they have made room, all values computed and checked. The memory is
        pinned if the model is on a GPU, so that `prefetch` can copy them back while a forward pass runs.

    Raises SwitchError for a model that somebody else owns now, and for options that are not possible.

        switcher = shira.Switcher(model)
        switcher.add("poet", "poet.safetensors")
        switcher.use("poet")
        switcher.use({"poet": 1.0, "coder": 0.5})
        switcher.use({"poet": 1.0, "coder": {"*": 1.0, "*.mlp.*": 0.5}}, method="ties", density=0.5)
        switcher.use(None)
    """

    def __init__(self, model: nn.Module, *, ready: int = 8, host: int = 0) -> None:
        self._model = plain_model(model, SwitchError, "shira.Switcher(model)")
        self._turn = Turn()
        self._sources: dict[str, AdapterSource] = {}
        self._ready = Ready(ready, host)
        self._empty_plan = WritePlan.of([])
        self._blocks = Blocks()
        self._state: InWeights = InWeights(BASE)
        self.called = ("a Switcher", "use(None)")  # in messages for others: its name, and the call that gives the model back
        self._owner = functools.partial(owner_text, weakref.ref(self))
        self._model_state = ModelState(self._model, self._owner)
        check_free(self._model_state.claim, SwitchError)  # what another one has active would be taken for the base

    def __del__(self, ended: Callable[[], bool] = sys.is_finalizing) -> None:
        """What is active stays active. The next owner of the model gets the base."""
        if not ended() and hasattr(self, "_model_state"):
            with contextlib.suppress(SwitchError):  # an interrupted switch, of which the base is not known any more
                self._undo_interrupted()
            leave_behind(self._model, self._model_state, self._state)

    def __reduce__(self) -> NoReturn:
        """A switcher is neither copied nor pickled, since it keeps the base of its own model. Raises SwitchError."""
        raise no_copy("a Switcher", "shira.Switcher(copy)")

    def __repr__(self) -> str:
        """Two lines: what is active, and what is registered. It changes nothing, also after an interrupted switch."""
        known = listed([shown(name) for name in self._sources], ", ") or "none"
        return f"<shira.Switcher of {type(self._model).__name__}: {self._state.described()}\n  registered: {known}>"

    @property
    def names(self) -> list[str]:
        """The names of the adapters that can be used."""
        return list(self._sources)

    @property
    def active(self) -> dict[str, float | dict[str, float]]:
        """Name -> strength of each active adapter, as it was passed to `use`; empty on the base."""
        return {name: as_given(strength) for name, strength in self._active_selection().strengths}

    @property
    def method(self) -> dict[str, Any]:
        """The method that combines the active adapters, and all its options: {"method": "ties", "density": 0.2}."""
        return self._active_selection().method.described()

    def _active_selection(self) -> CheckedSelection:
        with self._turn(), self._working():
            return self._now()

    def _now(self) -> CheckedSelection:
        self._undo_interrupted()
        return self._state.selection or BASE

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Around each call. A block of `using` that is left in the middle of it, by a finalizer, is left at its end."""
        with writable():
            yield
            while self._blocks.any_left():
                self._leave()

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str] | AdapterSource) -> None:
        """Register an adapter, or a file of one, under a name, after checking that it belongs to this model.

        The model is not written to. A file is read again if its adapter has made room for others in memory, so it must stay
        where it is. A file is what `shira.load` takes; a folder of PEFT's SHiRA needs no base here.

        Raises SwitchError if the name is taken, or somebody else owns the model; FormatError, OSError, HubError or AdapterError
        for the file; BaseMismatch if a tensor is missing, has another shape or, for an overwrite adapter, other base values.
        """
        if not isinstance(name, str) or not name:
            raise SwitchError(f'a name must be a string that is not empty, found {name!r}: add("poet", adapter)')
        source = adapter if isinstance(adapter, AdapterSource) else AdapterSource(adapter)
        with self._turn(), self._working():
            if name in self._sources:
                raise SwitchError(f"there is an adapter {name!r} already; remove it first, or choose another name")
            self._follow()
            if named_tensors(self._model).keys() != self._model_state.weights.keys():  # for example, a head was added meanwhile
                self._restart()
            checked(name, source, self._model_state, self._state.plans)
            self._sources[name] = source

    def remove(self, name: str) -> None:
        """Remove an adapter. Raises SwitchError if it is unknown or active."""
        with self._turn(), self._working():
            self._check_name(name)
            if name in dict(self._now().strengths):
                raise SwitchError(f"adapter {name!r} is active; switch to another or to None first")
            self._ready.drop(name)
            del self._sources[name]

    def use(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Activate one adapter, several with strengths (the paper's α), or None: the base, bit for bit.

        selection: a name; or name -> strength. A strength is a number, below 0 to negate; or a mapping from patterns to
            numbers, of which the last pattern that matches a tensor's name counts. An adapter with strength 0 is ignored.
        method, options: how changes of the same entry are combined. See docs/fusion.md.

        The result is base + the change that the method computes from all α · (value − base), in float32 (float64 for float64),
        in the order of the names, rounded once. An entry that only one adapter changes, at strength 1, gets that adapter's
        value bit for bit.

        Raises SwitchError for an unknown name, if somebody else owns the model, or if the base values under the active adapters
        are not known any more (docs/guarantees.md); AdapterError for a method, option or strength that is not possible, or a
        result that overflows; and what `add` raises if a file or the model has changed. Then what was active stays active.
        If it does not fit the changed model either, the base is active, as after any other exception during the switch.
        """
        with self._turn(), self._working():
            self._activate(checked_selection(selection, method, options, self._check_name))

    def prefetch(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Make ready what `use` will activate, while a forward pass may still run.

        A selection in host memory is copied to the model's GPU on a separate stream, and this call does not wait for the copy.
        Any other selection is read, checked and computed during this call. Nothing in the model changes.
        Raises what `use` raises.

            switcher.prefetch("coder")
            model(**inputs)  # with what is active now
            switcher.use("coder")
        """
        with self._turn(), self._working():
            key = checked_selection(selection, method, options, self._check_name)
            self._follow()
            if key.strengths and not self._ready.fetch(key):
                kernels.prepare(self._prepare(key).plan)

    def pin(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Make a selection ready, and hold it ready whatever is used after it, until `unpin` or the removal of its adapters.

        Raises what `use` raises, and SwitchError if no room would be left for others: at most `ready` - 1 can be pinned.
        """
        with self._turn(), self._working():
            key = checked_selection(selection, method, options, self._check_name)
            self._follow()
            if key.strengths:
                kernels.prepare(self._prepare(key).plan)
                self._ready.pin(key)

    def unpin(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Let a selection make room for others again. Raises SwitchError for an unknown name."""
        with self._turn():
            self._ready.pinned.discard(checked_selection(selection, method, options, self._check_name))

    @property
    def ready(self) -> list[dict[str, float | dict[str, float]]]:
        """Name -> strength of each selection that is held ready, as `active` shows it. The one used longest ago is first."""
        with self._turn():
            return [{name: as_given(strength) for name, strength in key.strengths} for key in self._ready.here]

    def base_values(self, name: str, indices: Tensor) -> Tensor:
        """The base's values at sorted positions [k] of a tensor, whatever is active.

        Raises SwitchError for a tensor or positions that the model does not have, and what `use` raises.
        """
        if self._turn.is_taken_here() and self._state.selection is not None:  # a source asks, while `use` reads it
            return self._model_state.base_values(name, indices, self._state.plans)
        with self._turn(), self._working():
            self._follow()
            return self._model_state.base_values(name, indices, self._state.plans)

    def changes(self, selection: Selection, method: str = "sum", **options: float) -> dict[str, SparseTensor]:
        """What `use` would change: for each tensor its new values minus the base's. Nothing is written.

        They are deltas in float32, or in float64 for a float64 weight. They serve code that computes y = W x + ΔW x for several
        selections at once, on the base. Raises what `use` raises.
        """
        with self._turn(), self._working():
            key = checked_selection(selection, method, options, self._check_name)
            self._follow()
            return changes(key, self._sources, self._model_state, self._state.plans)

    def release(self) -> None:
        """Give up the model as it is. Nothing is written, and what is in its weights now is the base from now on.

        Use it when the base is not known any more, after `use` has said so; or to keep an adapter in the weights for good.
        """
        with self._turn(), self._working():
            self._model_state.quantized.show(())
            self._state = InWeights(BASE)
            self._reread_model()

    @contextlib.contextmanager
    def using(self, selection: Selection, method: str = "sum", **options: float) -> Iterator[None]:
        """`use` inside a `with` block. After the block, what was active before is active again.

        There is only one model. If blocks overlap in time (in threads, asyncio, generators), the selection of the latest block
        is active. When all blocks are left, what was active before the first is active again.
        """
        block = Block()
        with self._turn(), self._working():
            block.after = self._now()
            self._activate(checked_selection(selection, method, options, self._check_name))
            self._blocks.begin(block)
        try:
            yield
        finally:
            block.is_left = True
            if not self._turn.is_taken_here():
                with self._turn(), writable():
                    self._leave()

    def _leave(self) -> None:
        """Activate what is to be active after the blocks that are left, unless a later one is still open."""
        after = self._blocks.end()
        if after is not None:
            for name, _ in after.strengths:
                self._check_name(name)
            self._activate(after)

    def _undo_interrupted(self) -> None:
        """Restore the base if a call was interrupted. This may be interrupted, too: the next call begins with it again."""
        state = self._state
        if state.selection is not None:
            return
        self._model_state.quantized.show(())
        try:
            for plan in state.plans:
                if plan.begun[0]:
                    kernels.restore_(plan, check=False)
                    plan.begun[0] = 0
        except WeightChanged:
            self._model_state.recover_base(state)
        self._model_state.note_writes()
        self._state = InWeights(BASE)

    def _follow(self) -> None:
        """Check what was done to the model since the last call, and follow it. What is active stays active."""
        self._undo_interrupted()
        try:
            check_free(self._model_state.claim, SwitchError)
            for plan in self._state.plans:
                plan.check()
            if not (self._model_state.has_changed() or self._model_state.has_moved()):
                return
        except WeightChanged:
            pass
        self._restart()

    def _restart(self) -> None:
        """Start again with the model as it is now, with the same selection active."""
        before = self._state.selection or BASE
        self._restart_on_base()
        self._switch(before)

    def _restart_on_base(self) -> None:
        """Restore the base in the model as it is now, and start again from it, with nothing active."""
        if self._state.plans:
            self._model_state.recover_base(self._state)
        self._model_state.quantized.show(())
        self._state = InWeights(BASE)
        self._reread_model()

    def _reread_model(self) -> None:
        """Look at the model as it is now, and drop everything that was known about it."""
        self._ready.drop()
        for source in self._sources.values():
            source.forget_check()
        self._model_state = self._model_state.reread()

    def _activate(self, wanted: CheckedSelection) -> None:
        self._undo_interrupted()
        if not (wanted.strengths or self._state.plans):
            return  # nothing to do, even if somebody else owns the model
        before = self._state.selection or BASE
        if not self._model_state.has_changed():
            with contextlib.suppress(WeightChanged):  # it is raised before anything is written
                return self._switch(wanted)
        else:
            check_free(self._model_state.claim, SwitchError)
        self._restart_on_base()
        try:
            self._switch(wanted)
        except ShiraError:
            with contextlib.suppress(ShiraError):
                self._switch(before)
            raise

    def _switch(self, wanted: CheckedSelection) -> None:
        state = self._state
        if wanted == state.selection:
            return
        prepared = self._prepare(wanted)
        leaving = state.plans[0] if state.plans else self._empty_plan
        over = prepared.plan.over(leaving)
        coming = prepared.plan if over is None else over
        finite = True
        self._state = InWeights(None, (coming, leaving))
        try:
            if not state.plans:  # the model is taken now; `self._state` shows that to others before this check for others
                check_free(self._model_state.claim, SwitchError)
            if over is not None:
                kernels.write_(over, leaving)
            elif any(coming.sums):
                finite = kernels.write_sums_(coming, leaving)
            else:
                kernels.change_(leaving, coming)
            self._model_state.quantized.show(prepared.products)
            self._model_state.note_writes()
            if finite:
                self._state = InWeights(wanted, (coming,)) if wanted.strengths else InWeights(BASE)
        except BaseException as error:  # a SwitchError may also be that of a signal handler, which comes at any time
            was_refused = isinstance(error, SwitchError) and not (state.plans or coming.begun[0])
            if was_refused or isinstance(error, WeightChanged):  # nothing was written
                self._state = state
            else:
                self._undo_interrupted()
            raise
        finally:
            self._model_state.free_gathered()
        if not finite:
            self._undo_overflow(wanted, coming, state.selection or BASE)

    def _undo_overflow(self, wanted: CheckedSelection, plan: WritePlan, before: CheckedSelection) -> None:
        """Return to what was active before, and raise AdapterError: sums that were computed while writing are not finite."""
        weight, indices, _ = next(write for write in plan.writes if not all_finite(write.values))
        name = next(name for name, other in self._model_state.weights.items() if other is weight)
        self._ready.forget(wanted)
        self._undo_interrupted()
        base = kernels.gather(weight.detach(), indices)
        self._switch(before)
        raise overflow(name, weight.dtype, base)

    def _check_name(self, name: str) -> None:
        """Raise SwitchError if no adapter has this name."""
        if not isinstance(name, str) or name not in self._sources:
            raise SwitchError(f"no adapter {name!r}; {did_you_mean(str(name), self._sources)}")

    def _prepare(self, key: CheckedSelection) -> Prepared:
        """What to write over the base, with every value computed and checked: held ready, or made now."""
        if not key.strengths:
            return Prepared(self._empty_plan)
        held = self._ready.take(key)
        if held is None:
            self._model_state.check_memory()
            for plan in self._state.plans:  # sums are computed from the stash, which must still be that of the weights
                plan.check()
            held = prepare(key, self._sources, self._ready, self._model_state, self._state.plans)
        return held
