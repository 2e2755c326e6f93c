"""The product of linear layers in float32 on CPUs: oneDNN's, with the weights as they are, so that they can be switched.

`torch.nn.functional.linear` takes the BLAS that torch was built with, which is slow on some processors (docs/serving.md has
figures). In half precision it takes oneDNN itself.
"""

from types import MethodType

import torch
from torch import Tensor, nn

__all__ = ["linear", "take_onednn"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [..., columns] · weightᵀ + bias, as `torch.nn.functional.linear`, without gradients. weight: [rows, columns]."""
    if input.dtype is torch.float32 is weight.dtype and input.device.type == "cpu" and input.numel() and weight.is_contiguous():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(input, weight, bias)


def take_onednn(model: nn.Module) -> None:
    """Let the plain linear layers of a model that is only served compute by `linear`. They read their weights at each call."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)
