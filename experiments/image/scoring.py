"""How many generated emoji a classifier recognises, how far they are from the real ones, and how clean their ground is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import classifier

HELD_OUT_SEED = 10_000  # of changes that the classifier was not trained on


def measured(model: torch.nn.Module, made: Tensor, real: Tensor, concepts: Sequence[int]) -> dict[str, float]:
    """made, real: [n, 3, side, side] from -1 to 1. Shares from 0 to 1; differences in units of 0 to 255.

    recognised: share that the classifier names rightly. nearest: share whose nearest real picture, by pixels, is the right one.
    ground: mean difference from white where the real picture is white. colour: mean difference elsewhere.
    """
    right = real[list(concepts)]
    white = (right > 0.99).all(1, keepdim=True).expand_as(right)
    distance = (made - right).abs() * 127.5
    nearest = torch.cdist(made.flatten(1), real.flatten(1)).argmin(1).tolist()
    return {
        "recognised": sum(classifier.recognised(model, made, concepts)) / len(made),
        "nearest": sum(a == b for a, b in zip(nearest, concepts, strict=True)) / len(made),
        "ground": float(distance[white].mean()),
        "colour": float(distance[~white].mean()),
    }


def on_real(model: torch.nn.Module, real: Tensor, repeats: int = 5) -> dict[str, float]:
    """The classifier's accuracy on the real pictures, and on changed ones of other random draws."""
    concepts = list(range(len(real)))
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    changes = [sum(classifier.recognised(model, classifier.changed(real, generator), concepts)) for _ in range(repeats)]
    plain = sum(classifier.recognised(model, real, concepts))
    return {"real": plain / len(real), "changed": sum(changes) / (repeats * len(real))}


def add(path: Path, line: dict[str, Any]) -> None:
    """Append a result as a line of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}) + "\n")
