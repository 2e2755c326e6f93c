"""One live model, many adapters: overwrite a few entries in place, put the old bits back.

The model is always just the model. While adapters are active the switcher holds what lay under their entries (the
stash), and whatever it does starts from there: base values are never computed, only kept.
"""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels, sides
from .adapter import Adapter, SparseTensor, all_finite
from .distributed import gather_pieces, is_sharded, piece_of, reshard
from .errors import AdapterError, BaseMismatch, SwitchError, did_you_mean
from .fusion import check_base, combine
from .kernels import Plan, Sum, Waiting, Write
from .methods import Method, resolve
from .quantized import is_quantized
from .sources import Source
from .strengths import Fixed, Strength, as_given, check_strengths, strengths_of

__all__ = ["Switcher"]

Selection = str | Mapping[str, Strength] | None


class _Chosen(NamedTuple):
    """What can be active: adapters in order, with their strengths, and how they are combined."""

    strengths: tuple[tuple[str, Fixed], ...]
    method: Method


BASE = _Chosen((), Method("sum"))
NOTHING = Plan.of([])


class Switcher:
    """Switches a model among adapters, and sums of them, in place (SHiRA §3.2 and Appendix I, arXiv 2406.13175).

    It owns the adapted entries: nobody else may change them, and no forward pass may run, while it switches. If the model is
    sharded over processes (`fully_shard`), each of them must make the same calls.

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
        if ready < 1 or host < 0:
            raise SwitchError(f"ready must be at least 1 and host at least 0, found {ready} and {host}")
        self._model = model
        self._weights: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._pieces = {id(weight): piece_of(name, weight) for name, weight in self._weights.items() if is_sharded(weight)}
        self._sources: dict[str, Source] = {}
        self._sides = sides.Sides(model)
        self._beside: dict[_Chosen, list[sides.Product]] = {}  # of what is ready or waiting, on quantized weights
        self._ready: OrderedDict[_Chosen, Plan] = OrderedDict()
        self._waiting: OrderedDict[_Chosen, Waiting] = OrderedDict()
        self._arriving: OrderedDict[_Chosen, Plan] = OrderedDict()
        self._capacity, self._host = ready, host
        self._active = BASE
        self._plan = NOTHING  # what is written over the base, with what lay there
        self._leaving = NOTHING  # what was, while another takes its place

    @property
    def names(self) -> list[str]:
        """The adapters that can be used."""
        return list(self._sources)

    @property
    def active(self) -> dict[str, float | dict[str, float]]:
        """Name -> strength of what is active, as `use` was given it; empty on the base."""
        return {name: as_given(strength) for name, strength in self._active.strengths}

    @property
    def method(self) -> dict[str, Any]:
        """The method that combines what is active, and all its options: {"method": "ties", "density": 0.2}."""
        return self._active.method.described()

    def add(self, name: str, adapter: Adapter | str | os.PathLike[str]) -> None:
        """Register an adapter, or a file of one, under a name, after checking that it belongs to this model.

        A file is read again when it is used after others have taken its place, so it must stay where it is.

        Raises SwitchError if the name is taken; FormatError or OSError for the file; BaseMismatch if a tensor is missing,
        has another shape or, for an overwrite adapter, other base values. The model is not written to.
        """
        if not isinstance(name, str) or not name:
            raise SwitchError(f"a name must be a string that is not empty, found {name!r}")
        if name in self._sources:
            raise SwitchError(f"there is an adapter {name!r} already; remove it first, or choose another name")
        source = Source(adapter)
        self._checked(name, source)
        self._sources[name] = source

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises SwitchError if it is unknown or active."""
        self._known(name)
        if name in dict(self._active.strengths):
            raise SwitchError(f"adapter {name!r} is active; switch to another or to None first")
        del self._sources[name]
        held: tuple[OrderedDict[_Chosen, Any], ...] = (self._ready, self._waiting, self._arriving)
        for selections in held:
            for key in [key for key in selections if name in dict(key.strengths)]:
                del selections[key]

    def use(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Activate one adapter, several with strengths (the paper's α), or None: the base, bit for bit.

        selection: a name; or name -> strength, a number, below 0 to negate, or pattern -> number, of which the last that fits
            a tensor's name counts; those that are 0 are not there.
        method, options: how changes that meet are combined: docs/fusion.md.

        Several are base + what the method makes of the changes α · (value − base), in float32, in the order of the names,
        rounded once; an entry that one adapter alone touches at strength 1 gets its value bit for bit.

        Raises SwitchError for an unknown name, AdapterError for a method, option or strength that cannot be, or a result that
        overflows, and what `add` raises if a file has changed: then nothing has changed here. After any other exception,
        half way, the base is active.
        """
        self._activate(self._chosen(selection, method, options))

    def prefetch(self, selection: Selection, method: str = "sum", **options: float) -> None:
        """Make ready what `use` will be asked for, while a forward pass may still run: what waits in host memory is sent to the
        model's GPU by a copy of its own stream, and nobody waits for it; anything else is read, checked and computed now.

        Nothing in the model changes. Raises what `use` raises.

            switcher.prefetch("coder")
            model(**inputs)  # with what is active now
            switcher.use("coder")
        """
        key = self._chosen(selection, method, options)
        if key in self._ready or key in self._arriving or not key.strengths:
            return
        if key in self._waiting:
            self._waiting.move_to_end(key)
            self._arriving[key] = self._waiting[key].arrive()
            if len(self._arriving) > self._capacity:
                self._arriving.popitem(last=False)
        else:
            kernels.prepare(self._prepare(key))

    def _chosen(self, selection: Selection, method: str, options: Mapping[str, float]) -> _Chosen:
        wanted = {} if selection is None else {selection: 1.0} if isinstance(selection, str) else dict(selection)
        for name in wanted:
            self._known(name)
        strengths = sorted((name, fixed) for name, fixed in check_strengths(wanted).items() if _is_there(fixed))
        chosen = resolve(method, options)
        return _Chosen(tuple(strengths), chosen) if strengths else BASE

    def _activate(self, wanted: _Chosen) -> None:
        if wanted == self._active:
            return
        plan, before, finite = self._prepare(wanted), self._active, True
        try:
            same_positions = plan.over(self._plan)
            if same_positions is not None:
                self._plan = same_positions
                kernels.write_(same_positions)
            else:
                self._leaving, self._plan = self._plan, plan
                if any(plan.sums):
                    finite = kernels.fuse_(plan, self._leaving)
                else:
                    kernels.change_(self._leaving, plan)
                self._leaving = NOTHING
            self._sides.show(self._beside.get(wanted, []))
            self._active = wanted
        except BaseException:
            self._restore()
            self._active = BASE
            raise
        finally:
            if self._pieces:  # what was gathered of them is out of date
                reshard(self._model)
        if not finite:
            self._undo_overflow(plan, before)

    def _undo_overflow(self, plan: Plan, before: _Chosen) -> None:
        """Sums that were computed as they were written, some of them infinite: back to what was active."""
        weight = next(part.weight for part in plan.parts if not all_finite(part.values))
        name = next(name for name, other in self._weights.items() if other is weight)
        self._restore()
        self._ready.pop(self._active)
        self._active = BASE
        self._activate(before)
        raise AdapterError(_overflow(name, weight))

    def _restore(self) -> None:
        """The base, bit for bit."""
        self._sides.show([])
        for plan in (self._plan, self._leaving):
            if plan.parts:
                kernels.restore_(plan)
                plan.begun[0] = 0
        self._plan = self._leaving = NOTHING

    @contextlib.contextmanager
    def using(self, selection: Selection, method: str = "sum", **options: float) -> Iterator[None]:
        """`use` inside a `with`, then whatever was active before."""
        before = self._active
        self.use(selection, method, **options)
        try:
            yield
        finally:
            for name, _ in before.strengths:
                self._known(name)
            self._activate(before)

    def _known(self, name: str) -> None:
        if name not in self._sources:
            raise SwitchError(f"no adapter {name!r}; {did_you_mean(str(name), self._sources)}")

    def _prepare(self, key: _Chosen) -> Plan:
        """What to write over the base, every value computed and checked; made once, kept while it is among the latest."""
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        if key in self._arriving or key in self._waiting:
            plan = self._arriving.pop(key, None) or self._waiting[key].arrive()
            return self._hold(key, kernels.arrived(plan))
        by_weight: dict[int, tuple[str, list[tuple[SparseTensor, float]]]] = {}
        for adapter_name, fixed in key.strengths:
            tensors = self._checked(adapter_name, self._sources[adapter_name])
            for tensor_name, strength in strengths_of(repr(adapter_name), fixed, tensors).items():
                if strength != 0:
                    parts = by_weight.setdefault(id(self._weights[tensor_name]), (tensor_name, []))[1]
                    parts.append((tensors[tensor_name], strength))
        made, products = [], []
        for name, parts in by_weight.values():
            if is_quantized(self._weights[name]):
                products.append(sides.product(name, self._weights[name], parts, key.method))
            else:
                made.append(self._write(name, parts, key.method))
        plan = Plan.of([write for write, _ in made], [total for _, total in made])
        if not key.strengths:  # the base needs no room
            return plan
        self._beside[key] = products
        return self._hold(key, plan)

    def _hold(self, key: _Chosen, plan: Plan) -> Plan:
        """Hold a plan ready. What no longer fits waits in host memory, or is gone."""
        self._ready[key] = plan
        while len(self._ready) > self._capacity:
            gone, its_plan = self._ready.popitem(last=False)
            if self._host and not any(its_plan.sums):
                if gone not in self._waiting:
                    self._waiting[gone] = Waiting(its_plan)
                self._waiting.move_to_end(gone)
            if len(self._waiting) > self._host:
                self._waiting.popitem(last=False)
        held = (self._ready, self._waiting, self._arriving)
        self._beside = {key: products for key, products in self._beside.items() if any(key in each for each in held)}
        return plan

    def _write(self, name: str, parts: list[tuple[SparseTensor, float]], method: Method) -> tuple[Write, Sum | None]:
        """What becomes of one tensor; and of what its values are summed when they are written, if they are not yet."""
        weight = self._weights[name]
        tensor, strength = parts[0]
        if len(parts) == 1 and strength == 1 and tensor.kind == "overwrite" and not method.thins:
            return self._here(weight, tensor.indices, tensor.values), None
        overlap = kernels.merge([part.indices for part, _ in parts])
        as_written = method.name == "sum" and all(part.kind == "overwrite" for part, _ in parts)
        if as_written and id(weight) not in self._pieces and kernels.fuses(weight):
            room = torch.empty_like(overlap.indices, dtype=weight.dtype)
            total = Sum.of(overlap, [(part.values, strength) for part, strength in parts])
            return self._here(weight, overlap.indices, room), total
        indices, values, _ = combine(name, parts, overlap, self._base_at(weight, overlap.indices), method)
        if not all_finite(values):
            raise AdapterError(_overflow(name, weight))
        return self._here(weight, indices, values), None

    def _here(self, weight: Tensor, indices: Tensor, values: Tensor) -> Write:
        """A write to a weight, or, if it is sharded, to what lies here of it."""
        piece = self._pieces.get(id(weight))
        if piece is not None:
            span = piece.span(indices)
            weight, indices, values = piece.local, indices[span] - piece.start, values[span]
        return Write(weight, self._shared(weight, indices), values)

    def _shared(self, weight: Tensor, indices: Tensor) -> Tensor:
        """These positions, or the very tensor of a plan that is ready and has the same ones: adapters of one mask then hold
        them once, and switch among each other in one pass."""
        for plan in self._ready.values():
            for part in plan.parts:
                if part.weight is weight and part.indices.numel() == indices.numel() and torch.equal(part.indices, indices):
                    return part.indices
        return indices

    def _checked(self, name: str, source: Source) -> dict[str, SparseTensor]:
        """An adapter's tensors, ready to be written to this model: on its devices, overwrites in its dtypes, one for each
        tied weight. The base is compared when the content is new."""
        adapter, is_new = source.read()
        label = source.label(name)
        plain, _ = self._sides.split(label, adapter, self._weights)
        if is_new:
            check_base(label, plain, self._weights, self._base_at)
        tensors: dict[str, SparseTensor] = {}
        owners: dict[int, str] = {}
        for tensor_name, tensor in adapter.tensors.items():
            weight = self._weights[tensor_name]
            other = owners.setdefault(id(weight), tensor_name)
            if other == tensor_name:
                tensors[tensor_name] = _on(weight, tensor_name, tensor)
            elif not _same(tensor, adapter.tensors[other]):
                raise BaseMismatch(f"{label}: '{tensor_name}' and '{other}' are one tied tensor here, two in the adapter")
        source.is_checked()
        return tensors

    def _base_at(self, weight: Tensor, indices: Tensor) -> Tensor:
        """Base values at positions [k] of a weight: the live ones, or the stashed ones under active entries."""
        indices = indices.to(weight.device)
        piece = self._pieces.get(id(weight))
        if piece is None:
            return self._base_here(weight, indices)
        return gather_pieces(weight, indices, self._base_here(piece.local, indices[piece.span(indices)] - piece.start))

    def _base_here(self, weight: Tensor, indices: Tensor) -> Tensor:
        values = kernels.gather(weight, indices)
        for part, stash in zip(self._plan.parts, self._plan.stash, strict=True):
            if part.weight is weight and part.indices.numel():
                place = torch.searchsorted(part.indices, indices.to(part.indices.dtype))
                place.clamp_(max=part.indices.numel() - 1)
                hit = part.indices[place] == indices
                values[hit] = stash[place[hit]]
        return values


def _overflow(name: str, weight: Tensor) -> str:
    return f"'{name}' would overflow {weight.dtype} at these strengths; use smaller ones"


def _is_there(strength: Fixed) -> bool:
    """Whether any of it is not 0."""
    return strength != 0 if isinstance(strength, float) else any(value != 0 for _, value in strength)


def _on(weight: Tensor, name: str, tensor: SparseTensor) -> SparseTensor:
    """A sparse tensor ready to be written: on the weight's device, overwrites in its dtype."""
    dtype = weight.dtype if tensor.kind == "overwrite" else tensor.values.dtype  # of a quantized weight there are only deltas
    if (tensor.values.device, tensor.values.dtype) == (weight.device, dtype):
        return tensor
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
