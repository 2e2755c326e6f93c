"""Adapters on quantized layers: nothing is overwritten; a sparse product is added to each layer's output."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import BaseMismatch
from ..fusion.combining import combine_deltas, overflow
from ..fusion.methods import Method
from ..kernels.sparse_product import SparseLayout
from ..sparse.tensor import SparseTensor, all_finite
from ..weights.belonging import weight_of
from ..weights.quantized import dtype_label, is_quantized, shape_of

__all__ = ["AddedProduct", "QuantizedLayers", "product"]


class AddedProduct(NamedTuple):
    """A sparse product that is added to the output of the layers that compute with `weight`."""

    weight: Tensor
    layout: SparseLayout
    values: Tensor  # float32 [n]


class QuantizedLayers:
    """The quantized linear layers of a model. Shows products by adding them to the layers' outputs."""

    def __init__(self, model: nn.Module) -> None:
        self._mark = object()  # marks the hooks of this object
        self._users: dict[int, list[nn.Linear]] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear) and is_quantized(module.weight):
                self._users.setdefault(id(module.weight), []).append(module)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._users)

    def without_quantized(self, label: str, adapter: Adapter, weights: Mapping[str, Tensor]) -> Adapter:
        """An adapter's part for plain weights. The part for quantized ones is checked here.

        label: the adapter's name in messages. Raises BaseMismatch if a quantized weight has another shape, would have to be
        overwritten, or is in no linear layer.
        """
        quantized = {name: t for name, t in adapter.tensors.items() if name in weights and is_quantized(weights[name])}
        for name, tensor in quantized.items():
            weight = weight_of(label, name, tensor, weights)
            if tensor.kind != "delta":
                raise BaseMismatch(
                    f"{label} overwrites '{name}', which is {dtype_label(weight)} in this model and cannot be overwritten; "
                    "load the base that it was trained on, or use a delta adapter, as training on a quantized model makes them"
                )
            if id(weight) not in self._users:
                raise BaseMismatch(
                    f"{label}: '{name}' is {dtype_label(weight)}, but only the quantized weight of a linear layer can have an "
                    "adapter"
                )
        plain = {name: tensor for name, tensor in adapter.tensors.items() if name not in quantized}
        return Adapter(plain, adapter.metadata)

    def show(self, products: Sequence[AddedProduct]) -> None:
        """Add these products, and no others, to the outputs."""
        if not self._users:
            return
        for modules in self._users.values():
            for module in modules:
                hooks = module._forward_hooks
                for key in [key for key, hook in hooks.items() if isinstance(hook, _Adding) and hook.owner is self._mark]:
                    del hooks[key]
        for product in products:
            for module in self._users[id(product.weight)]:
                module.register_forward_hook(_Adding(product, self._mark))


class _Adding:
    """A hook that adds a product to a layer's output. `owner` identifies it, so that `show` finds all of its own hooks."""

    def __init__(self, product: AddedProduct, owner: object) -> None:
        self._product, self.owner = product, owner

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        added: Tensor = self._product.layout.product(inputs[0], self._product.values)
        return output + added.to(output.dtype)


def product(name: str, weight: Tensor, terms: list[tuple[SparseTensor, float]], method: Method) -> AddedProduct:
    """The product that the method makes of (delta, strength) pairs, in float32. Raises AdapterError if it overflows."""
    indices, values = combine_deltas(name, terms, torch.float32, method)
    if not all_finite(values):
        raise overflow(name, values.dtype)
    rows, columns = shape_of(weight)
    return AddedProduct(weight, SparseLayout(indices.to(weight.device), (rows, columns)), values.to(weight.device))
