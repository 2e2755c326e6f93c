"""Draws the pictures of these pages: each mask at 9 % of a 48 × 48 corner of a real weight, the built-in model's tenth o_proj.

    python docs/masks/pictures.py

Grey is the weight's magnitude. Gradients and activations are of 64 examples of the built-in task `spam`.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from shira import masks
from shira.data.models import SMOLLM2
from shira.data.tasks import examples_of
from shira.integrations import transformers as hf
from shira.masks.calibration import calibrate

HERE, SIDE, DENSITY = Path(__file__).parent, 48, 0.09
NAME = "model.layers.9.self_attn.o_proj.weight"
BLUE, ORANGE, GREEN = (0.12, 0.37, 0.72), (0.90, 0.45, 0.05), (0.10, 0.60, 0.35)

OFFSET = "struct:frequency=16,diagonal=false,offset={}"

# page -> panels: title and one or two masks, drawn in blue and orange, what both train in green
PAGES = {
    "structured": [
        ("rows", "struct:frequency=16"),
        ("columns", "struct:direction=columns,frequency=16"),
        ("offsets 3 and 8, diagonal=false", OFFSET.format(3), OFFSET.format(8)),
    ],
    "uniform": [("rand, seed 0", "rand")],
    "magnitude": [("wm", "wm"), ("wm, bottom", "wm:bottom=true")],
    "gradient": [("grad", "grad"), ("snip", "snip"), ("fisher", "fisher")],
    "activation": [("wanda", "wanda"), ("wanda blue, wm orange, both green", "wanda", "wm")],
    "lowrank": [("lift, rank 4", "lift:rank=4"), ("lift blue, wm orange, both green", "lift:rank=4", "wm")],
    "patterns": [("block, 4 x 4 by snip", "block:by=snip,size=4"), ("nm, 1:8 by snip", "nm:by=snip,n=1,m=8")],
    "sets": [
        ("wm blue, snip orange, both green", "wm", "snip"),
        ("union", "union"),
        ("intersection", "intersection"),
        ("difference: snip without wm", "difference"),
    ],
}


def corner() -> dict[str, torch.Tensor]:
    """The weight's corner and what masks may ask for, float32."""
    model, tokenizer = hf.load_model(SMOLLM2), hf.load_tokenizer(SMOLLM2)
    batches = hf.batches(hf.encode(tokenizer, examples_of("spam", "train")[:64], 512), model, 16, tokenizer.pad_token_id or 0)
    weight, found = model.get_parameter(NAME), {}
    calibrate(model, {NAME: weight}, batches, found.__setitem__, statistics=masks.CALIBRATED)
    whole = {"weight": weight.detach().float()} | found[NAME]
    return {key: value[..., :SIDE][:SIDE].contiguous() for key, value in whole.items()}


def painted(inputs: dict[str, torch.Tensor], *chosen: str) -> np.ndarray:
    """An RGB picture of masks over the weight."""
    weight = inputs["weight"]
    k = masks.budget(tuple(weight.shape), density=DENSITY)
    calibrated = {key: value for key, value in inputs.items() if key != "weight"}
    picture = np.repeat(1 - 0.5 * (weight.abs() / weight.abs().quantile(0.99)).clamp(max=1).numpy()[..., None], 3, axis=2)
    hits = np.zeros((2, SIDE * SIDE), dtype=bool)
    for number, mask in enumerate(chosen):
        hits[number, masks.select(mask, NAME, weight, k, **calibrated)] = True
    for colour, where in ((BLUE, hits[0] & ~hits[1]), (ORANGE, hits[1] & ~hits[0]), (GREEN, hits[0] & hits[1])):
        picture[where.reshape(SIDE, SIDE)] = colour
    return picture


def main() -> None:
    inputs = corner()
    for page, panels in PAGES.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(2.7 * len(panels), 3), squeeze=False)
        for axis, (title, *chosen) in zip(axes[0], panels, strict=True):
            axis.imshow(painted(inputs, *chosen), interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        figure.tight_layout(pad=0.5)
        figure.savefig(HERE / f"{page}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
