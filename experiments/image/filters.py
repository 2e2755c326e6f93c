"""Two styles that are computed, for pictures on white ground and for photographs: blue fire, and paint on canvas."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from .grids import Picture

Plane = npt.NDArray[np.float32]  # [height, width], from 0 to 1

FLAME = np.array([[2, 2, 14], [8, 22, 112], [22, 92, 238], [96, 204, 255], [246, 252, 255]], np.float32)  # cold to hot
CANVAS = np.array([242, 226, 194], np.float32)
STREAKS = 9  # directions of the brush


def bluefire(picture: Picture, seed: int = 0) -> Picture:
    """A picture, uint8 [height, width, 3], as if it burnt in blue on black. seed: of the flames.

    Edges and dark parts on a white ground glow, and flames rise from what stands out against the ground.
    """
    grey = _grey(picture)
    scale = min(grey.shape) / 64
    ground = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    colour = np.ptp(picture.astype(np.float32), axis=2) / 255
    thing: Plane = np.clip(np.maximum(1.5 * colour, 2.5 * np.abs(grey - ground)), 0, 1)
    edges = np.clip(ndimage.gaussian_gradient_magnitude(grey, 0.7 * scale) * 5 * scale, 0, 1)
    clouds = _clouds(grey.shape, seed)
    rows, columns = np.mgrid[: grey.shape[0], : grey.shape[1]].astype(np.float32)
    sway = (_clouds(grey.shape, seed + 1) - 0.5) * 1.2
    flames = np.zeros_like(grey)
    for height in np.linspace(0, 13 * scale, 14):  # what is `height` below a pixel sends fire up to it
        source = ndimage.map_coordinates(thing, [rows + height, columns + sway * height], order=1)
        flames = np.maximum(flames, source * (1 - height / (14 * scale)) ** 1.4 * (0.25 + 0.9 * clouds))
    body = thing * grey if ground > 0.5 else grey**1.3
    heat = np.clip(0.42 * flames + 0.5 * body * thing + 0.7 * edges * np.maximum(thing, 0.3), 0, 1)
    return np.stack([np.interp(heat, np.linspace(0, 1, len(FLAME)), FLAME[:, c]) for c in range(3)], -1).astype(np.uint8)


def paintings(picture: Picture, seed: int = 0) -> Picture:
    """A picture, uint8 [height, width, 3], in broad strokes of warm paint on canvas. seed: of strokes and canvas.

    A pixel takes the mean along that line through it which varies least, so strokes follow the shapes, and edges stay.
    """
    colours = picture.astype(np.float32)
    scale = min(colours.shape[:2]) / 64
    length = max(3, round(6 * scale))
    best, least = colours, np.full(colours.shape[:2], np.inf, np.float32)
    jitter = _clouds(colours.shape[:2], seed)
    for number in range(STREAKS):
        angle = np.pi * number / STREAKS
        steps = np.linspace(-length / 2, length / 2, length)
        lines = [
            ndimage.shift(colours, (np.sin(angle) * step, np.cos(angle) * step, 0), order=1, mode="nearest") for step in steps
        ]
        mean, spread = np.mean(lines, axis=0), np.std(lines, axis=0).sum(-1) * (0.7 + 0.6 * np.roll(jitter, 7 * number, 1))
        best = np.where((spread < least)[..., None], mean, best)
        least = np.minimum(least, spread)
    steps_of_paint = np.round(best / 36) * 36
    bristles = ndimage.gaussian_filter(
        np.random.default_rng(seed).standard_normal(colours.shape[:2]), (0.5 * scale, 1.6 * scale)
    )
    canvas = bristles / bristles.std() * 9
    painted = (0.65 * steps_of_paint + 0.35 * best) * CANVAS / 255 + canvas[..., None]
    return np.clip(painted, 0, 255).astype(np.uint8)


def _grey(picture: Picture) -> Plane:
    return (picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)) / 255


def _clouds(shape: tuple[int, ...], seed: int) -> Plane:
    """Smooth noise of several sizes, from 0 to 1."""
    random = np.random.default_rng(seed)
    total = np.zeros(shape, np.float32)
    for octave, weight in enumerate((1.0, 0.6, 0.35)):
        total += weight * _standard(ndimage.gaussian_filter(random.standard_normal(shape), min(shape) / 10 / 2**octave))
    return ((total - total.min()) / (total.max() - total.min())).astype(np.float32)


def _standard(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return values / values.std()
