"""Sparse entries and a low-rank product, trained together (RoSA, arXiv 2401.04679): W + S + upᵀ · down.

The product is dense, so what was trained is no sparse adapter. Two things can be had of it: the nearest sparse adapter, which
has the sum's entries at the mask's positions and says what share of the change they hold; or both parts, exactly: S as an
adapter and the product as a LoRA in PEFT's format.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...adapter import Adapter
from ...files.tensorfiles import write_whole
from ...sparse.tensor import SparseTensor
from ..following import Held
from ..masters import Masters
from .factors import Factors

__all__ = ["Hybrid", "kept", "save"]


class Hybrid(Masters):
    """Masters of a linear layer's weight, and a low-rank product beside it."""

    def __init__(
        self,
        name: str,
        weight: nn.Parameter,
        indices: Tensor,
        matrix: tuple[int, int],
        rank: int,
        seed: int,
        outputs: int,
    ) -> None:
        """outputs: along which side of the matrix the outputs lie, 0, or 1 for Transformers' Conv1D."""
        super().__init__(name, weight, indices, matrix)
        self.outputs = outputs
        self.factors = Factors(matrix, rank, seed, weight.device)
        self.side = self._product
        self.written = self.version

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"": self.values, **self.factors.parameters()}

    def _are_float32(self) -> bool:
        return all(parameter.dtype is torch.float32 for parameter in self.parameters().values())

    def _product(self, input: Tensor) -> Tensor:
        first, second = self._inner_and_outer()
        return linear(linear(input, first.to(input.dtype)), second.T.to(input.dtype))

    def _inner_and_outer(self) -> tuple[Tensor, Tensor]:
        """The factor that meets the input [rank, in], and the other [rank, out]."""
        up, down = self.factors.up, self.factors.down
        return (up, down) if self.outputs else (down, up)

    def held(self) -> Held:
        """The sum's entries at the mask's positions."""
        alone = super().held()
        values = self.values.detach() + self.factors.at(self.indices).detach()
        return alone._replace(values=values.to(self.weight.dtype))

    def sparse(self) -> SparseTensor:
        """S alone, as the weight has it."""
        return SparseTensor(tuple(self.weight.shape), self.indices.cpu(), self.rounded().cpu())

    def lora(self) -> dict[str, Tensor]:
        """PEFT's A [rank, in] and B [out, rank]."""
        first, second = self._inner_and_outer()
        return {
            "lora_A.weight": first.detach().cpu().clone(),
            "lora_B.weight": second.detach().T.contiguous().cpu().clone(),
        }

    def change(self) -> tuple[float, float]:
        """‖S + upᵀ · down‖² at the mask's positions, and of all."""
        product = self.factors.at(self.indices).detach().double()
        total = self.values.detach().double() - self.base.double() + product
        inside = float(total.square().sum())
        return inside, inside + max(0.0, self.factors.squares() - float(product.square().sum()))


def kept(masters: Mapping[str, Masters]) -> dict[str, Any] | None:
    """For the metadata: what share of the squared change the adapter alone has; None if nothing was trained beside it."""
    hybrids = [each for each in masters.values() if isinstance(each, Hybrid)]
    if not hybrids:
        return None
    inside, everything = (sum(parts) for parts in zip(*(each.change() for each in hybrids), strict=True))
    return {"rank": hybrids[0].factors.up.shape[0], "kept": inside / everything if everything else 1.0}


def save(folder: Path, adapter: Adapter, masters: Mapping[str, Masters]) -> None:
    """Write both parts of what was trained, each exact: adapter.safetensors and lora/, a LoRA as PEFT loads it.

    adapter: what the metadata of the sparse part are taken from.
    """
    hybrids = {name: each for name, each in masters.items() if isinstance(each, Hybrid)}
    (folder / "lora").mkdir(parents=True, exist_ok=True)
    parts = {name: each.sparse() for name, each in hybrids.items()}
    metadata = {key: value for key, value in adapter.metadata.items() if key != "low_rank"}
    Adapter(adapter.tensors | parts, metadata | {"beside": "lora"}).save(folder / "adapter.safetensors")
    rank = next(iter(hybrids.values())).factors.up.shape[0]
    modules = {name: name.removesuffix(".weight") for name in hybrids}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": (adapter.metadata.get("base") or {}).get("id"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(each.outputs for each in hybrids.values()),
        "target_modules": sorted(modules.values()),
        "inference_mode": True,
    }
    flat = {f"base_model.model.{modules[n]}.{key}": value for n, each in hybrids.items() for key, value in each.lora().items()}
    write_whole(folder / "lora" / "adapter_model.safetensors", safetensors.torch.save(flat, {"format": "pt"}))
    write_whole(folder / "lora" / "adapter_config.json", json.dumps(config, indent=2).encode())
