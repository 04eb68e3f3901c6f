"""Reads one picture; every failure is a sentence that names the file."""

from __future__ import annotations

import threading
from pathlib import Path

from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
_pillow_limit = threading.Lock()


class DataError(ValueError):
    """Data that cannot be used; the message names the file, row, column or value and says what is needed."""


def _open(file) -> Image.Image:
    """Reads a picture's header without Pillow's global size limit: ``read_picture`` checks ``max_pixels``."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_picture(path: str | Path, *, max_pixels: int) -> Image.Image:
    """Reads a picture as RGB, upright (the EXIF orientation is applied) and without metadata.

    The size is checked in the header, before any pixel is decoded: a crop may have to hold the square of the longer
    side. Formats: JPEG, PNG, TIFF, BMP, WebP; 8 bits a channel.

    Raises:
        DataError: the file is missing, not a picture in one of these formats, truncated or damaged, its longer
            side squared is more than ``max_pixels``, or it has more than 8 bits a channel.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            picture = _open(file)
            width, height = picture.size
            if (pixels := max(width, height) ** 2) > max_pixels:
                raise DataError(
                    f"{path}: {width} x {height} lies in a square of {pixels} pixels; max_pixels is {max_pixels}"
                )
            if picture.mode.startswith(("I", "F")):
                raise DataError(f"{path}: pixels of mode {picture.mode!r}; 8 bits a channel are needed")
            picture.load()
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not a picture ({', '.join(FORMATS)} are read)") from None
    except Exception as error:  # broken files make Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise DataError(f"{path}: cannot be decoded: {error}") from error
    picture.info.clear()
    return picture
