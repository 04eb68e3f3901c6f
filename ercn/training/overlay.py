"""Heat maps drawn over pictures, always on the scale 0 … 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

COLORMAP = "inferno"
OPACITY = 0.7  # at heat 1
_ROWS = 256  # blended at once, so that a 200-megapixel picture needs no second float copy


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 and [H, W] in [0, 1] -> [H, W, 3] uint8: the picture in grey, coloured as far as it is hot.

    The opacity is 0.7 · heat and the colour inferno(heat): neither depends on the map's own range.
    """
    if picture.shape[:2] != heat.shape:
        raise ValueError(f"picture and heat map differ in size: {picture.shape[:2]} and {heat.shape}")
    colors = (colormaps[COLORMAP](np.arange(256))[:, :3] * 255).astype(np.float32)
    result = np.empty_like(picture)
    for top in range(0, len(picture), _ROWS):
        rows = slice(top, top + _ROWS)
        grey = picture[rows].astype(np.float32) @ np.array([[0.299], [0.587], [0.114]], np.float32)
        opacity = OPACITY * heat[rows, :, None]
        color = colors[np.round(heat[rows] * 255).astype(int)]
        result[rows] = np.round((1 - opacity) * grey + opacity * color).astype(np.uint8)
    return result


def save_jpeg(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=92)
