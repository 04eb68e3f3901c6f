"""How a prepared picture is made of a photograph: cropped to the disc, and, if wanted, with the local mean removed."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

from ercn.data.geometry import Geometry


def graham(picture: Image.Image) -> Image.Image:
    """The picture x of a fundus disc that fills it, as B. Graham, winner of the Kaggle competition of 2015, saw it:

        4 x - 4 Gauss(x, sigma = R / 30) + 128, rounded and clipped to 0 … 255; 128 beyond 0.9 R of the center

    with R half of the side. Lesions stand out from an even gray, whatever the lighting and the color of the retina.

    picture: RGB, square. Deterministic.
    """
    x = np.asarray(picture, np.float32)  # [S, S, 3]
    radius = x.shape[0] / 2
    out = 4 * x - 4 * ndimage.gaussian_filter(x, (radius / 30, radius / 30, 0)) + 128
    y, x = np.ogrid[: x.shape[0], : x.shape[1]]
    outside = (y + 0.5 - radius) ** 2 + (x + 0.5 - radius) ** 2 > (0.9 * radius) ** 2
    out[outside] = 128
    return Image.fromarray(np.clip(np.rint(out), 0, 255).astype(np.uint8))


def prepared(picture: Image.Image, geometry: Geometry, normalize: str) -> Image.Image:
    """The picture that training sees, of a photograph. normalize: as in ``PrepareConfig``."""
    square = geometry.crop(picture)
    return graham(square) if normalize == "graham" else square
