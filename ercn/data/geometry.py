"""Where the fundus lies in a photograph, the crop to the prepared square picture, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage


@dataclass(frozen=True)
class Geometry:
    """The crop square of one photograph.

    width, height: of the photograph. left, top, side: the square, in the photograph's pixels; the part of it outside of
    the photograph is black. size: side of the prepared picture. Pixel (i, j) of any [h, w] picture of the square has
    its center at photograph coordinates (left + (j + 0.5) side / w, top + (i + 0.5) side / h), where pixel centers are
    at k + 0.5.
    """

    width: int
    height: int
    left: int
    top: int
    side: int
    size: int

    def crop(self, picture: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """The prepared picture, size x size. Raises ValueError if the photograph has another size."""
        if picture.size != (self.width, self.height):
            raise ValueError(f"picture must be {self.width} x {self.height} (width x height); got {picture.size}")
        square = Image.new(picture.mode, (self.side, self.side))
        square.paste(picture, (-self.left, -self.top))
        return square.resize((self.size, self.size), resample)

    def to_original(self, map: np.ndarray, corners: int = 0) -> np.ndarray:
        """A map [h, w] of the square on the photograph's pixels, bilinear: float32 [height, width], 0 outside.

        corners: 0 where elements are cells, like pixels. Where a map has its outer elements on the centers of the
        picture's outer pixels (``ERCN.align_corners``), the side of the picture that the model saw.
        """
        map = np.asarray(map, np.float32)
        if map.ndim != 2:
            raise ValueError(f"map must be [h, w]; got shape {map.shape}")
        x = y = 0.0  # from the map's edge to the square's, in elements
        if corners:
            pad = (max(map.shape) - 1) // (corners - 1)  # more than 0 for a map at least as fine as the picture
            y, x = (pad + 0.5 - 0.5 * (n - 1) / (corners - 1) for n in map.shape)
            map = np.pad(map, pad, mode="edge")
        h, w = map.shape
        square = np.asarray(
            Image.fromarray(map).resize((self.side, self.side), Image.Resampling.BILINEAR, box=(x, y, w - x, h - y))
        )
        out = np.zeros((self.height, self.width), np.float32)
        x0, y0 = max(self.left, 0), max(self.top, 0)
        x1, y1 = min(self.left + self.side, self.width), min(self.top + self.side, self.height)
        out[y0:y1, x0:x1] = square[y0 - self.top : y1 - self.top, x0 - self.left : x1 - self.left]
        return out


def _extent(foreground: np.ndarray, axis: int) -> tuple[int, int]:
    """First and one past the last row or column with more foreground than a camera's notch has."""
    count = foreground.sum(1 - axis)
    filled = np.flatnonzero(count > 0.08 * count.max())
    return int(filled[0]), int(filled[-1]) + 1


def locate_disc(picture: Image.Image, size: int = 512) -> Geometry:
    """The square around the fundus disc of an RGB photograph.

    On a reduced copy, pixels brighter than the dark border by 12 % of the picture's range are foreground; the square is
    centered on the bounding box of the largest connected part and has the box's longer side. Discs that are cut off at
    the top and bottom are padded with black. A picture without a dark border is all foreground. Without a disc (too
    dark, or less than 5 % foreground) the result is the centered square that holds the whole picture.

    size: side of the prepared picture that ``Geometry.crop`` will make.
    """
    width, height = picture.size
    factor = max(1, max(width, height) // 400)
    value = np.asarray(picture.convert("RGB").reduce(factor), np.float32).max(-1)
    value = ndimage.median_filter(value, 3)
    dark, bright = np.percentile(value, (0.5, 95))
    box = (0, 0, width, height)
    if bright >= 16 and dark < 0.3 * bright:
        parts, count = ndimage.label(value > dark + 0.12 * (bright - dark))
        area = np.bincount(parts.ravel())
        if count and area[1:].max() >= 0.05 * value.size:
            foreground = ndimage.binary_fill_holes(parts == 1 + area[1:].argmax())
            (x0, x1), (y0, y1) = _extent(foreground, 1), _extent(foreground, 0)
            box = (x0 * factor, y0 * factor, min(x1 * factor, width), min(y1 * factor, height))
    side = max(box[2] - box[0], box[3] - box[1])
    left, top = (box[0] + box[2] - side) // 2, (box[1] + box[3] - side) // 2
    return Geometry(width, height, left, top, side, size)
