"""Weights in a few bits, known by their own marks: their shape, their values, and that nobody may write to them in place.

bitsandbytes keeps four bits an entry in a flat `Params4bit`, torchao a tensor subclass that says it is floating point. Neither
is imported before there is such a weight: who has one has the library.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["dense", "is_quantized", "label", "shape_of"]


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight's entries are stored as codes, by bitsandbytes in 4 bits, or by torchao."""
    return _of_bitsandbytes(weight) or _of_torchao(weight)


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The shape of the matrix that a weight stands for, whatever way it is stored."""
    return tuple(_state(weight).shape if _of_bitsandbytes(weight) else weight.shape)


def label(weight: Tensor) -> str:
    """What metadata and messages call a weight's dtype: "bfloat16", "nf4", "Int8Tensor"."""
    if _of_bitsandbytes(weight):
        return str(_state(weight).quant_type)
    return type(weight).__name__ if _of_torchao(weight) else str(weight.dtype).removeprefix("torch.")


@torch.no_grad()
def dense(weight: Tensor) -> Tensor:
    """The values that a weight stands for: a new tensor if it is quantized, else itself, detached."""
    values: Tensor
    if _of_bitsandbytes(weight):
        from bitsandbytes.functional import dequantize_4bit

        values = dequantize_4bit(weight.detach().as_subclass(Tensor), _state(weight))
    elif _of_torchao(weight):
        values = weight.dequantize()
    else:
        return weight.detach()
    return values.contiguous()


def _of_bitsandbytes(weight: Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _of_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.partition(".")[0] == "torchao"


def _state(weight: Any) -> Any:
    """bitsandbytes' description of a weight."""
    return weight.quant_state
