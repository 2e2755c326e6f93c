"""Prepare a selection: adapters are read, checked against the model and combined, before anything is written."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..errors import AdapterError
from ..fusion.combining import combine
from ..fusion.methods import Method
from ..fusion.strengths import strengths_of
from ..kernels import Sum, Write, WritePlan
from ..sparse.tensor import SparseTensor, all_finite
from ..weights.model_tensors import is_buffer
from ..weights.quantized import is_quantized
from . import quantized_layers
from .model_state import ModelState
from .ready import Chosen, Prepared, Ready
from .sources import AdapterSource

__all__ = ["checked", "overflow", "prepare"]


def prepare(
    key: Chosen, sources: Mapping[str, AdapterSource], ready: Ready, now: ModelState, active: Sequence[WritePlan]
) -> Prepared:
    """A selection with every value computed and checked. It is held ready from now on, if that is possible.

    active: the plans that are written over the base at the moment. Raises what `Switcher.use` raises for files and values.
    """
    by_weight: dict[int, tuple[str, list[tuple[SparseTensor, float]]]] = {}
    for adapter_name, fixed in key.strengths:
        tensors = checked(adapter_name, sources[adapter_name], now, active)
        for tensor_name, strength in strengths_of(repr(adapter_name), fixed, tensors).items():
            if strength != 0:
                terms = by_weight.setdefault(id(now.weights[tensor_name]), (tensor_name, []))[1]
                terms.append((tensors[tensor_name], strength))
    made, products = [], []
    for name, terms in by_weight.values():
        if is_quantized(now.weights[name]):
            products.append(quantized_layers.product(name, now.weights[name], terms, key.method))
        else:
            made.append(_write(name, terms, key.method, ready, now, active))
    plan = WritePlan.of([write for write, _ in made], [total for _, total in made])
    prepared = Prepared(plan, tuple(products))
    moves = any(is_buffer(write.weight) for write in plan.writes)  # forward passes change buffers; then their sums are wrong
    return prepared if moves else ready.hold(key, prepared)


def checked(name: str, source: AdapterSource, now: ModelState, active: Sequence[WritePlan]) -> dict[str, SparseTensor]:
    """The tensors of an adapter, read and checked against the model. Raises what `Switcher.add` raises."""
    adapter, is_new = source.read(now.weights)
    tensors = now.checked(source.label(name), adapter, active, is_new=is_new)
    source.is_checked()
    return tensors


def overflow(name: str, weight: Tensor) -> str:
    """The message for a sum that is not finite."""
    return f"'{name}' would overflow {weight.dtype} at these strengths; use smaller ones"


def _write(
    name: str,
    terms: list[tuple[SparseTensor, float]],
    method: Method,
    ready: Ready,
    now: ModelState,
    active: Sequence[WritePlan],
) -> tuple[Write, Sum | None]:
    """The write to one tensor; and the sum that gives its values, if the kernel computes the sum while it writes."""
    weight = now.weights[name]
    tensor, strength = terms[0]
    if len(terms) == 1 and strength == 1 and tensor.kind == "overwrite" and not method.thins:
        return _here(weight, tensor.indices, tensor.values.clone(), ready, now), None
    overlap = kernels.unite([term.indices for term, _ in terms])
    as_written = method.name == "sum" and all(term.kind == "overwrite" for term, _ in terms)
    if as_written and id(weight) not in now.pieces and kernels.writes_sums(weight):
        room = torch.empty_like(overlap.indices, dtype=weight.dtype)
        total = Sum.of(overlap, [(term.values, strength) for term, strength in terms])
        return _here(weight, overlap.indices, room, ready, now), total
    indices, values, _ = combine(name, terms, overlap, now.base_at(weight, overlap.indices, active), method)
    if not all_finite(values):
        raise AdapterError(overflow(name, weight))
    return _here(weight, indices, values, ready, now), None


def _here(weight: Tensor, indices: Tensor, values: Tensor, ready: Ready, now: ModelState) -> Write:
    """A write to a weight or, if the weight is sharded, to its local piece."""
    piece = now.pieces.get(id(weight))
    if piece is not None:
        span = piece.span(indices)
        weight, indices, values = piece.local, indices[span] - piece.start, values[span]
    return Write(weight, ready.own(weight, indices), values)
