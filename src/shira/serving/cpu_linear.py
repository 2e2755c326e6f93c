"""The product of linear layers in float32 on CPUs: oneDNN's, with the weights as they are, so that they can be switched.

`torch.nn.functional.linear` takes the BLAS that torch was built with, which is slow on some processors (docs/serving.md has
figures). In half precision it takes oneDNN itself.
"""

from types import MethodType

import torch
from torch import Tensor, nn

__all__ = ["linear", "take_onednn"]

ONEDNN = torch.backends.mkldnn.is_available()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [..., columns] · weightᵀ + bias, as `torch.nn.functional.linear`, without gradients. weight: [rows, columns]."""
    if input.dtype is torch.float32 is weight.dtype and input.device.type == "cpu":
        product: Tensor = (
            torch.ops.shira.cpu_linear(input, weight, bias) if torch.compiler.is_compiling() else _product(input, weight, bias)
        )
        return product
    return nn.functional.linear(input, weight, bias)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    plain = ONEDNN and weight.ndim == 2 and weight.is_contiguous() and input.numel() and not torch.is_autocast_enabled("cpu")
    if not plain or (
        bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous() or bias.dtype != input.dtype)
    ):
        return nn.functional.linear(input, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


# torch.compile takes oneDNN's operator for a product with a packed constant, so it sees one of ours
torch.library.define("shira::cpu_linear", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("shira::cpu_linear", "CPU", _product)


@torch.library.register_fake("shira::cpu_linear")  # type: ignore[untyped-decorator]
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def take_onednn(model: nn.Module) -> None:
    """Let the plain linear layers of a model that is only served compute by `linear`. They read their weights at each call."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)
