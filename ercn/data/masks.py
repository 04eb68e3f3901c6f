"""Lesion masks of photographs, and their prepared form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ercn.data.geometry import Geometry
from ercn.data.images import DataError, read_picture


def read_mask(path: Path, size: tuple[int, int], level: int, *, max_pixels: int) -> np.ndarray:
    """bool [H, W]: where the largest of R, G and B, from the palette if there is one, is at least ``level``.

    Transparency does not count. size: width and height of the photograph. Raises DataError if the mask has another
    size or cannot be read.
    """
    picture = read_picture(path, max_pixels=max_pixels)
    if picture.size != size:
        found, needed = (f"{width} x {height}" for width, height in (picture.size, size))
        raise DataError(f"{path}: a mask of {found} for a photograph of {needed}")
    return np.asarray(picture).max(-1) >= level


def prepared_mask(mask: np.ndarray, geometry: Geometry) -> Image.Image:
    """0 or 255, of the prepared picture's size: 255 where at least half of a pixel's area is lesion."""
    share = geometry.crop(Image.fromarray(mask.astype(np.uint8) * 255), Image.Resampling.BOX)
    return share.point(lambda value: 255 * (value >= 128))


def pixels_outside(mask: np.ndarray, geometry: Geometry) -> int:
    """How many lesion pixels the crop leaves out."""
    top, left = max(geometry.top, 0), max(geometry.left, 0)
    inside = mask[top : geometry.top + geometry.side, left : geometry.left + geometry.side]
    return int(mask.sum()) - int(inside.sum())
