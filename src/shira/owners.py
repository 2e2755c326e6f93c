"""Who may write to a model's weights: one at a time.

Whoever has changed entries of a model knows what lay under them. Two who each keep what they found would each put back the other's
values. So a tuner from `attach` to `detach`, and a switcher while something is active, hold a `Claim` on their model; whoever comes
second is refused, and told whom to ask.
"""

import weakref
from typing import Any

from torch import Tensor, nn

from .distributed import is_sharded
from .errors import ShiraError
from .model_tensors import named_tensors

__all__ = ["Claim", "check_free", "claim"]


class Claim:
    """That a model is in somebody's hands, for as long as this object lives.

    owner: who that is, and what is to be called to have the model back, for messages.
    """

    def __init__(self, model: nn.Module, owner: str) -> None:
        self.owner = owner
        self.modules = frozenset(id(module) for module in model.modules())
        self.storages = frozenset(_storage(tensor) for tensor in named_tensors(model).values())
        self._model = weakref.ref(model)  # numbers of modules mean nothing once it is gone

    def meets(self, other: "Claim") -> bool:
        """Whether two claims are on models that have a module or a weight in common."""
        alive = self._model() is not None and other._model() is not None
        return alive and not (self.modules.isdisjoint(other.modules) and self.storages.isdisjoint(other.storages))

    def __reduce__(self) -> Any:
        """A copy of a model is nobody's: what is copied or pickled with it is a claim on nothing."""
        return _nothing, ()


_claims: "weakref.WeakSet[Claim]" = weakref.WeakSet()


def claim(model: nn.Module, owner: str, error: type[ShiraError], mine: Claim | None = None) -> Claim:
    """Take a model for oneself. mine: a claim that is one's own already.

    Raises `error` if it, or a part of it, is somebody else's.
    """
    made = Claim(model, owner)
    _refuse(made, error, mine)
    _claims.add(made)
    return made


def check_free(model: nn.Module, error: type[ShiraError], mine: Claim | None = None) -> None:
    """Raise `error` if a model, or a part of it, is somebody else's."""
    if any(other is not mine for other in _claims):
        _refuse(Claim(model, ""), error, mine)


def _refuse(made: Claim, error: type[ShiraError], mine: Claim | None) -> None:
    for other in list(_claims):
        if other is not mine and other.meets(made):
            raise error(f"this model's weights are in other hands: {other.owner}")


def _nothing() -> Claim:
    return Claim(nn.Module(), "")


def _storage(tensor: Tensor) -> int:
    try:
        return id(tensor) if is_sharded(tensor) else tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # quantized weights are made of other tensors
        return id(tensor)
