"""The layers of a LoRA file as the file has them, beside what Diffusers has made of them in a pipeline.

Diffusers takes a file as well as it can. Layers that the pipeline does not have are dropped with a warning, and with names of
kohya's the scale of a layer (alpha / rank) may be that of others. Here both are found, by content, not by names: so it holds
for all names that Diffusers knows.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..files.paths import open_regular
from ..files.tensorfiles import read_header, read_tensor, whole_file
from ..sparse.tensor import fingerprint
from ..texts import shown

__all__ = ["LoraLayer", "as_in_the_file", "check_encoders", "layers_of"]

DOWN = re.compile(r"(.*)(lora\w*?[._])(down|A)\b(.*)")
UP = {"down": "up", "A": "B"}
OTHER_KINDS = {  # what a tensor's name says of the kind of a layer, which is not supported
    "DoRA with dora_scale": re.compile(r"[.]dora_scale$"),
    "LoHa": re.compile(r"[.]hada_(w|t)"),
    "LoKr": re.compile(r"[.]lokr_(w|t)"),
    "OFT": re.compile(r"[.]oft_(blocks|diag)"),
    "(IA)³": re.compile(r"[.]on_input$"),
    "a full difference of weights": re.compile(r"[.](diff|diff_b|w_norm|b_norm)$"),
    "LoCon with lora_mid": re.compile(r"[.]lora_mid[.]"),
}
METADATA = "lora_adapter_metadata"  # in which Diffusers keeps ranks and scales
TEXT_ENCODERS = re.compile(r"(lora_te(\d?)_|text_encoder(_\d)?[.])")
TWO_KINDS = (".lora.down.", ".lora_A.")  # Diffusers' older names and PEFT's, which its own scripts mix
ERROR = 5e-4  # of ‖ΔW‖², by rounding to the dtype of a pipeline


class LoraLayer(NamedTuple):
    """One layer of a file, whose change is scale · up · down. scale: None if the file's metadata say it, not its tensors."""

    down: Tensor
    up: Tensor
    scale: float | None


def layers_of(path: Path) -> dict[str, LoraLayer]:
    """Name -> layer of a LoRA file, by the names in the file.

    Raises DataError if it is no whole safetensors file, or no LoRA of finite numbers, or if it has layers of another kind.
    """
    with open_regular(path, DataError) as file, whole_file(path, DataError):
        entries, metadata = read_header(file, any_dtype=False)
        tensors = {name: read_tensor(file, entry) for name, entry in entries.items()}
    for kind, pattern in OTHER_KINDS.items():
        if (found := next(filter(pattern.search, tensors), None)) is not None:
            raise DataError(f"{path}: {kind} is not supported, found tensor {shown(found)}; give a LoRA")
    layers = {}
    for name, down in tensors.items():
        if (parts := DOWN.fullmatch(name)) is None or parts[4].endswith("bias"):
            continue
        other = f"{parts[1]}{parts[2]}{UP[parts[3]]}{parts[4]}"
        if (up := tensors.get(other)) is None:
            raise DataError(f"{path}: {shown(name)} needs {shown(other)}, which is not there; get the file again")
        layer = parts[1].rstrip("._")
        alpha = tensors.get(f"{layer}.alpha", torch.tensor(float(down.shape[0]) if down.ndim else 1.0))
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or alpha.numel() != 1:
            raise DataError(
                f"{path}: expected two matrices or convolutions of one rank and a number alpha, found {shown(name)} "
                f"{list(down.shape)}, {shown(other)} {list(up.shape)}, alpha {list(alpha.shape)}; get the file again"
            )
        if not all(bool(each.isfinite().all()) for each in (down, up, alpha)):
            raise DataError(f"{path}: {shown(name)}, {shown(other)} or alpha holds NaN or infinity; take an earlier checkpoint")
        layers[layer] = LoraLayer(down, up, None if METADATA in metadata else float(alpha) / down.shape[0])
    if not layers:
        raise DataError(
            f"{path} holds no LoRA: expected tensors such as NAME.lora_down.weight, found {shown(list(tensors)[:3])}"
        )
    if not any(bool(layer.up.any()) and bool(layer.down.any()) and layer.scale != 0 for layer in layers.values()):
        raise DataError(f"{path}: the LoRA changes nothing, all of its {len(layers)} layers are zero; it was not trained")
    return layers


def check_encoders(path: Path, layers: Mapping[str, LoraLayer], components: Mapping[str, nn.Module]) -> None:
    """Raise DataError if a layer belongs to a text encoder that the pipeline does not have."""
    for layer in layers:
        if found := TEXT_ENCODERS.match(layer):
            number = found[2] or (found[3] or "").removeprefix("_")
            name = "text_encoder" + (f"_{number}" if number not in ("", "1") else "")
            if name not in components:
                raise DataError(
                    f"{path} changes {name}, which this pipeline does not have: {shown(layer)}; found "
                    f"{', '.join(components)}; give the pipeline that it was trained on"
                )


def as_in_the_file(path: Path, layers: Mapping[str, LoraLayer], model: nn.Module, name: str) -> None:
    """Give the layers of PEFT in a model the scales of the file, and check that all of the file is in them.

    name: of PEFT's adapter. Raises DataError, which names layers of the file, if the model lacks some, or if they are not what
    they are in the file.
    """
    left, others = dict(layers), []  # others: what Diffusers has changed, cut into several or scaled
    known: dict[torch.dtype, dict[str, list[str]]] = {}  # dtype -> content -> names of layers
    for module in model.modules():
        for downs, ups in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if name not in getattr(module, downs, {}):
                continue
            down, up = (getattr(each, "weight", each).detach() for each in (getattr(module, key)[name] for key in (downs, ups)))
            scaling: Any = module.scaling
            if down.dtype not in known:
                known[down.dtype] = _by_content(layers, down.dtype)
            if same := known[down.dtype].get(_content(down, up)):
                scale = left.pop(same.pop()).scale
                scaling[name] = scaling[name] if scale is None else scale
            else:
                others.append(LoraLayer(down, up, scaling[name]))
    by_metadata = any(layer.scale is None for layer in left.values())
    wanted, there = (sum(_square(each, by_metadata) for each in some) for some in (left.values(), others))
    if not math.isclose(wanted, there, rel_tol=ERROR):
        few = ", ".join(shown(each) for each in list(left)[:3]) + ", …" * (len(left) > 3)
        with open_regular(path, DataError) as file:
            names = list(read_header(file)[0])
        advice = "give the pipeline that it was trained on"
        if all(any(kind in each for each in names) for kind in TWO_KINDS):
            advice = "it reads names of one kind, and here are two: rename .lora.down. to .lora_A., and .lora.up. to .lora_B."
        raise DataError(
            f"{len(layers) - len(left)} of {len(layers)} layers of {path} belong to this pipeline as they are; Diffusers drops "
            f"or changes the others: {few}; {advice}"
        )


def _by_content(layers: Mapping[str, LoraLayer], dtype: torch.dtype) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(_content(layer.down.to(dtype), layer.up.to(dtype)), []).append(name)
    return found


def _content(down: Tensor, up: Tensor) -> str:
    return fingerprint(down) + fingerprint(up)


def _square(layer: LoraLayer, unscaled: bool) -> float:
    """‖scale · up · down‖², from products as small as the rank."""
    down, up = layer.down.double().flatten(1), layer.up.double().flatten(1)
    scale = 1.0 if unscaled or layer.scale is None else layer.scale
    return scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
