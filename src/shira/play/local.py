"""A model on this machine to play with: one person at a time, each with their own strengths, and the base in between."""

import contextlib
import re
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..analysis.comparison import Comparison, compare
from ..errors import AdapterError, DataError, ShiraError, SwitchError
from ..fusion.fusing import fuse
from ..fusion.strengths import Strength
from .asking import Chosen, Setting, Shown
from .streams import Stopped, Turn, streamed
from .watching import Light, Watch

__all__ = ["Local"]

KEPT = 8  # answers of the base, which need not be made again when a strength changes
PATIENCE = 1.0  # seconds: if looking at all weights takes longer, it is done when somebody asks for it
NOT_LOOKED = Light(None, "Not looked at since the last answer. Looking at all weights takes a while: press the button.")


class Local(ABC):
    """A model, its adapters and the folder for files that are made. `Language` and `Pictures` say how each is done.

    Every call that touches the model takes its turn. Between two turns the base is in the weights.
    """

    title: str
    makes: str
    is_chat: bool | None = None
    blocks: list[str]

    def __init__(self, folder: Path) -> None:
        """folder: for fused adapters; it belongs to this place. The model must be the base now."""
        self._folder = folder
        self._turn = Turn()
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        started = time.perf_counter()
        self._watch = Watch(self._watched())
        self._looks_by_itself = time.perf_counter() - started < PATIENCE
        self.light = self._watch.light(self._watched())

    @abstractmethod
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they came."""

    @abstractmethod
    def _watched(self) -> Mapping[str, Tensor]:
        """All tensors whose bits must not change."""

    @abstractmethod
    def _weights(self) -> Mapping[str, Tensor]:
        """The tensors that adapters name."""

    @abstractmethod
    def _given(self, name: str, setting: Setting) -> Any:
        """A setting as `_use` takes it. It may read the adapter's file."""

    @abstractmethod
    def _use(self, given: Mapping[str, Any]) -> None:
        """Switch to these adapters, in place; to the base if there are none."""

    @abstractmethod
    def _make(self, asked: Any, show: Callable[[Any, str], None]) -> Any:
        """What the model makes as it is now. show(what is there so far, a note) is called as it comes, and may raise."""

    @abstractmethod
    def _register(self, name: str, file: Path) -> None:
        """Add a file under a name that is free. Raises ShiraError; then nothing has changed."""

    @abstractmethod
    def _adapter(self, name: str) -> Adapter:
        """The adapter as it is in its file, with the names of `_weights`."""

    @abstractmethod
    def _strength(self, name: str, setting: Setting) -> Strength:
        """A setting as `fuse` takes it."""

    def run(self, asked: Any, chosen: Chosen, stop: threading.Event) -> Iterator[Shown]:
        """What the base and the adapted model make, as it comes, one after the other. The base stays for the next time.

        Raises what the library raises. However it ends, the base is in the weights again.
        """

        def work(show: Callable[[Shown], None]) -> None:
            with self._turn.taken(stop, lambda: show(Shown(note="Waiting: the model works for somebody else …"))):
                self._both(asked, chosen, stop, show)

        return streamed(work, stop)

    def _both(self, asked: Any, chosen: Chosen, stop: threading.Event, show: Callable[[Shown], None]) -> None:
        def side(which: str, seen: Shown, note: str) -> Callable[[Any, str], None]:
            def on_part(part: Any, said: str) -> None:
                if stop.is_set():
                    raise Stopped
                show(replace(seen, **{which: part}, note=f"{note}{said} …"))

            return on_part

        seen = Shown(note="Switching …")
        show(seen)
        with self._base_afterwards(look=True):
            given = self._all_given(chosen)
            if given:
                seen = replace(seen, milliseconds=self._timed(given))
                self._use({})
            if asked not in self._kept:
                side("base", seen, "1 of 2: the base")(None, "")
                self._keep(asked, self._make(asked, side("base", seen, "1 of 2: the base")))
            seen = replace(seen, base=self._kept[asked])
            seen = replace(seen, adapted=seen.base, note="No adapter has a strength above 0: both sides are the base.")
            if given:
                self._use(given)
                seen = replace(seen, adapted=None)
                side("adapted", seen, "2 of 2: with adapters")(None, "")
                made = self._make(asked, side("adapted", seen, "2 of 2: with adapters"))
                same = "Both sides are the same." if made == seen.base else "Both sides differ."
                seen = replace(seen, adapted=made, note=f"Done. {same}")
        show(seen)

    def _keep(self, asked: Any, made: Any) -> None:
        self._kept[asked] = made
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    @contextlib.contextmanager
    def _base_afterwards(self, *, look: bool) -> Iterator[None]:
        """Inside, adapters may be used. Afterwards the base is restored. look: and the light says whether it is exact."""
        try:
            yield
        finally:
            try:
                self._use({})
            except ShiraError as error:
                self.light = Light(False, f"The base could not be restored: {error}")
                raise
            if look and self._looks_by_itself:
                self._look()
            elif look:
                self.light = NOT_LOOKED

    def _look(self) -> None:
        self.light = self._watch.light(self._watched())
        if not self.light.exact:
            self._kept.clear()

    def _all_given(self, chosen: Chosen) -> dict[str, Any]:
        return {name: self._given(name, setting) for name, setting in chosen.items()}

    def _timed(self, given: Mapping[str, Any]) -> float:
        """Milliseconds of a switch from the base, all files being read before. The adapters are active then."""
        self._use(given)
        self._use({})
        started = time.perf_counter()
        self._use(given)
        return 1e3 * (time.perf_counter() - started)

    def time_switch(self, chosen: Chosen) -> float | None:
        """Milliseconds of the switch from the base to these adapters; None if there are none, or if the model is busy."""
        with self._turn.if_free() as free:
            if not free or not chosen:
                return None
            with self._base_afterwards(look=False):
                return self._timed(self._all_given(chosen))

    def check(self) -> Light:
        """Look at all weights now. Waits for its turn."""
        with self._turn.taken(threading.Event()):
            self._look()
        return self.light

    def add(self, file: Path) -> str:
        """Add an adapter's file, which must stay where it is. Returns its name: the file's, with a number if that is taken.

        Raises ShiraError or OSError, in words that name the file alone; then nothing has changed.
        """
        with self._turn.taken(threading.Event()):
            taken, stem = self.names(), file.name.removesuffix(".safetensors") or file.name
            name = next(each for each in (stem, *(f"{stem} ({n})" for n in range(2, len(taken) + 3))) if each not in taken)
            try:
                self._register(name, file)
            except ShiraError as error:
                raise type(error)(str(error).replace(str(file), file.name)) from error
        return name

    def compare(self, first: str, second: str, on_progress: Callable[[int, int], None] = lambda done, of: None) -> Comparison:
        """Two adapters side by side, without singular values. on_progress(tensors done, tensors).

        Raises AdapterError if they are the same one, and what `shira.compare` raises.
        """
        if first == second:
            raise AdapterError(f"choose two different adapters; found {first!r} twice")
        with self._turn.taken(threading.Event()):
            both = [self._named(name) for name in (first, second)]
            count = len({tensor for adapter in both for tensor in adapter.tensors})
            found: Comparison = compare(
                *both, base=self._weights(), spectra=False, on_progress=lambda done, _: on_progress(done, count)
            )
        return found

    def _named(self, name: str) -> Adapter:
        if name not in self.names():
            raise SwitchError(f"there is no adapter {name!r} any more; load the page again")
        adapter = self._adapter(name)
        return Adapter(adapter.tensors, {**adapter.metadata, "name": name})

    def fuse(self, chosen: Chosen) -> Path:
        """The chosen adapters as one new file, named after them. Raises DataError if there is none, AdapterError."""
        if not chosen:
            raise DataError("nothing to save: give an adapter a strength above 0")
        with self._turn.taken(threading.Event()):
            parts = {name: (self._named(name), self._strength(name, setting)) for name, setting in chosen.items()}
            fused = fuse(parts, self._weights())
        told = {name: f"{setting.strength:g}{'' if setting.is_even else '-by-block'}" for name, setting in chosen.items()}
        label = "+".join(f"{name}-{strength}" for name, strength in sorted(told.items()))
        fused.metadata["name"] = label
        stem = re.sub(r"[^\w.+-]+", "_", label).lstrip(".")[:120] or "fused"
        file = Path(tempfile.mkdtemp(dir=self._folder)) / f"{stem}.safetensors"  # another set of this name may be downloading
        fused.save(file)
        return file
