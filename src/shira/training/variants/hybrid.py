"""Sparse entries and a low-rank product, trained together (RoSA, arXiv 2401.04679): W + S + upᵀ · down.

The product is dense, so the result is not a sparse adapter. There are two ways to save it. One is the nearest sparse adapter:
it has the sum's entries at the mask's positions, and records which share of the squared change they hold. The other has both
parts exactly: S as an adapter, and the product as a LoRA in PEFT's format.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor
from torch.nn.functional import linear

from ...adapter import Adapter
from ...errors import TuningError
from ...files.paths import AnyPath, destination, flush_folder, path_of, temporary_folder
from ...files.peft_files import CONFIG, WEIGHTS
from ...files.suggestions import ADAPTER, PEFT_PREFIX
from ...files.tensorfiles import write_whole
from ...sparse.tensor import SparseTensor
from ...weights.targets import Target
from ..following import Touched
from ..masters import Masters, Plain
from .factors import Factors

__all__ = ["Hybrid", "record", "save"]

FILES = (ADAPTER, f"lora/{WEIGHTS}", f"lora/{CONFIG}")


class Hybrid(Plain):
    """Plain masters of a linear layer's weight, and a low-rank product beside it."""

    low_rank: Factors

    def __init__(self, target: Target, indices: Tensor, rank: int, seed: int, scale: float = 1.0) -> None:
        super().__init__(target, indices, scale)
        self.low_rank = Factors(self.matrix_shape, rank, seed, self.weight.device)
        self.parameters |= self.low_rank.parameters()
        self.can_move = self.can_stay_near = False  # the product has neither positions nor base values

    def added(self, input: Tensor) -> Tensor:
        inner, outer = self.low_rank.inner_and_outer(self.output_dim)
        return linear(linear(input, inner.to(input.dtype)), outer.T.to(input.dtype))

    def touched(self) -> Touched:
        """The sum's entries at the mask's positions."""
        alone = super().touched()
        values = self.current().detach() + self.low_rank.at(self.indices).detach()
        return alone._replace(values=values.to(self.weight.dtype))


def record(masters: Mapping[str, Masters]) -> dict[str, Any] | None:
    """For the metadata: the rank, and the share of the squared change that the sparse adapter holds. None without low_rank."""
    both = _both_parts(masters)
    if not both:
        return None
    inside, everything = (sum(parts) for parts in zip(*(_change(each, product) for each, product in both), strict=True))
    return {"rank": both[0][1].up.shape[0], "kept": inside / everything if everything else 1.0}


def _both_parts(masters: Mapping[str, Masters]) -> list[tuple[Masters, Factors]]:
    """(masters, product) for all masters with a low-rank product beside them."""
    return [(each, each.low_rank) for each in masters.values() if each.low_rank is not None]


def _change(masters: Masters, product: Factors) -> tuple[float, float]:
    """‖S + upᵀ · down‖² over the mask's positions, and over all entries."""
    at = product.at(masters.indices).detach().double()
    total = masters.current().detach().double() - masters.base.double() + at
    inside = float(total.square().sum())
    return inside, inside + max(0.0, product.squares() - float(at.square().sum()))


def save(path: AnyPath, adapter: Adapter, masters: Mapping[str, Masters]) -> None:
    """Write both parts of what was trained, each exact: adapter.safetensors, and lora/, a LoRA that PEFT can load.

    adapter: the nearest sparse adapter. Its metadata, and its tensors without a product beside them, go into the sparse part.
    All are written before the first replaces an older one. Raises TuningError for what is no path; OSError.
    """
    folder = path_of(path, "tuner.save_hybrid('both')", TuningError)
    both = _both_parts(masters)
    parts = {each.name: SparseTensor(tuple(each.weight.shape), each.indices.cpu(), each.rounded().cpu()) for each, _ in both}
    metadata = {key: value for key, value in adapter.metadata.items() if key != "low_rank"}
    rank = both[0][1].up.shape[0]
    flat = {}
    for each, product in both:
        inner, outer = product.inner_and_outer(each.output_dim)
        module = PEFT_PREFIX + each.name.removesuffix(".weight")
        flat[f"{module}.lora_A.weight"] = inner.detach().cpu().clone()  # [rank, in]
        flat[f"{module}.lora_B.weight"] = outer.detach().T.contiguous().cpu().clone()  # [out, rank]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": (adapter.metadata.get("base") or {}).get("id"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(each.output_dim for each, _ in both),
        "target_modules": sorted(each.name.removesuffix(".weight") for each, _ in both),
        "inference_mode": True,
    }
    (folder / "lora").mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as made:
        (made / "lora").mkdir()
        Adapter(adapter.tensors | parts, metadata | {"beside": "lora"}).save(made / FILES[0])
        write_whole(made / FILES[1], safetensors.torch.save(flat, {"format": "pt"}))
        write_whole(made / FILES[2], json.dumps(config, indent=2).encode())
        for name, target in [(name, destination(folder / name)) for name in FILES]:
            os.replace(made / name, target)
    flush_folder(folder / "lora")
    flush_folder(folder)
