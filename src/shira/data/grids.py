"""Grids of pictures with titles, drawn with PIL."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = ["check_ending", "grid"]

GAP = 4  # pixels between pictures
INK, PAPER = "#202020", "white"
LONGEST_TITLE = 200  # characters of a title that are drawn


def grid(pictures: Sequence[Sequence[Any]], rows: Sequence[str], columns: Sequence[str], *, smallest: int = 128) -> Any:
    """One PIL image of rows of PIL images, with a title over each column and one at the left of each row.

    smallest: pictures whose sides are shorter are enlarged by a whole factor, without smoothing, so that titles fit.
    Raises DataError if there is not one title for each row and each column.

        grid([[tiger_base, tiger_blue]], rows=["tiger"], columns=["base", "bluefire"]).save("grid.png")
    """
    from PIL import Image, ImageDraw

    if not pictures or len(pictures) != len(rows) or any(len(row) != len(columns) for row in pictures) or not columns:
        counts = [len(row) for row in pictures]
        raise DataError(
            f"a grid needs a title for each row and column; found {len(rows)} x {len(columns)} for rows of {counts}"
        )
    width, height = (max(image.size[side] for row in pictures for image in row) for side in (0, 1))
    factor = -(-smallest // max(width, height))
    width, height = width * factor, height * factor
    size = max(13, min(28, width // 14))
    font = _font(size, "".join([*rows, *columns]))
    line = size + size // 3
    top = [_wrapped(title, font, width - 8, 3) for title in columns]
    side_width = round(max(width * 0.75, 96))
    side = [_wrapped(title, font, side_width - 12, max(1, height // line)) for title in rows]
    longest = max(font.getlength(text) for lines in side for text in lines)
    side_width = round(longest) + 12 if longest else 0
    head = max(map(len, top)) * line + 8
    sheet = Image.new("RGB", (side_width + len(columns) * (width + GAP) + GAP, head + len(rows) * (height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, lines in enumerate(top):
        centre = side_width + GAP + number * (width + GAP) + width / 2
        for place, text in enumerate(lines):
            draw.text((centre, head - 4 - (len(lines) - place) * line), text, INK, font, anchor="ma")
    for number, (lines, row) in enumerate(zip(side, pictures, strict=True)):
        y = head + GAP + number * (height + GAP)
        for place, text in enumerate(lines):
            draw.text((side_width - 6, y + (height - len(lines) * line) / 2 + place * line), text, INK, font, anchor="ra")
        for place, image in enumerate(row):
            large = image.convert("RGB").resize([length * factor for length in image.size], Image.Resampling.NEAREST)
            sheet.paste(large, (side_width + GAP + place * (width + GAP), y))
    return sheet


def _font(size: int, text: str) -> Any:
    """Pillow's own font, which has little beyond ASCII; for other text that of matplotlib, if it is installed."""
    from PIL import ImageFont

    if not text.isascii():
        with contextlib.suppress(ImportError, OSError):
            from matplotlib import get_data_path

            return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    return ImageFont.load_default(size)


def check_ending(path: Path) -> None:
    """Raise DataError for a folder, and unless Pillow can write a grid to a file with this ending. Nothing is written."""
    from PIL import Image

    if path.is_dir():
        raise DataError(f"{path} is a folder; give the name of a file, {path / 'grid.png'}")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), Image.registered_extensions().get(path.suffix.lower()))
    except (KeyError, OSError, ValueError) as error:
        found = f"the ending {path.suffix!r}" if path.suffix else "no ending"
        raise DataError(
            f"{path}: expected the ending of a picture that can be written, such as .png or .jpg; found {found}"
        ) from error


def _wrapped(title: str, font: Any, width: float, most: int) -> list[str]:
    """A title in lines of at most this width in pixels. What does not fit is left out, with … in its place."""
    words = " ".join(title[:LONGEST_TITLE].split()).split(" ")
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    cut = len(lines) > most or len(title) > LONGEST_TITLE
    lines = lines[:most]
    for number, text in enumerate(lines):
        more = "…" if cut and number == len(lines) - 1 else ""
        while len(text) > 1 and font.getlength(text + more) > width:
            text, more = text[:-1], "…"
        lines[number] = text + more
    return lines
