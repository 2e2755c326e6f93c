"""Who may write to a model's weights: one at a time.

Whoever has changed entries of a model knows what lay under them. Two who each keep what they found would each put back the
other's values. So a tuner from `attach` to `detach`, and a switcher while something is active, hold a `Claim` on their model;
whoever comes second is refused, and told whom to ask.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import ShiraError
from .distributed import is_sharded
from .model_tensors import named_tensors

__all__ = ["Claim", "Extent", "check_free", "claim"]


class Extent:
    """The modules and the memory that a model consists of."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = frozenset(id(module) for module in model.modules())
        self._storages = dict(map(_storage, named_tensors(model).values()))
        self._model = weakref.ref(model)  # numbers of modules mean nothing once it is gone

    def meets(self, other: "Extent") -> bool:
        """Whether two models have a module or a weight in common."""
        if self._model() is None or other._model() is None:
            return False
        return not self._modules.isdisjoint(other._modules) or any(
            (storage := self._storages[number]()) is not None and storage is other._storages[number]()
            for number in self._storages.keys() & other._storages.keys()  # a number is given out again, an object is not
        )


class Claim:
    """That a model is in somebody's hands, for as long as this object lives.

    owner: who that is, and what is to be called to have the model back, for messages; or a function that says so at the moment,
        "" if it is nobody.
    """

    def __init__(self, extent: Extent, owner: str | Callable[[], str]) -> None:
        self.extent = extent
        self._owner = owner

    @property
    def owner(self) -> str:
        return self._owner if isinstance(self._owner, str) else self._owner()

    def is_of(self, other: "Claim") -> bool:
        """Whether two claims are one's, who made the second when the model had become another."""
        return self is other or (not isinstance(self._owner, str) and self._owner is other._owner)

    def __reduce__(self) -> Any:
        """A copy of a model is nobody's: what is copied or pickled with it is a claim on nothing."""
        return _nothing, ()


_claims: "list[weakref.ref[Claim]]" = []  # without callbacks, in which an interrupt would be lost


def claim(model: nn.Module, owner: str | Callable[[], str], error: type[ShiraError] | None) -> Claim:
    """Take a model for oneself; owner: as of a `Claim`.

    Raises `error`, unless it is None, if the model, or a part of it, is somebody else's. Of two who come at once, in two
    threads, both may be refused: each is seen before it looks, so no lock is needed, which an interrupt could leave locked.
    """
    made = Claim(Extent(model), owner)
    known = weakref.ref(made)
    _claims.append(known)
    for gone in [each for each in list(_claims) if each() is None]:
        _drop(gone)
    try:
        if error is not None:
            check_free(made, error)
    except BaseException:
        _drop(known)
        raise
    return made


def _drop(known: "weakref.ref[Claim]") -> None:
    with contextlib.suppress(ValueError):  # another thread has
        _claims.remove(known)


def check_free(mine: Claim, error: type[ShiraError]) -> None:
    """Raise `error` if what one has, or wants to have, a claim on is somebody else's, in part or whole."""
    for reference in list(_claims):
        other = reference()
        if other is None or other.is_of(mine) or not other.extent.meets(mine.extent):
            continue
        owner = other.owner  # which may finish what its owner was interrupted in
        if owner:
            raise error(f"this model's weights are in other hands: {owner}")


def _nothing() -> Claim:
    return Claim(Extent(nn.Module()), "")


def _storage(tensor: Tensor) -> "tuple[int, weakref.ref[Any]]":
    """What a tensor's memory is known by: a number, and the object while it lives."""
    try:
        memory: Any = tensor if is_sharded(tensor) else tensor.untyped_storage()
        return (id(memory) if memory is tensor else memory._cdata), weakref.ref(memory)
    except (RuntimeError, NotImplementedError):  # quantized weights are made of other tensors
        return id(tensor), weakref.ref(tensor)
