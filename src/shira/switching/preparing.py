"""Prepare a selection: adapters are read, checked against the model and combined, before anything is written."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..fusion.combining import combination, combine, combine_deltas, overflow
from ..fusion.methods import Method
from ..fusion.strengths import strengths_of
from ..kernels import Combination, Sum, Write, WritePlan
from ..sparse.tensor import SparseTensor, all_finite
from ..weights.model_tensors import is_buffer
from ..weights.quantized import is_quantized
from . import quantized_layers
from .model_state import ModelState
from .ready import CheckedSelection, Prepared, Ready
from .sources import AdapterSource

__all__ = ["changes", "checked", "prepare"]

Term = tuple[SparseTensor, float]  # what an adapter has for a tensor, and its strength

AT_ONCE = 2**26  # entries of changes from which on another call begins
COPIED = 256  # bytes of a weight for each new entry: with more, copying its windows takes longer than looking up the base


def prepare(
    key: CheckedSelection, sources: Mapping[str, AdapterSource], ready: Ready, model: ModelState, active: Sequence[WritePlan]
) -> Prepared:
    """A selection with every value computed and checked. It is held ready from now on, if that is possible.

    active: the plans that are written over the base at the moment. Raises what `Switcher.use` raises for files and values.
    """
    made, products, weights = [], [], []
    named = _terms(key, sources, model, active)
    at_once = _in_one_pass(named, key.method, ready, model, active)
    for name, terms in named:
        if is_quantized(model.weights[name]):
            products.append(quantized_layers.product(name, model.weights[name], terms, key.method))
        else:
            made.append((at_once[name], None) if name in at_once else _write(name, terms, key.method, ready, model, active))
            weight = model.weights[name]
            weights.append(weight if id(weight) in model.orders else made[-1][0].weight)
    plan = WritePlan.of([write for write, _ in made], [total for _, total in made], weights)
    prepared = Prepared(plan, tuple(products))
    has_buffers = any(is_buffer(weight) for weight in weights)  # forward passes change them; then sums are wrong
    return prepared if has_buffers else ready.hold(key, prepared)


def changes(
    key: CheckedSelection, sources: Mapping[str, AdapterSource], model: ModelState, active: Sequence[WritePlan]
) -> dict[str, SparseTensor]:
    """What a selection changes in each tensor: its new values minus the base's, as deltas in float32 (float64 for float64).

    Nothing is held ready. See `prepare`.
    """
    found = {}
    for name, terms in _terms(key, sources, model, active):
        weight = model.weights[name]
        if is_quantized(weight):
            indices, values = combine_deltas(name, terms, torch.float32, key.method)
        else:
            union = kernels.unite([term.indices for term, _ in terms])
            indices, new, base = combine(name, terms, union, model.base_at(weight, union.indices, active), key.method)
            wide = torch.promote_types(base.dtype, torch.float32)
            values = new.to(wide) - base.to(wide)
        if not all_finite(values):
            raise overflow(name, weight.dtype, None if is_quantized(weight) else base)
        found[name] = SparseTensor(terms[0][0].shape, indices, values, "delta")
    return found


def _terms(
    key: CheckedSelection, sources: Mapping[str, AdapterSource], model: ModelState, active: Sequence[WritePlan]
) -> list[tuple[str, list[Term]]]:
    """For each tensor that a selection changes its name, and what each adapter has for it, with its strength."""
    by_weight: dict[int, tuple[str, list[Term]]] = {}
    for adapter_name, given in key.strengths:
        tensors = checked(adapter_name, sources[adapter_name], model, active)
        for tensor_name, strength in strengths_of(repr(adapter_name), given, tensors).items():
            if strength != 0:
                terms = by_weight.setdefault(id(model.weights[tensor_name]), (tensor_name, []))[1]
                terms.append((tensors[tensor_name], strength))
    return list(by_weight.values())


def checked(name: str, source: AdapterSource, model: ModelState, active: Sequence[WritePlan]) -> dict[str, SparseTensor]:
    """The tensors of an adapter, read and checked against the model. Raises what `Switcher.add` raises."""
    adapter, is_new = source.read(model.weights)
    tensors = model.checked(source.label(name), adapter, active, is_new=is_new)
    source.note_checked()
    return tensors


def _write(
    name: str,
    terms: list[Term],
    method: Method,
    ready: Ready,
    model: ModelState,
    active: Sequence[WritePlan],
) -> tuple[Write, Sum | None]:
    """The write to one tensor; and the sum that gives its values, if the kernel computes the sum while it writes."""
    weight = model.weights[name]
    if _is_exact(terms, method):
        tensor = terms[0][0]
        return _local_write(weight, tensor.indices, tensor.values.clone(), ready, model), None
    union = kernels.unite([term.indices for term, _ in terms])
    as_written = method.name == "sum" and all(term.kind == "overwrite" for term, _ in terms)
    if as_written and _is_in_place(weight, model) and kernels.writes_sums(weight):
        room = torch.empty_like(union.indices, dtype=weight.dtype)
        total = Sum.of(union, [(term.values, strength) for term, strength in terms])
        return _local_write(weight, union.indices, room, ready, model), total
    indices, values, base = combine(name, terms, union, model.base_at(weight, union.indices, active), method)
    if not all_finite(values):
        raise overflow(name, weight.dtype, base)
    return _local_write(weight, indices, values, ready, model), None


def _in_one_pass(
    named: Sequence[tuple[str, list[Term]]],
    method: Method,
    ready: Ready,
    model: ModelState,
    active: Sequence[WritePlan],
) -> dict[str, Write]:
    """The writes to all tensors for which one kernel can compute the values from what the weights hold now.

    Many tensors are computed in one call. There are several calls for a large model: if a ready selection has the same
    positions, those of one call are freed before the next.
    """
    calls: list[dict[str, Combination]] = []
    entries = AT_ONCE
    for name, terms in named:
        weight = model.weights[name]
        if is_quantized(weight) or _is_exact(terms, method) or not _is_in_place(weight, model):
            continue
        numbers = [(plan, number) for plan in active if (number := plan.numbers.get(id(weight))) is not None]
        hidden = [(plan.writes[number].indices, plan.stash[number]) for plan, number in numbers]
        count = sum(term.nnz for term, _ in terms)
        if len(hidden) > 1 or (hidden and weight.nbytes > COPIED * count):
            continue
        if entries >= AT_ONCE:
            calls.append({})
            entries = 0
        entries += count
        calls[-1][name] = combination(terms, weight.detach(), weight.dtype, method, hidden[0] if hidden else None)
    writes = {}
    for call in calls:
        for name, each in zip(call, kernels.combine_all(list(call.values()), with_base=False), strict=True):
            weight = model.weights[name]
            if each is not None and not each.is_finite:
                raise overflow(name, weight.dtype, model.base_at(weight, each.indices, active))
            if each is not None:
                writes[name] = Write(weight, ready.own_positions(weight, each.indices, fresh=True), each.values)
    return writes


def _is_exact(terms: Sequence[Term], method: Method) -> bool:
    """Whether the adapters' values are the new values as they are: there is one adapter, at strength 1."""
    return len(terms) == 1 and terms[0][1] == 1 and terms[0][0].kind == "overwrite" and not method.thins


def _is_in_place(weight: Tensor, model: ModelState) -> bool:
    """Whether the weight lies whole and contiguous in this process's memory."""
    return id(weight) not in model.pieces and id(weight) not in model.orders


def _local_write(weight: Tensor, indices: Tensor, values: Tensor, ready: Ready, model: ModelState) -> Write:
    """A write to a weight; to its local piece, if it is sharded; through its contiguous view, if it is not contiguous."""
    piece = model.pieces.get(id(weight))
    if piece is not None:
        span = piece.span(indices)
        weight, indices, values = piece.local, indices[span] - piece.start, values[span]
    elif id(weight) in model.orders:
        order, weight = model.orders[id(weight)]
        indices, values = order.sorted_places(indices, values)
    return Write(weight, ready.own_positions(weight, indices), values)
