"""Read pictures and their captions from a folder."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DataError, MissingExtra
from ..texts import shown

__all__ = ["Picture", "check_caption", "check_pillow", "image_of", "pictures_in", "square"]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
MOST_PIXELS = 2**28  # of a scaled picture, which takes 3 bytes for each
TURNED = {  # orientation in EXIF data -> what makes the picture upright
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"},
    **{5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows. image: where it is, or a PIL image itself."""

    image: Any
    caption: str


def pictures_in(folder: str | Path, prompt: str | None = None) -> list[Picture]:
    """The pictures of a folder, in the order of their names, with their captions. Hidden files (._a.png of macOS) are none.

    A caption is `prompt`, if it is given; or "text" of the picture's line in metadata.jsonl (as for Hugging Face's imagefolder,
    {"file_name": "a.png", "text": "a dog"}); or the content of a.txt beside a.png.
    Raises DataError, which names the file, if a picture has no caption, or if there are no pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of pictures")
    check_caption("the prompt", prompt or "")
    if prompt is None and (folder / METADATA).is_file():
        return list(_listed(folder))
    there = (path for path in folder.iterdir() if not path.name.startswith("."))
    files = sorted(path for path in there if path.suffix.lower() in ENDINGS and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no picture; expected files that end with {', '.join(ENDINGS)}")
    return [Picture(file, prompt if prompt is not None else _beside(file)) for file in files]


def _beside(file: Path) -> str:
    try:
        caption = file.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        raise DataError(
            f"{file} has no caption; write one into {file.with_suffix('.txt').name} beside it, or list all in {METADATA} "
            '({"file_name": "a.png", "text": "a dog"}), or give one prompt for all pictures'
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file.with_suffix('.txt')} is not UTF-8 text: {error}") from error
    if not caption:
        raise DataError(f"{file.with_suffix('.txt')} is empty; expected the caption of {file.name}")
    return caption


def _listed(folder: Path) -> Iterator[Picture]:
    place, found = folder / METADATA, False
    with open(place, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
                raise DataError(f"{place}, line {number}: it is not JSON ({error})") from error
            name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(text, str):
                raise DataError(f"{place}, line {number}: expected 'file_name' and 'text', two strings; found {shown(row)}")
            check_caption(f"{place}, line {number}: 'text'", text)
            if not (folder / name).is_file():
                raise DataError(f"{place}, line {number}: there is no file {shown(name)} in {folder}")
            yield Picture(folder / name, text)
            found = True
    if not found:
        raise DataError(f"{place} lists no picture")


def check_caption(what: str, caption: str) -> None:
    """Raise DataError for a half of a surrogate pair, which no tokenizer takes. what: the caption's name in messages."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} must be valid Unicode, found {shown(caption)} ({error.reason}); write it again") from None


def square(
    picture: Picture, resolution: int, crop: Literal["center", "random"], generator: torch.Generator
) -> tuple[Tensor, Any]:
    """The picture as float32 [3, resolution, resolution] from -1 to 1; and (height, width, top, left), its size and its crop.

    The shorter side is scaled to the resolution, the longer one is cropped: in the middle, or at a random place.
    Raises DataError, which names the file, if the picture cannot be read, or is so narrow that scaling would fill the memory.
    """
    from PIL import Image

    image = image_of(picture)
    width, height = image.size
    scale = resolution / min(width, height)
    wide, high = (max(resolution, math.floor(side * scale + 0.5)) for side in (width, height))
    if wide * high > MOST_PIXELS:
        raise DataError(
            f"{picture.image} is {width} x {height}, so at resolution {resolution} it would be {wide} x {high} before it is "
            "cropped; crop it, or leave it out"
        )
    image = image.resize((wide, high), Image.Resampling.LANCZOS)
    free = [high - resolution, wide - resolution]
    if crop == "center":
        top, left = (each // 2 for each in free)
    else:
        top, left = (int(torch.randint(each + 1, (), generator=generator, device="cpu")) for each in free)
    image = image.crop((left, top, left + resolution, top + resolution))
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(resolution, resolution, 3)
    return flat.permute(2, 0, 1).float() / 127.5 - 1, (height, width, top, left)


def image_of(picture: Picture) -> Any:
    """The picture as a PIL image in RGB, whole and upright. Raises DataError, which names the file, if it cannot be read."""
    from PIL import Image

    try:
        if isinstance(picture.image, Image.Image):
            return _opaque(_upright(picture.image))
        with Image.open(picture.image) as image:
            return _opaque(_upright(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow fails in many ways on what is broken
        raise DataError(f"{picture.image} is not a picture that can be read: {error}") from error


def _upright(image: Any) -> Any:
    """The image as its EXIF data say that it is to be shown. Pillow's `exif_transpose` fails if others of these are broken."""
    from PIL import ExifTags, Image

    image.load()
    turned = TURNED.get(image.getexif().get(ExifTags.Base.Orientation))
    return image.transpose(Image.Transpose[turned]) if turned else image


def _opaque(image: Any) -> Any:
    """The image in RGB; what is transparent becomes white. Raises ValueError for grey values that are floating point."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its grey values are floating point, which have no known range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_pillow() -> None:
    """Raise MissingExtra if pictures cannot be read."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"pictures need pillow: pip install 'shira-adapters[image]' ({error})") from error
