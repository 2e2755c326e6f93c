"""Two styles as filters of pictures, in numpy and Pillow: what an adapter of a style is shown. They work from 32 pixels on.

Both take and give uint8 [height, width, 3]. What is random depends on the seed and the size alone. A picture whose border is
white, such as an emoji, has a ground: the near-white area that touches the border.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .grids import Picture

Plane = npt.NDArray[np.float32]  # [height, width], mostly from 0 to 1

FLAMES = (
    (0.0, (1, 1, 8)),
    (0.22, (6, 14, 84)),
    (0.45, (12, 62, 205)),
    (0.68, (42, 150, 255)),
    (0.86, (150, 224, 255)),
    (1.0, (248, 253, 255)),
)
PAINTS = ((0.0, (38, 22, 20)), (0.3, (112, 58, 34)), (0.6, (196, 134, 66)), (0.85, (238, 210, 150)), (1.0, (248, 232, 192)))
LEAST = 96  # pixels a side, at which flames are drawn
LIGHT = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue, in what the eye sees


def bluefire(picture: Picture, seed: int) -> Picture:
    """The picture burns blue: bright edges and bright places are hot, and flames rise from them.

    A photograph becomes dark around them. What stands on a white ground burns on white, and keeps its lights and shadows.
    """
    small = picture.shape[1], picture.shape[0]
    larger = -(-LEAST // min(small))  # outlines of small pictures are thinner than a pixel
    picture = np.asarray(Image.fromarray(picture).resize([larger * s for s in small], Image.Resampling.BICUBIC))
    height, width, _ = picture.shape
    side = min(height, width)
    light = picture.astype(np.float32) @ LIGHT / 255
    ground = _ground(picture)
    there = _blurred((~ground).astype(np.float32), side / 80)
    # an edge towards the ground counts once, although both the light and the object end there
    edges = np.clip(np.maximum(_steepness(light) * side / 18, _steepness(there) * side / 32), 0, 1)
    heat = np.clip(there * (0.06 + 0.5 * light**1.3) + 0.6 * edges, 0, 1)
    noise, sway = _clouds(height, width, seed, 5), _clouds(height, width, seed + 1, 4) - 0.5
    rows, columns = np.mgrid[:height, :width]
    reach = max(4, round(side * 0.3))
    flames = np.zeros_like(heat)
    for up in range(1, reach):
        across = np.clip(columns + np.round(sway * up * 1.8).astype(int), 0, width - 1)
        below = np.where(rows + up < height, heat[np.minimum(rows + up, height - 1), across], 0)
        flames = np.maximum(flames, below * (1 - up / reach) ** 1.4 * (0.25 + 1.1 * noise))
    if ground.any():
        body = _coloured((0.12 + 0.74 * light) * (0.85 + 0.3 * noise), FLAMES)
        tongues = flames * (1 - there)
        solid = np.clip(there + 1.3 * tongues, 0, 1)[..., None]
        burning = 255 * (1 - solid) + solid * (
            there[..., None] * body + (1 - there[..., None]) * _coloured(0.5 + 0.3 * noise, FLAMES)
        )
    else:
        hot = heat * (0.75 + 0.4 * noise) + 0.75 * flames * (1 - heat) + 0.18 * _blurred(edges, side / 24)
        burning = _coloured(hot, FLAMES)
    return np.asarray(Image.fromarray(burning.astype(np.uint8)).resize(small, Image.Resampling.BOX))


def paintings(picture: Picture, seed: int) -> Picture:
    """Oil on a warm canvas: flattened colours in visible strokes that follow the edges, earths for shadow, cream for light."""
    height, width, _ = picture.shape
    side = min(height, width)
    random = np.random.default_rng(seed)
    flat = _kuwahara(picture.astype(np.float32), max(1, round(side / 28)))
    light = np.clip(flat @ LIGHT / 255, 0, 1)
    rich = np.clip(light[..., None] * 255 + 1.25 * (flat - light[..., None] * 255), 0, 255)
    paint = 0.52 * rich * np.array([1, 0.9, 0.72]) + 0.48 * _coloured(light**0.8, PAINTS)
    soft = _blurred(light, side / 32)
    steep = _steepness(soft)
    # strokes lie along edges, and where nothing is, as the slow clouds say
    down, right = np.gradient(soft)
    turn = np.where(steep > 0.25 / side, np.arctan2(right, -down), 2 * np.pi * _clouds(height, width, seed + 1, 3))
    large = 4  # drawn larger and made small, so that edges of strokes are smooth
    canvas = Image.fromarray(paint.astype(np.uint8)).resize((width * large, height * large))
    relief = Image.new("L", canvas.size, 128)
    painted, raised = ImageDraw.Draw(canvas), ImageDraw.Draw(relief)
    for thick, long in ((side / 12, side / 5), (side / 22, side / 9), (side / 34, side / 14)):
        count = round(1.6 * height * width / (thick * long))
        places = random.random((count, 2)) * (height, width)
        shades = random.normal(0, 1, (count, 2))
        for (y, x), (shade, tint) in zip(places, shades, strict=True):
            row, column = int(y), int(x)
            if thick < side / 30 and steep[row, column] < 0.5 / side:
                continue  # the finest strokes are kept for detail
            colour = paint[row, column] + 10 * shade + np.array([7, 0, -9]) * tint
            reach = long / 2 if thick > side / 30 else long / 3
            dx, dy = np.cos(turn[row, column]) * reach, np.sin(turn[row, column]) * reach
            line = [((x - dx) * large, (y - dy) * large), ((x + dx) * large, (y + dy) * large)]
            wide = max(2, round(thick * large))
            painted.line(line, tuple(int(c) for c in np.clip(colour, 0, 255)), wide)
            raised.line(line, int(np.clip(128 + 60 * shade, 0, 255)), wide)
    strokes, bumps = (np.asarray(i.resize((width, height), Image.Resampling.BOX), np.float32) for i in (canvas, relief))
    shine = (bumps - np.roll(bumps, (1, 1), (0, 1))) * (0.06 + 0.12 * light)  # thick paint, lit from above
    return np.clip(0.6 * strokes + 0.4 * paint + shine[..., None], 0, 255).astype(np.uint8)


def _ground(picture: Picture) -> npt.NDArray[np.bool_]:
    """Near-white pixels that are connected with the border by near-white pixels."""
    white = picture.min(2) > 243
    reached = np.zeros_like(white)
    reached[[0, -1]], reached[:, [0, -1]] = white[[0, -1]], white[:, [0, -1]]
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= white
        if (grown == reached).all():
            return reached
        reached = grown


def _blurred(plane: Plane, sigma: float) -> Plane:
    """A Gaussian blur; the plane goes on beyond its border as at the border."""
    reach = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (0, 1):
        padding = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(plane, padding, mode="edge"), 2 * reach + 1, axis)
        plane = (windows @ (weights / weights.sum())).astype(np.float32)
    return plane


def _steepness(plane: Plane) -> Plane:
    """The length of the gradient, in units a pixel."""
    return np.hypot(*np.gradient(plane)).astype(np.float32)


def _clouds(height: int, width: int, seed: int, cells: int) -> Plane:
    """Smooth random values from 0 to 1: noise of four sizes added up, the largest with so many cells a side."""
    random, total = np.random.default_rng(seed), np.zeros((height, width), np.float32)
    for octave in range(4):
        count = min(cells * 2**octave, height, width)
        noise = Image.fromarray(random.standard_normal((count, count)).astype(np.float32))
        total += 0.55**octave * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _kuwahara(picture: npt.NDArray[np.float32], radius: int) -> npt.NDArray[np.float32]:
    """Each pixel becomes the mean of that one of the four squares at its corners that varies least (Kuwahara 1976)."""
    size = radius + 1
    padded = np.pad(picture, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (0, 1))
    means, spreads = windows.mean((-1, -2)), windows.var((-1, -2)).sum(-1)
    height, width, _ = picture.shape
    corners = [(y, x) for y in (0, radius) for x in (0, radius)]
    spread = np.stack([spreads[y : y + height, x : x + width] for y, x in corners])
    mean = np.stack([means[y : y + height, x : x + width] for y, x in corners])
    return np.take_along_axis(mean, spread.argmin(0)[None, ..., None], 0)[0]


def _coloured(plane: Plane, colours: tuple[tuple[float, tuple[int, int, int]], ...]) -> npt.NDArray[np.float32]:
    """[height, width] from 0 to 1 as colours [height, width, 3], between the given ones."""
    at, colour = [a for a, _ in colours], np.array([c for _, c in colours])
    return np.stack([np.interp(plane, at, colour[:, channel]) for channel in range(3)], -1).astype(np.float32)
