"""Quantized weights: how to recognize them, their shape and their values. They cannot be written in place.

bitsandbytes keeps four bits an entry in a flat `Params4bit`. torchao keeps a tensor subclass whose dtype is floating point.
Neither library is imported before such a weight exists. Where one exists, its library is installed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..sparse.tensor import dtype_name
from .distributed import is_sharded
from .undo import Undo

__all__ = ["dense", "dtype_label", "is_quantized", "is_wrapper", "keep_differentiable", "shape_of"]


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight's entries are stored as codes, by bitsandbytes in 4 bits or by torchao."""
    return _of_bitsandbytes(weight) or _of_torchao(weight)


def is_wrapper(weight: Tensor) -> bool:
    """Whether a weight has no memory of its own, because it consists of other tensors. A weight in pieces is no such one."""
    return hasattr(weight, "__tensor_flatten__") and not is_sharded(weight)


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The shape of the tensor that a weight stands for, however it is stored. In ZeRO-3 the parameter itself is empty."""
    return tuple(_state(weight).shape if _of_bitsandbytes(weight) else getattr(weight, "ds_shape", weight.shape))


def dtype_label(weight: Tensor) -> str:
    """The name of a weight's dtype in metadata and messages: "bfloat16", "nf4", "Int8Tensor"."""
    if _of_bitsandbytes(weight):
        return str(_state(weight).quant_type)
    return type(weight).__name__ if _of_torchao(weight) else dtype_name(weight.dtype)


@torch.no_grad()
def dense(weight: Tensor) -> Tensor:
    """The values that a weight stands for: a new tensor if it is quantized, else the weight itself, detached."""
    values: Tensor
    if _of_bitsandbytes(weight):
        from bitsandbytes.functional import dequantize_4bit

        values = dequantize_4bit(*_canonical(weight))
    elif _of_torchao(weight):
        values = weight.dequantize()
    else:
        return weight.detach()
    return values.contiguous()


def keep_differentiable(model: nn.Module, undo: Undo) -> None:
    """Make bitsandbytes' layers pass gradients to their inputs, until `undo`.

    On CPUs with AVX512-BF16 an evaluation permanently repacks a layer's codes, with scales rounded to bfloat16, for a product
    without a backward pass. The layers before it would then silently train on a part of their gradient.
    """
    for module in model.modules():
        layer: Any = module
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            weight = layer.weight
            if _is_packed(weight):
                weight.data, weight.quant_state = _canonical(weight)
            undo.callback(setattr, layer, "support_avx512bf16_for_cpu", True)
            layer.support_avx512bf16_for_cpu = False


def _canonical(weight: Any) -> tuple[Tensor, Any]:
    """bitsandbytes' codes and their description, in the order before any repacking."""
    codes, state = weight.detach().as_subclass(Tensor), weight.quant_state
    if not _is_packed(weight):
        return codes, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # the inverse would quantize the scales again
    codes, state = _convert_weight_packed_for_cpu_inverse(codes, state)
    state.absmax = scales
    return codes, state


def _is_packed(weight: Any) -> bool:
    """Whether bitsandbytes has repacked a weight for its product on the CPU."""
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def _of_bitsandbytes(weight: Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _of_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"


def _state(weight: Any) -> Any:
    """bitsandbytes' description of a weight."""
    return weight.quant_state
