"""One live model, many adapters: overwrite a few entries in place, put the old bits back.

The model is always just the model. While adapters are active the switcher holds what lay under their entries (the
stash), and whatever it does starts from there: base values are never computed, only kept.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from . import kernels
from .adapter import Adapter, SparseTensor
from .errors import AdapterError, BaseMismatch, SwitchError, did_you_mean
from .format import load
from .fusion import check_base, check_strengths, weighted_sum

__all__ = ["Switcher"]

Selection = str | Mapping[str, float] | None


class Switcher:
    """Switches a model among adapters, and sums of them, in place (SHiRA §3.2 and Appendix I, arXiv 2406.13175).

    It owns the adapted entries: nobody else may change them, and no forward pass may run, while it switches.

        switcher = shira.Switcher(model)
        switcher.add("poet", "poet.safetensors")
        switcher.use("poet")
        switcher.use({"poet": 1.0, "coder": 0.5})
        switcher.use(None)
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._adapters: dict[str, dict[str, SparseTensor]] = {}
        self._active: dict[str, float] = {}
        self._stash: dict[int, kernels.Write] = {}  # id of a weight -> what lay under the active entries

    @property
    def names(self) -> list[str]:
        """The adapters that can be used."""
        return list(self._adapters)

    @property
    def active(self) -> dict[str, float]:
        """Name -> strength of what is active; empty on the base."""
        return dict(self._active)

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Register an adapter, or a file of one, under a name, after checking that it belongs to this model.

        Raises SwitchError if the name is taken; FormatError or OSError for the file; BaseMismatch if a tensor is missing,
        has another shape or, for an overwrite adapter, other base values. The model is not written to.
        """
        if not isinstance(name, str) or not name:
            raise SwitchError(f"a name must be a string that is not empty, found {name!r}")
        if name in self._adapters:
            raise SwitchError(f"there is an adapter {name!r} already; remove it first, or choose another name")
        label = repr(name) if isinstance(adapter, Adapter) else str(Path(adapter))
        adapter = adapter if isinstance(adapter, Adapter) else load(adapter)
        check_base(label, adapter, self._weights, self._base_at)
        tensors: dict[str, SparseTensor] = {}
        owners: dict[int, str] = {}
        for tensor_name, tensor in adapter.tensors.items():
            weight = self._weights[tensor_name]
            other = owners.setdefault(id(weight), tensor_name)
            if other == tensor_name:
                tensors[tensor_name] = _on(weight, tensor_name, tensor)
            elif not _same(tensor, adapter.tensors[other]):
                raise BaseMismatch(
                    f"{label}: '{tensor_name}' and '{other}' are one tied tensor here, but differ in the adapter"
                )
        self._adapters[name] = tensors

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises SwitchError if it is unknown or active."""
        self._known(name)
        if name in self._active:
            raise SwitchError(f"adapter {name!r} is active; switch to another or to None first")
        del self._adapters[name]

    def use(self, selection: Selection) -> None:
        """Activate one adapter, several with strengths (the paper's α), or None: the base, bit for bit.

        A sum is base + Σ αᵢ · (valueᵢ − base), in float32 in the order of the names, rounded once; an entry that one
        adapter alone touches at strength 1 gets its value bit for bit.

        Raises SwitchError for an unknown name, AdapterError for a strength that is no finite number or a sum that
        overflows: then nothing has changed. After any other exception, half way, the base is active.
        """
        wanted = {} if selection is None else {selection: 1.0} if isinstance(selection, str) else dict(selection)
        for name in wanted:
            self._known(name)
        strengths = {name: strength for name, strength in check_strengths(wanted).items() if strength != 0}
        plan = self._plan(strengths)
        stash = [kernels.Write(w.weight, w.indices, self._base_at(w.weight, w.indices)) for w in plan]
        try:
            kernels.overwrite_(self._stash.values())
            self._stash.update({id(write.weight): write for write in stash})
            kernels.overwrite_(plan)
        except BaseException:
            kernels.overwrite_(self._stash.values())
            self._stash, self._active = {}, {}
            raise
        self._stash, self._active = {id(write.weight): write for write in stash}, strengths

    @contextlib.contextmanager
    def using(self, selection: Selection) -> Iterator[None]:
        """`use` inside a `with`, then whatever was active before."""
        before = self.active
        self.use(selection)
        try:
            yield
        finally:
            self.use(before)

    def _known(self, name: str) -> None:
        if name not in self._adapters:
            raise SwitchError(f"no adapter {name!r}; {did_you_mean(str(name), self._adapters)}")

    def _plan(self, strengths: Mapping[str, float]) -> list[kernels.Write]:
        """What to write over the base, every value computed and checked."""
        parts: dict[int, list[tuple[SparseTensor, float]]] = {}
        names: dict[int, str] = {}
        for adapter_name in sorted(strengths):
            for tensor_name, tensor in self._adapters[adapter_name].items():
                key = id(self._weights[tensor_name])
                names.setdefault(key, tensor_name)
                parts.setdefault(key, []).append((tensor, strengths[adapter_name]))
        plan = []
        for key, of_weight in parts.items():
            weight = self._weights[names[key]]
            tensor, strength = of_weight[0]
            if len(of_weight) == 1 and strength == 1 and tensor.kind == "overwrite":
                indices, values = tensor.indices, tensor.values
            else:
                indices, values, _ = weighted_sum(of_weight, functools.partial(self._base_at, weight))
                if not bool(torch.isfinite(values).all()):
                    raise AdapterError(
                        f"'{names[key]}' would overflow {weight.dtype} at strengths {dict(strengths)}; use smaller ones"
                    )
            plan.append(kernels.Write(weight, indices, values))
        return plan

    def _base_at(self, weight: Tensor, indices: Tensor) -> Tensor:
        """Base values at positions [k] of a weight: the live ones, or the stashed ones under active entries."""
        indices = indices.to(weight.device)
        values = kernels.gather(weight, indices)
        stashed = self._stash.get(id(weight))
        if stashed is not None and stashed.indices.numel():
            place = torch.searchsorted(stashed.indices, indices.to(stashed.indices.dtype))
            place.clamp_(max=stashed.indices.numel() - 1)
            hit = stashed.indices[place] == indices
            values[hit] = stashed.values[place[hit]]
        return values


def _on(weight: Tensor, name: str, tensor: SparseTensor) -> SparseTensor:
    """A sparse tensor ready to be written: on the weight's device, overwrites in its dtype."""
    dtype = weight.dtype if tensor.kind == "overwrite" else tensor.values.dtype
    try:
        return SparseTensor(tensor.shape, tensor.indices.to(weight.device), tensor.values.to(weight.device, dtype), tensor.kind)
    except AdapterError as error:
        raise BaseMismatch(
            f"'{name}' is {weight.dtype} in this model, which does not hold the adapter's values: {error}"
        ) from error


def _same(one: SparseTensor, other: SparseTensor) -> bool:
    """Whether two sparse tensors agree to the bit."""
    return (
        (one.shape, one.kind, one.values.dtype) == (other.shape, other.kind, other.values.dtype)
        and torch.equal(one.indices, other.indices)
        and torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
    )
