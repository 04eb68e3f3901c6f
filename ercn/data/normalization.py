"""From a photograph to a prepared picture: the crop to the disc, and, if wanted, the removal of the local mean."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from ercn.data.geometry import Geometry


def graham(picture: Image.Image) -> Image.Image:
    """Preprocessing of B. Graham, winner of the Kaggle competition of 2015, for a picture x that the fundus disc fills:

        4 x - 4 Gauss(x, sigma = R / 30) + 128, rounded and clipped to 0 … 255; 128 beyond 0.9 R of the center

    with R half of the side. Lesions stand out from an even gray under any lighting and color of the retina.

    picture: RGB, square. Deterministic.
    """
    x = np.asarray(picture, np.float32)  # [S, S, 3]
    radius = x.shape[0] / 2
    mean = ndimage.gaussian_filter(x, (radius / 30, radius / 30, 0))
    return _around_gray(x, mean, _disc(x.shape[0], 0.9))


def local(picture: Image.Image) -> Image.Image:
    """As ``graham``, with a wider mean, taken over the field only, so that the field's edge does not shine:

        4 x - 4 Gauss(w x, sigma = R / 15) / Gauss(w, sigma = R / 15) + 128; 128 where w is 0

    w is 1 within 0.97 R of the center where the brightest channel is above 8, else 0. Lesions of a few hundredths of
    the field keep their inside; with sigma = R / 30 they lose it.
    """
    x = np.asarray(picture, np.float32)
    radius = x.shape[0] / 2
    field = _disc(x.shape[0], 0.97) & (x.max(2) > 8)
    weight = field.astype(np.float32)[..., None]
    mean = ndimage.gaussian_filter(weight * x, (radius / 15, radius / 15, 0))
    share = ndimage.gaussian_filter(weight, (radius / 15, radius / 15, 0))
    return _around_gray(x, mean / np.maximum(share, 1e-6), field)


def _disc(size: int, share: float) -> np.ndarray:
    """Pixels within ``share`` of half the side from the center, bool [size, size]."""
    radius = size / 2
    row, column = np.ogrid[:size, :size]
    return (row + 0.5 - radius) ** 2 + (column + 0.5 - radius) ** 2 <= (share * radius) ** 2


def _around_gray(x: np.ndarray, mean: np.ndarray, field: np.ndarray) -> Image.Image:
    """4 x - 4 mean + 128, rounded and clipped to 0 … 255; 128 where ``field`` [S, S] is False."""
    out = np.where(field[..., None], 4 * x - 4 * mean + 128, 128)
    return Image.fromarray(np.clip(np.rint(out), 0, 255).astype(np.uint8))


NORMALIZATIONS = {"none": lambda picture: picture, "graham": graham, "local": local}


def surround(normalize: str) -> int:
    """The level of R, G and B around the disc of a prepared picture."""
    return 0 if normalize == "none" else 128


def prepared(picture: Image.Image, geometry: Geometry, normalize: str) -> Image.Image:
    """The picture of a photograph that training sees. normalize: as in ``PrepareConfig``."""
    return NORMALIZATIONS[normalize](geometry.crop(picture))
