"""The penalty of `Tuner.stay_near` for LoRA: elastic weight consolidation (Kirkpatrick et al., 2017, arXiv 1612.00796).

The penalty is on what the adapter changes in each weight, s·B·A, not on the factors. So both kinds of adapters have the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shira.masks.calibration import calibrate

__all__ = ["hold"]


def hold(tuned: Any, batches: Sequence[Any], reach: float) -> None:
    """Add the penalty's gradient to each gradient of LoRA's factors. `tuned`: PEFT's model before training, with one adapter.

    As in shira.training.stay_near, an entry of a weight's mean importance F is pulled as strongly as a typical gradient of the
    batches, once it has changed by `reach`.
    """
    layers = {name: module for name, module in tuned.named_modules() if hasattr(module, "lora_A")}
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    pulls: dict[str, Tensor] = {}

    def receive(name: str, statistics: Mapping[str, Tensor]) -> None:
        importance = statistics["squared_gradient"]
        pulls[name] = importance / (reach * importance.mean().sqrt())

    calibrate(tuned.get_base_model(), weights, batches, receive, statistics=["squared_gradient"])
    for name, layer in layers.items():
        (adapter,) = layer.lora_A
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        of_a, of_b = gradients(a, b, layer.scaling[adapter], pulls[name])
        a.register_hook(lambda gradient, own=of_a: gradient + own())
        b.register_hook(lambda gradient, own=of_b: gradient + own())


def gradients(
    a: nn.Parameter, b: nn.Parameter, scaling: float, pull: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Functions that return the gradients of ½ Σ pull · (s·B·A)² for A [r, in] and B [out, r], as they are now."""

    @torch.no_grad()
    def of_change() -> Tensor:
        change: Tensor = (b.float() @ a.float()).mul_(scaling**2).mul_(pull.to(a.device))
        return change

    return lambda: (b.detach().float().T @ of_change()).to(a.dtype), lambda: (of_change() @ a.detach().float().T).to(b.dtype)
