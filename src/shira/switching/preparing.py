"""Prepare a selection: adapters are read, checked against the model and combined, before anything is written."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..fusion.combining import combine, combine_deltas, in_one_pass, overflow
from ..fusion.methods import Method
from ..fusion.strengths import strengths_of
from ..kernels import Combined, Sum, Write, WritePlan
from ..sparse.tensor import SparseTensor, all_finite
from ..weights.model_tensors import is_buffer
from ..weights.quantized import is_quantized
from . import quantized_layers
from .model_state import ModelState
from .ready import CheckedSelection, Prepared, Ready
from .sources import AdapterSource

__all__ = ["changes", "checked", "prepare"]

COPIED = 256  # bytes of a weight for each new entry: with more, copying its windows takes longer than looking up the base


def prepare(
    key: CheckedSelection, sources: Mapping[str, AdapterSource], ready: Ready, model: ModelState, active: Sequence[WritePlan]
) -> Prepared:
    """A selection with every value computed and checked. It is held ready from now on, if that is possible.

    active: the plans that are written over the base at the moment. Raises what `Switcher.use` raises for files and values.
    """
    made, products, weights = [], [], []
    for name, terms in _terms(key, sources, model, active):
        if is_quantized(model.weights[name]):
            products.append(quantized_layers.product(name, model.weights[name], terms, key.method))
        else:
            made.append(_write(name, terms, key.method, ready, model, active))
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
            raise overflow(name, weight.dtype)
        found[name] = SparseTensor(terms[0][0].shape, indices, values, "delta")
    return found


def _terms(
    key: CheckedSelection, sources: Mapping[str, AdapterSource], model: ModelState, active: Sequence[WritePlan]
) -> list[tuple[str, list[tuple[SparseTensor, float]]]]:
    """For each tensor that a selection changes its name, and what each adapter has for it, with its strength."""
    by_weight: dict[int, tuple[str, list[tuple[SparseTensor, float]]]] = {}
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
    terms: list[tuple[SparseTensor, float]],
    method: Method,
    ready: Ready,
    model: ModelState,
    active: Sequence[WritePlan],
) -> tuple[Write, Sum | None]:
    """The write to one tensor; and the sum that gives its values, if the kernel computes the sum while it writes."""
    weight = model.weights[name]
    tensor, strength = terms[0]
    if len(terms) == 1 and strength == 1 and tensor.kind == "overwrite" and not method.thins:
        return _local_write(weight, tensor.indices, tensor.values.clone(), ready, model), None
    in_place = id(weight) not in model.pieces and id(weight) not in model.orders
    found = _in_one_pass(terms, weight, method, active) if in_place else None
    if found is not None:
        if not all_finite(found.values):
            raise overflow(name, weight.dtype)
        return Write(weight, ready.own_positions(weight, found.indices, fresh=True), found.values), None
    union = kernels.unite([term.indices for term, _ in terms])
    as_written = method.name == "sum" and all(term.kind == "overwrite" for term, _ in terms)
    if as_written and in_place and kernels.writes_sums(weight):
        room = torch.empty_like(union.indices, dtype=weight.dtype)
        total = Sum.of(union, [(term.values, strength) for term, strength in terms])
        return _local_write(weight, union.indices, room, ready, model), total
    indices, values, _ = combine(name, terms, union, model.base_at(weight, union.indices, active), method)
    if not all_finite(values):
        raise overflow(name, weight.dtype)
    return _local_write(weight, indices, values, ready, model), None


def _in_one_pass(
    terms: list[tuple[SparseTensor, float]], weight: Tensor, method: Method, active: Sequence[WritePlan]
) -> Combined | None:
    """The combined values of a weight and their positions, if one kernel can compute them from what it holds now."""
    numbers = [(plan, number) for plan in active if (number := plan.numbers.get(id(weight))) is not None]
    hidden = [(plan.writes[number].indices, plan.stash[number]) for plan, number in numbers]
    if len(hidden) > 1 or (hidden and weight.nbytes > COPIED * sum(term.nnz for term, _ in terms)):
        return None
    return in_one_pass(terms, weight.detach(), weight.dtype, method, hidden=hidden[0] if hidden else None, with_base=False)


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
