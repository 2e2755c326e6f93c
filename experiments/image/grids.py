"""Pictures side by side, in one PNG."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Picture = npt.NDArray[np.uint8]  # [side, side, 3]


def grid(pictures: Sequence[Picture], columns: int, scale: int = 2, gap: int = 2, titles: Sequence[str] = ()) -> Image.Image:
    """The pictures in rows, enlarged without smoothing. titles: one for each row, written left of it."""
    side = len(pictures[0])
    rows = -(-len(pictures) // columns)
    cell = side * scale + gap
    left = 8 + max((ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(t) for t in titles), default=-8)
    sheet = Image.new("RGB", (int(left) + columns * cell + gap, rows * cell + gap), (225, 225, 225))
    for i, pixels in enumerate(pictures):
        large = Image.fromarray(pixels).resize((side * scale, side * scale), Image.Resampling.NEAREST)
        sheet.paste(large, (int(left) + gap + i % columns * cell, gap + i // columns * cell))
    for row, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((4, row * cell + cell // 2 - 6), title, fill="black")
    return sheet
