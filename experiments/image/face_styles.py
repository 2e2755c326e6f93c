"""Train a style on a generator, and measure what it draws: losses on unseen latents, colours and structure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import shira
from shira.data.packages import cache_folder
from shira.files.paths import temporary_file

from . import filters
from .dcgan import convolutions, drawn, latents
from .grids import Picture

STYLES = {"bluefire": filters.bluefire, "paintings": filters.paintings}
DENSITY, LAST = 0.02, 0.05  # the last layer has 3,072 weights: at 2 % of them struct has no room for one row
LOW_RANK = "low rank"
DIRECTIONS = 32  # along which colours are compared

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Faces:
    """Latents of faces, the generator's own pictures of them, and each style's pictures: [n, 3, side, side] from -1 to 1."""

    latents: Tensor
    base: list[Picture]
    styled: dict[str, Tensor]


def pixels(pictures: Sequence[Picture]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def faces(model: nn.Module, count: int, seed: int) -> Faces:
    """So many faces and their filtered pictures. A filter has one seed for all faces, so strokes are at the same places."""
    z = latents(count, seed)
    base = drawn(model, z)
    return Faces(z, base, {name: pixels([style(picture, 0) for picture in base]) for name, style in STYLES.items()})


def kept_faces(model: nn.Module, count: int, seed: int) -> Faces:
    """`faces`, which are kept in the cache until the filters change."""
    version = hashlib.sha256(Path(filters.__file__).read_bytes()).hexdigest()[:12]
    path = cache_folder() / "images" / "faces" / f"pictures-{count}-{seed}-{version}.pt"
    z = latents(count, seed)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = faces(model, count, seed).styled
        with temporary_file(path.parent) as (temporary, file):
            torch.save({name: ((y + 1) * 127.5).round().byte() for name, y in made.items()}, file)
            file.flush()
            temporary.replace(path)
    styled = {name: y.float() / 127.5 - 1 for name, y in torch.load(path, weights_only=True).items()}
    return Faces(z, drawn(model, z), styled)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The mean absolute difference between drawn and wanted pictures, of 2."""
    z, wanted = batch
    return (model(z) - wanted).abs().mean()


@torch.no_grad()
def held_out_loss(model: nn.Module, shown: Faces, style: str) -> float:
    wanted = shown.styled[style]
    parts = [float(loss_of(model, part)) * len(part[0]) for part in zip(shown.latents.split(16), wanted.split(16), strict=True)]
    return sum(parts) / len(wanted)


def batches(data: Faces, style: str, steps: int, size: int, seed: int) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(data.latents), (size,), generator=random) for _ in range(steps)]
    return [(data.latents[which], data.styled[style][which]) for which in drawn]


def descend(model: nn.Module, parameters: Sequence[nn.Parameter], data: Sequence[Batch], rate: float) -> None:
    """AdamW over the batches, with a rate that falls to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(data))
    for batch in data:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def trained(
    model: nn.Module,
    style: str,
    data: Sequence[Batch],
    held_out: Faces,
    mask: str,
    rate: float,
    avoid: Sequence[shira.Adapter] = (),
    reach: float | None = None,
    seed: int = 0,
) -> tuple[shira.Adapter, dict[str, Any]]:
    """An adapter of a style, and its loss on the held-out faces. The model is its base again, bit for bit.

    reach: hold the entries near the base (`Tuner.stay_near`), where the generator's own pictures are sensitive to them.
    """
    names = convolutions(model)
    settings: dict[str, Any] = {"targets": names, "density": DENSITY, "overrides": {names[-1]: LAST}}
    if mask in ("snip", "grad", "fisher"):
        settings["calibration"] = data[:8]
    with shira.attach(model, mask=mask, avoid=avoid, loss_fn=loss_of, seed=seed, **settings) as tuner:
        if reach is not None:
            tuner.stay_near(own_pictures(model, held_out.latents.shape[1]), reach=reach, loss_fn=loss_of)
        descend(model, tuner.parameters(), data, rate)
        result = {"loss": held_out_loss(model, held_out, style), "parameters": tuner.nnz}
        return tuner.adapter(style), result


@torch.no_grad()
def own_pictures(model: nn.Module, latent: int, count: int = 8, size: int = 8) -> list[Batch]:
    """Batches of the generator's own pictures with noise, which give its loss a gradient: at its own pictures it has none."""
    random = torch.Generator().manual_seed(2)
    z = [torch.randn(size, latent, generator=random) for _ in range(count)]
    own = [model(part) for part in z]
    return [(part, y + torch.randn(y.shape, generator=random)) for part, y in zip(z, own, strict=True)]


class LowRank(nn.Module):
    """W + BA, on the weight as a matrix [inputs, outputs · kernel]: LoRA (arXiv 2106.09685) written for this test."""

    def __init__(self, weight: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.down = nn.Parameter(torch.randn(rank, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def low_rank(
    model: nn.Module, style: str, data: Sequence[Batch], held_out: Faces, rate: float, seed: int = 0
) -> dict[str, Any]:
    """The loss of low-rank changes of the same weights, each of the largest rank that has no more parameters than entries."""
    model.requires_grad_(False)
    names, parameters = convolutions(model), []
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight
        budget = (LAST if name == names[-1] else DENSITY) * weight.numel()
        change = LowRank(weight.detach(), max(1, int(budget // sum(weight.flatten(1).shape))), seed)
        parametrize.register_parametrization(module, "weight", change)
        parameters += list(change.parameters())
    descend(model, parameters, data, rate)
    return {"loss": held_out_loss(model, held_out, style), "parameters": sum(p.numel() for p in parameters)}


def colour_distance(one: Tensor, other: Tensor) -> float:
    """Sliced Wasserstein distance between the colours of two sets of as many pictures, in units of 0 to 255.

    A quarter of the pixels is compared.
    """
    directions = torch.randn(3, DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    a, b = ((p[..., ::2, ::2].permute(0, 2, 3, 1).reshape(-1, 3) @ directions).sort(0).values for p in (one, other))
    return float((a - b).abs().mean() * 127.5)


def structure(made: Tensor, base: Tensor) -> float:
    """How well light and shade are kept: the mean correlation of the pictures' brightness with the base's, 1 at most."""
    light = torch.from_numpy(filters.LIGHT)
    a, b = ((p.permute(0, 2, 3, 1) @ light).flatten(1) for p in (made, base))
    return float(torch.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)).mean())


def measured(model: nn.Module, held_out: Faces) -> dict[str, float]:
    """What is drawn now: the distance of its colours to each style's, and how much of the structure is kept."""
    made, base = pixels(drawn(model, held_out.latents)), pixels(held_out.base)
    distances = {f"to_{name}": colour_distance(made, styled) for name, styled in held_out.styled.items()}
    return distances | {"structure": structure(made, base)}
