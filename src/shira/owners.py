"""Who may write to a model's weights: one at a time.

Whoever has changed entries of a model knows what lay under them. Two who each keep what they found would each put back the
other's values. So a tuner from `attach` to `detach`, and a switcher while something is active, hold a `Claim` on their model;
whoever comes second is refused, and told whom to ask.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .distributed import is_sharded
from .errors import ShiraError
from .model_tensors import named_tensors

__all__ = ["Claim", "Extent", "check_free", "claim", "taking"]

taking = threading.RLock()  # held while it is looked whether a model is free, and it is taken


class Extent:
    """The modules and the memory that a model consists of."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = frozenset(id(module) for module in model.modules())
        self._storages = frozenset(_storage(tensor) for tensor in named_tensors(model).values())
        self._model = weakref.ref(model)  # numbers of modules mean nothing once it is gone

    def meets(self, other: "Extent") -> bool:
        """Whether two models have a module or a weight in common."""
        alive = self._model() is not None and other._model() is not None
        return alive and not (self._modules.isdisjoint(other._modules) and self._storages.isdisjoint(other._storages))


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

    Raises `error`, unless it is None, if the model, or a part of it, is somebody else's.
    """
    made = Claim(Extent(model), owner)
    with taking:
        if error is not None:
            check_free(made, error)
        _claims[:] = [known for known in _claims if known() is not None] + [weakref.ref(made)]
    return made


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


def _storage(tensor: Tensor) -> int:
    try:
        return id(tensor) if is_sharded(tensor) else tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # quantized weights are made of other tensors
        return id(tensor)
