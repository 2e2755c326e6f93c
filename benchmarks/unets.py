"""Pipelines with the UNets of SD-1.5 and SDXL in random weights, and adapters for them, as files: LoRA's and shira's."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import shira

from .switch import random_positions

__all__ = [
    "ATTENTION",
    "CONVOLUTIONS",
    "SD15",
    "SDXL",
    "SMALL",
    "SMALL_XL",
    "inputs",
    "lora_file",
    "pipeline",
    "shira_file",
    "weights",
]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # what Diffusers' own training scripts target
CONVOLUTIONS = ["conv1", "conv2"]
SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # the rest of SD-1.5 are the class's defaults
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
SMALL = SD15 | {"block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32}
SMALL_XL = SDXL | {"block_out_channels": (32, 32, 64), "attention_head_dim": 4, "transformer_layers_per_block": (1, 1, 2)}


def pipeline(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """A pipeline with a UNet of this configuration and dtype, in random values; with a tiny VAE, and without text encoders.

    Only a million values are drawn, and repeated. Each output of a layer has about the spread of its input.
    """
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config)
    unet = unet.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    drawn = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))  # no multiple of a layer's size: layers differ
    start = 0
    for name, parameter in unet.named_parameters():
        if parameter.dim() == 1:  # of norms, and biases
            parameter.fill_(float(name.endswith("weight")))
            continue
        pool = (drawn.roll(-start) * math.sqrt(parameter.shape[0] / parameter.numel())).to(dtype)
        for part in parameter.view(-1).split(pool.numel()):
            part.copy_(pool[: part.numel()])
        start = (start + parameter.numel()) % drawn.numel()
    parts: dict[str, Any] = {"vae": diffusers.AutoencoderKL(block_out_channels=(32,)), "text_encoder": None, "tokenizer": None}
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    if "addition_embed_type" in config:
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, unet=unet, scheduler=scheduler, add_watermarker=False
        )
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **nothing, unet=unet, scheduler=scheduler)


def weights(unet: nn.Module, targets: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The path and the weight of each layer whose path ends with a target."""
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(path.endswith(f".{target}") for target in targets):
            yield path, layer.weight


def inputs(unet: Any, side: int, batch: int = 1, tokens: int = 77) -> dict[str, Any]:
    """What a UNet takes in a call: latents of side x side, a step, a text of so many tokens, and what SDXL adds to it."""
    generator = torch.Generator().manual_seed(0)
    config, dtype = unet.config, unet.dtype
    found: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, side, side, generator=generator).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, tokens, config.cross_attention_dim, generator=generator).to(dtype),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, generator=generator).to(dtype),
            "time_ids": torch.ones(batch, 6, dtype=dtype),
        }
    return found


def lora_file(unet: Any, rank: int, seed: int, path: Path) -> int:
    """Write a LoRA of attention in the form of `save_lora_weights`, in the UNet's dtype. Returns its number of parameters."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights(unet, ATTENTION):
        down = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1]
        tensors[f"unet.{name}.lora_A.weight"] = down.to(weight.dtype)
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator).to(weight.dtype) * 0.1
    save_file(tensors, path, {"format": "pt"})
    return sum(map(Tensor.numel, tensors.values()))


def shira_file(unet: Any, rank: int, density: float | None, seed: int, path: Path) -> int:
    """Write an adapter of attention at random positions: a density, or as many as a LoRA of this rank has parameters.

    Returns the number of its entries.
    """
    tensors, prints = {}, {}
    for number, (name, weight) in enumerate(weights(unet, ATTENTION)):
        share = density or rank * sum(weight.shape) / weight.numel()
        where = random_positions(weight.numel(), share, 1000 * seed + number)
        base = weight.view(-1).index_select(0, where)
        change = torch.randn(where.numel(), generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
        tensors[f"unet.{name}.weight"] = shira.SparseTensor(tuple(weight.shape), where, base + 0.1 * base.std() * change)
        prints[f"unet.{name}.weight"] = shira.sparse.tensor.fingerprint(base)
    adapter = shira.Adapter(tensors, {"fingerprints": prints})
    adapter.save(path)
    return sum(tensor.indices.numel() for tensor in tensors.values())
