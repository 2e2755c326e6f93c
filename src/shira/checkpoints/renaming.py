"""Find an adapter's tensors in a checkpoint that uses other names than the model in memory.

`from_pretrained` and `save_pretrained` rename tensors: GPT-2's are "h.0…" on the Hub, and "transformer.h.0…" in a language
model. An adapter has the names in memory. Names are mapped only if the mapping is certain: one prefix replaces another in all
names, and there is no second way to do it; or Transformers names the tensors so when it loads the checkpoint (`loading`).
"""

from collections.abc import Iterator, Mapping

from ..adapter import Adapter
from ..errors import BaseMismatch
from ..files.checkpoint import prefix_swaps
from ..sparse.tensor import SparseTensor
from ..texts import shown
from .loading import ways_to_load
from .sources import Checkpoint

__all__ = ["names_in", "renamed"]

ALIKE = 2  # last words of two names that must be equal if both may mean the same tensor
SAVE_THE_MODEL = "Load that model, activate the adapter with Switcher.use, and save it with model.save_pretrained(folder)"


def names_in(checkpoint: Checkpoint, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Tensor name in the adapters -> name in the checkpoint; empty if they are the same, or if this is another model.

    Raises BaseMismatch if the checkpoint is of this model, and an adapter still cannot be put into it: a tensor is joined from
    several when it is loaded, or is not in the checkpoint, or the mapping of names is not certain."""
    holders = {name: (label, adapter) for label, adapter in adapters.items() for name in adapter.tensors}
    missing = [name for name in holders if name not in checkpoint]
    if not missing:
        return {}
    shapes = {name: adapter.tensors[name].shape for name, (_, adapter) in holders.items()}
    by_ending: dict[str, list[str]] = {}
    for name in checkpoint:
        by_ending.setdefault(_ending(name), []).append(name)
    alike = {
        name: [other for other in by_ending.get(_ending(name), ()) if checkpoint.form(other).shape == shapes[name]]
        for name in missing
    }
    names = [missing[0], *(name for name in shapes if name != missing[0])]
    found = prefix_swaps(names, alike[missing[0]], checkpoint, lambda name, other: checkpoint.form(other).shape == shapes[name])
    if len(found) == 1:
        return found[0]
    mapped = _as_loaded(checkpoint, shapes, {name: label for name, (label, _) in holders.items()})
    if mapped:
        return mapped
    if not all(alike.values()):
        return {}  # this is another model: `check_base` says so
    why = "several prefixes map all of them" if found else "no one prefix maps all of them"
    raise BaseMismatch(
        f"{checkpoint.path} names its tensors otherwise than the model in memory, whose names an adapter has: '{missing[0]}' "
        f"may be '{alike[missing[0]][0]}' there, but {why}. {SAVE_THE_MODEL}"
    )


def _as_loaded(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], labels: Mapping[str, str]) -> dict[str, str]:
    """Tensor name in the adapters -> name in the checkpoint, as Transformers loads it; empty if no class has these tensors.

    shapes, labels: tensor name in the adapters -> its shape, and the label of an adapter that holds it.
    Raises BaseMismatch for a tensor that is not in the checkpoint as one tensor of its shape.
    """
    for loaded in ways_to_load(checkpoint.path, list(checkpoint)):
        if any(loaded.shapes.get(name) != shape for name, shape in shapes.items()):
            continue
        for name in shapes:
            parts = loaded.sources.get(name, [])
            if name in loaded.changed:
                raise BaseMismatch(
                    f"{labels[name]}: {checkpoint.path} names its tensors otherwise than {loaded.kind} in memory, and "
                    f"'{name}' is made of {len(parts)} of them when it is loaded: {shown(parts)}. {SAVE_THE_MODEL}"
                )
            if not parts and name not in checkpoint:
                raise BaseMismatch(
                    f"{labels[name]}: {loaded.kind} has '{name}', which {checkpoint.path} does not hold: it was new in the "
                    f"model that was trained. {SAVE_THE_MODEL}"
                )
        return {name: loaded.sources[name][0] for name in shapes if name in loaded.sources}
    return {}


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-ALIKE:])


def renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """An adapter whose tensors have other names. They may still be in a file."""
    if not names:
        return adapter
    prints = {names.get(name, name): value for name, value in adapter.fingerprints.items()}
    tensors = _Renamed(adapter.tensors, {names.get(name, name): name for name in adapter.tensors})
    return Adapter(tensors, adapter.metadata | ({"fingerprints": prints} if prints else {}))  # type: ignore[arg-type]  # read only


class _Renamed(Mapping[str, SparseTensor]):
    """The same tensors under other names."""

    def __init__(self, tensors: Mapping[str, SparseTensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> SparseTensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
