"""Who may write to a model's weights: one owner at a time.

An owner changes entries and keeps their old values. If two did so at once, each would later restore values of the other. So a
tuner holds a `Claim` on its model from `attach` to `detach`, and a switcher holds one while an adapter is active. A second
owner is refused, and the message names the first.
"""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ShiraError
from .distributed import is_sharded, local_of
from .model_tensors import named_tensors

__all__ = ["Claim", "check_free", "claim", "claimed_with", "leave"]


class Extent:
    """The modules and the memory of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = frozenset(id(module) for module in model.modules())
        self._storages = dict(map(_storage, named_tensors(model).values()))
        self.model = weakref.ref(model)  # the ids of modules mean nothing after the model is gone

    def has(self, module: nn.Module) -> bool:
        """Whether the model had this module when its extent was taken."""
        return id(module) in self._modules

    def meets(self, other: "Extent") -> bool:
        """Whether two models have a module or a weight in common."""
        if self.model() is None or other.model() is None:
            return False
        return not self._modules.isdisjoint(other._modules) or any(
            (storage := self._storages[number]()) is not None and storage is other._storages[number]()
            for number in self._storages.keys() & other._storages.keys()  # numbers are reused, objects are not
        )


class Claim:
    """A claim on a model, which lasts as long as this object lives.

    owner: a text for messages, which names the owner and the call that frees the model; or a function that returns the present
        text, "" if the claim does not count.
    """

    def __init__(self, extent: Extent, owner: str | Callable[[], str]) -> None:
        self.extent = extent
        self._owner = owner

    @property
    def owner(self) -> str:
        return self._owner if isinstance(self._owner, str) else self._owner()

    def is_of(self, other: "Claim") -> bool:
        """Whether two claims have one owner. An owner makes a second claim after its model has changed."""
        return self is other or (not isinstance(self._owner, str) and self._owner is other._owner)

    def __reduce__(self) -> Any:
        """A copy of a model has no owner: a copied or pickled claim is a claim on nothing."""
        return _claim_on_nothing, ()


_claims: "list[weakref.ref[Claim]]" = []  # without callbacks: an interrupt inside a callback would be lost


def claim(model: nn.Module, owner: str | Callable[[], str], error: type[ShiraError] | None) -> Claim:
    """Claim a model. owner: as in `Claim`.

    Raises `error`, unless it is None, if another owner has the model or a part of it. If two threads claim a model at once,
    both may be refused, because each registers its claim before it checks the others. So no lock is needed, which an interrupt
    could leave locked.
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
    with contextlib.suppress(ValueError):  # another thread has removed it
        _claims.remove(known)


def check_free(mine: Claim, error: type[ShiraError]) -> None:
    """Raise `error` if another owner has a claim on the same model, or on a part of it.

    If nobody has, what an owner that is gone has left in the weights is taken out of them.
    """
    for reference in list(_claims):
        other = reference()
        if other is None or other.is_of(mine) or not other.extent.meets(mine.extent):
            continue
        owner = other.owner  # the call may complete what an interrupt stopped in the owner, which then has no claim
        if owner:
            raise error(f"this model's weights are already in use: {owner}")
    model = mine.extent.model()
    if _left and model is not None:
        for put_back in dict.fromkeys(found for module in model.modules() if (found := _left.get(module)) is not None):
            modules = [module for module, other in list(_left.items()) if other is put_back]
            put_back(modules)
            for module in modules:
                _left.pop(module, None)


def claimed_with(module: nn.Module) -> nn.Module | None:
    """The model that has an owner and had this module when it was claimed; None if there is none."""
    extents = [found.extent for each in list(_claims) if (found := each()) is not None and found.extent.has(module)]
    return next((model for extent in extents if (model := extent.model()) is not None), None)


_left: "weakref.WeakKeyDictionary[nn.Module, Callable[[Sequence[nn.Module]], None]]" = weakref.WeakKeyDictionary()


def leave(modules: Sequence[nn.Module], put_back: Callable[[Sequence[nn.Module]], None]) -> None:
    """Let the next owner of one of these modules begin with put_back(those that still live). It may hold no module itself."""
    for module in modules:
        _left[module] = put_back


def _claim_on_nothing() -> Claim:
    return Claim(Extent(nn.Module()), "")


def _storage(tensor: Tensor) -> "tuple[int, weakref.ref[Any]]":
    """The identity of a tensor's memory: a number, and a weak reference to the storage.

    A weak reference to the tensor itself would keep torch from swapping it, as a cast does with a sharded weight.
    """
    inner: Any = local_of(tensor) if is_sharded(tensor) else tensor
    while hasattr(inner, "__tensor_flatten__"):  # a quantized weight has no storage: it consists of other tensors
        inner = getattr(inner, inner.__tensor_flatten__()[0][0])
    try:
        memory: Any = inner.untyped_storage()
        return memory._cdata, weakref.ref(memory)
    except (RuntimeError, NotImplementedError):  # a sparse tensor
        return id(tensor), weakref.ref(tensor)
