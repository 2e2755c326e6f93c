"""Pictures side by side, in one PNG."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]  # [side, side, 3]


def grid(pictures: Sequence[Picture], columns: int, scale: int = 2, gap: int = 2, titles: Sequence[str] = ()) -> Image.Image:
    """The pictures in rows, enlarged without smoothing. titles: one for each row, left of it, larger in a wide sheet."""
    side = len(pictures[0])
    rows = -(-len(pictures) // columns)
    cell = side * scale + gap
    font = ImageFont.load_default(max(10, columns * cell // 62))
    left = 8 + max((font.getlength(title) for title in titles), default=-8)
    sheet = Image.new("RGB", (int(left) + columns * cell + gap, rows * cell + gap), (225, 225, 225))
    for i, pixels in enumerate(pictures):
        large = Image.fromarray(pixels).resize((side * scale, side * scale), Image.Resampling.NEAREST)
        sheet.paste(large, (int(left) + gap + i % columns * cell, gap + i // columns * cell))
    for row, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((4, row * cell + cell // 2), title, "black", font, anchor="lm")
    return sheet
