"""What pictures of styles get: which style and which concept networks see in them, and how far they are from the real ones.

The networks are trained on real pictures in five styles: Google's (the base's), and the four of `styles`. For each picture of a
concept in a style that was held out, it is stated how often they are right.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shira.data.emoji import Emoji

from . import dino
from .classifier import kept, trained
from .emoji import concepts, pixels
from .grids import Picture as Pixels
from .styles import SEEN, STYLES, UNSEEN, styled

LOOKS = ("base", *STYLES)
HELD_OUT = 0.1  # share of the (concept, style) pairs that the networks are not trained on
SIMILAR_SIDE = 70  # pixels, to which pictures are enlarged for DINOv2
STEPS = {"style": 400, "concept": 2000}


@cache
def real_pictures(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All real pictures: [n, 3, side, side] from -1 to 1; the concept and look of each, int64 [n]; if it is held out."""
    found = [
        (made, number, look)
        for number, concept in enumerate(concepts(None))
        for look, style in enumerate(LOOKS)
        if (made := styled(concept, style, side)) is not None
    ]
    held = set(random.Random(0).sample(range(len(found)), round(HELD_OUT * len(found))))
    mask = torch.tensor([place in held for place in range(len(found))])
    return (
        pixels([made for made, _, _ in found]),
        *(torch.tensor(column) for column in list(zip(*found, strict=True))[1:]),
        mask,
    )


def judge(what: str, side: int, folder: Path, steps: int | None = None) -> nn.Sequential:
    """The network that names the "style" or the "concept" of a picture. It is kept in the folder."""
    classes = len(LOOKS) if what == "style" else len(concepts(None))
    steps = steps or STEPS[what]

    def train() -> nn.Sequential:
        pictures, concept, look, held = real_pictures(side)
        labels = look if what == "style" else concept
        return trained(pictures[~held], steps, labels=labels[~held], ground="border")

    return kept(folder / f"judge-{what}-{side}-{steps}.pt", classes, train)


@torch.no_grad()
def held_out_accuracy(what: str, model: nn.Module, side: int) -> dict[str, float]:
    """Look -> how often a judge is right about real pictures of it that the judge was not trained on; and "all" of them."""
    pictures, concept, look, held = real_pictures(side)
    labels = (look if what == "style" else concept)[held]
    right = (_answers(model, pictures[held]).argmax(1) == labels).float()
    found = {name: float(right[look[held] == place].mean()) for place, name in enumerate(LOOKS)}
    return {name: round(share, 4) for name, share in (found | {"all": float(right.mean())}).items()}


@torch.no_grad()
def _answers(model: nn.Module, pictures: Tensor) -> Tensor:
    return torch.cat([model(part) for part in pictures.split(256)])


@torch.no_grad()
def scores(
    made: Mapping[str, Sequence[Pixels]], judges: Mapping[str, nn.Module], targets: Mapping[str, Pixels | None]
) -> dict[str, Any]:
    """made: for each concept its pictures, one a seed. targets: the real picture of each concept in the wanted style.

    Returns for the concepts that adapters have seen, and for the others, means over the concepts with the half width of a 95 %
    interval over the seeds: "recognised", the share whose concept is named rightly; a share for each look; "distance", the
    mean difference from the real picture in that style, of 255; and "similarity", DINOv2's cosine to that picture.
    """
    number = {e.name: place for place, e in enumerate(concepts(None))}
    found: dict[str, Any] = {}
    for group, names in (("seen", SEEN), ("unseen", UNSEEN)):
        chosen = [name for name in names if name in made]
        if not chosen:
            continue
        flat_made = [picture for name in chosen for picture in made[name]]
        pictures = torch.stack([pixels(made[name]) for name in chosen])  # [concepts, seeds, 3, side, side]
        flat = pictures.flatten(0, 1)
        shape = pictures.shape[:2]
        right = torch.tensor([number[name] for name in chosen])[:, None]
        recognised = (_answers(judges["concept"], flat).argmax(1).view(shape) == right).float()
        looks = _answers(judges["style"], flat).argmax(1).view(shape)
        found[group] = {"recognised": _mean(recognised)}
        found[group] |= {look: _mean((looks == place).float()) for place, look in enumerate(LOOKS)}
        if all(targets.get(name) is not None for name in chosen):
            real = pixels([targets[name] for name in chosen])[:, None]  # type: ignore[misc]
            found[group]["distance"] = _mean((pictures - real).abs().mean((2, 3, 4)) * 127.5)
            drawn, wanted = (
                dino.features(np.stack(each), SIMILAR_SIDE) for each in (flat_made, [targets[name] for name in chosen])
            )
            found[group]["similarity"] = _mean((drawn.view(*shape, -1) * wanted[:, None]).sum(-1))
    return found


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean of values [concepts, seeds], and the half width of its 95 % interval over the seeds."""
    each = values.mean(0).tolist()
    half = 1.96 * statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
    return round(statistics.fmean(each), 4), round(half, 4)


def target_pictures(chosen: Sequence[Emoji], style: str, side: int) -> dict[str, Pixels | None]:
    """The real picture of each concept in a style."""
    return {e.name: styled(e, style, side) for e in chosen}
