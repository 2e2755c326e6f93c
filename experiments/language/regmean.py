"""RegMean (arXiv 2212.09849) for LoRAs: what `shira.switching.on_inputs` does for sparse adapters, over whole weights.

Here no entry is fixed, so all rows of a weight share one system. The result is dense: LoRA's factors cannot hold it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shira import Adapter, SparseTensor
from shira.masks.calibration import calibrate
from shira.switching.on_inputs import CROSS, RIDGE

__all__ = ["of_loras"]


@torch.no_grad()
def of_loras(tuned: Any, names: Sequence[str], inputs: Sequence[Sequence[Any]]) -> Adapter:
    """The fused weights as an adapter that overwrites all entries. tuned: PEFT's model. inputs: the batches of each LoRA.

    The changes are scaled as `fuse_on_inputs` scales them.
    """
    model = tuned.get_base_model()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    weights = {f"{name}.weight": layer.get_base_layer().weight for name, layer in layers.items()}
    products: dict[str, list[Tensor]] = {name: [] for name in weights}

    def receive(name: str, found: Mapping[str, Tensor]) -> None:
        products[name].append(found["products"])

    for name, batches in zip(names, inputs, strict=True):
        tuned.set_adapter(name)
        calibrate(model, weights, batches, receive, statistics=["products"])
    tensors = {}
    for name, layer in layers.items():
        tensor, weight = f"{name}.weight", weights[f"{name}.weight"]
        changes = [layer.get_delta_weight(each).float() for each in names]
        change = _solved(changes, products.pop(tensor))
        values = (weight.float() + change).to(weight.dtype).view(-1)
        tensors[tensor] = SparseTensor(tuple(weight.shape), torch.arange(values.numel()), values, "overwrite")
    return Adapter(tensors)


def _solved(changes: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
    """The fused change [out, in] of changes [out, in] with products [in, in]."""
    system, right, own = torch.zeros_like(products[0]), torch.zeros_like(changes[0]), 0.0
    for change, product in zip(changes, products, strict=True):
        size = torch.diagonal(product).clone()
        task = CROSS * product
        torch.diagonal(task).copy_(size)
        task /= size.mean()
        system += task
        right += change @ task
        own += float((change @ task * change).sum())
    torch.diagonal(system).add_(RIDGE * torch.diagonal(system).mean())
    found: Tensor = torch.cholesky_solve(right.T, torch.linalg.cholesky(system)).T
    return found * (own / float((found * right).sum()))
