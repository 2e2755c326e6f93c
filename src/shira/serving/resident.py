"""The adapters in the process that holds the weights: one selection in them, some ready in memory, the others on disk."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..files.paths import State
from ..sparse.tensor import SparseTensor
from ..switching.sources import AdapterSource
from ..switching.switcher import Switcher
from ..weights.model_tensors import named_tensors
from .catalogue import path_in, version_of
from .selections import AdapterReplaced, Part, ServedSelection, of_key

__all__ = ["Resident"]

MOST_KNOWN = 4096  # versions that the switcher knows; each is a path and some numbers


Cut = Callable[[Part, Adapter], Adapter]


class Version(AdapterSource):
    """The file of an adapter in one version. It refuses another one. cut: see `Resident`.

    `keep` reads the file ahead, without a lock of the switcher. `read` returns what was read until `let_go`.
    """

    def __init__(self, path: Path, part: Part, cut: Cut) -> None:
        super().__init__(path)
        self._part, self._cut = part, cut
        self._kept: Adapter | None = None

    def accept(self, found: tuple[State, ...]) -> None:
        if version_of(found) != self._part.version:
            raise AdapterReplaced(f"the file of {self._part.name!r} was replaced after the request came; send it again")

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        self._kept = self._whole(weights)

    def let_go(self) -> None:
        self._kept = None

    def read(self, weights: Mapping[str, Tensor]) -> tuple[Adapter, bool]:
        adapter = self._kept or self._whole(weights)
        return adapter, self._found is None or self._found != self._checked

    def _whole(self, weights: Mapping[str, Tensor]) -> Adapter:
        return self._cut(self._part, super().read(weights)[0])


class Resident:
    """Puts the selection of a key into the weights, exactly that version of each file; and makes others ready meanwhile.

    model: nobody else switches it. folder: the served folder. ready: how many selections are held ready in memory, `host`: and
    how many more in host memory, if the model is on a GPU (see `Switcher`).
    cut: (name and version, whole adapter) -> the adapter of this process's part of the model, with tensor parallelism.

    `use` is called between forward passes. The other methods may be called from any thread at any time.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        ready: int = 8,
        host: int = 0,
        cut: Cut = lambda part, whole: whole,
    ) -> None:
        self._switcher, self._model = Switcher(model, ready=ready, host=host), model
        self._folder, self._cut = Path(folder).absolute(), cut
        self._known: OrderedDict[str, Version] = OrderedDict()  # name in the switcher -> its source; used longest ago first
        self._one_at_a_time = threading.Lock()
        self._pinned: set[str] = set()
        self._active: str | None = ""  # None: an error has left it unknown, so the next `use` must switch
        self._switches, self._seconds, self._hits, self._misses = 0, 0.0, 0, 0

    def use(self, key: str) -> bool:
        """Put a selection into the weights. Returns whether it was another than before.

        Raises AdapterReplaced if a file is no longer there in this version; for anything else SelectionError, and what
        `Switcher.use` raises. Then the base is active.
        """
        if key == self._active:
            return False
        began = time.perf_counter()
        try:
            self._make_ready(key, self._switch)
        except BaseException:
            self._active = None
            self._switcher.use(None)
            self._active = ""
            raise
        self._active = key
        self._switches, self._seconds = self._switches + 1, self._seconds + time.perf_counter() - began
        return True

    def prefetch(self, key: str) -> None:
        """Read, check and compute a selection now, so that `use` only writes. Raises what `use` raises."""
        self._make_ready(key, self._switcher.prefetch)

    def pin(self, key: str, pinned: bool = True) -> None:
        """Hold a selection ready, whatever is used after it; or no longer. Raises what `use` and `Switcher.pin` raise."""
        if pinned:
            self._make_ready(key, self._switcher.pin)
            self._pinned.add(key)
        elif key in self._pinned:
            self._make_ready(key, self._switcher.unpin)
            self._pinned.discard(key)

    def base_values(self, name: str, indices: Tensor) -> Tensor:
        """The base's values at sorted positions [k] of one of the model's tensors, whatever is in the weights now."""
        return self._switcher.base_values(name, indices)

    def changes(self, key: str) -> dict[str, SparseTensor]:
        """What `use` would change in the base (`Switcher.changes`). Raises what `use` raises."""
        found: dict[str, SparseTensor] = self._make_ready(key, self._switcher.changes)
        return found

    def tiers(self) -> dict[str, Any]:
        """Where the selections are, by key; and how often it was switched, in how many seconds, to how many that were ready."""
        return {
            "weights": self._active or "",
            "ready": [_key_of(names) for names in self._switcher.ready],
            "pinned": sorted(self._pinned),
            "switches": self._switches,
            "switch_seconds": self._seconds,
            "hits": self._hits,
            "misses": self._misses,
        }

    def _switch(self, names: dict[str, float] | None) -> None:
        if names is not None:
            is_ready = names in self._switcher.ready
            self._hits, self._misses = self._hits + is_ready, self._misses + (not is_ready)
        self._switcher.use(names)

    def _make_ready(self, key: str, call: Callable[[Any], Any]) -> Any:
        """Call with name -> strength of a selection whose adapters the switcher knows; with None for the base."""
        parts = of_key(key).parts
        sources = []
        try:
            sources = [self._register(part) for part in parts]
            return call({_name_of(part): part.strength for part in parts} or None)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AdapterReplaced(f"the file of '{of_key(key)}' was removed after the request came") from error
        finally:
            for source in sources:
                source.let_go()

    def _register(self, part: Part) -> Version:
        """The source of a version, which the switcher knows from now on."""
        name = _name_of(part)
        with self._one_at_a_time:
            if name in self._known:
                self._known.move_to_end(name)
                return self._known[name]
        source = Version(path_in(self._folder, part.name), part, self._cut)
        source.keep(named_tensors(self._model))
        with self._one_at_a_time:
            if name not in self._known:  # another thread may have been faster
                self._switcher.add(name, source)
                self._known[name] = source
            while len(self._known) > MOST_KNOWN:
                self._forget_oldest()
            return self._known[name]

    def _forget_oldest(self) -> None:
        wanted = {_name_of(part) for key in (self._active or "", *self._pinned) for part in of_key(key).parts}
        oldest = next(name for name in self._known if name not in wanted)
        self._switcher.remove(oldest)
        del self._known[oldest]


def _name_of(part: Part) -> str:
    """The name of an adapter's version in the switcher, and in its messages. No adapter has an @ in its name."""
    return f"{part.name}@{part.version}"


def _key_of(names: Mapping[str, Any]) -> str:
    """The key of a selection by the names in the switcher."""
    parts = [(name.split("@"), strength) for name, strength in sorted(names.items())]
    return ServedSelection(tuple(Part(name, version, strength) for (name, version), strength in parts)).key
