"""Heat maps drawn over pictures, always on the scale 0 … 1, and the outlines of lesion masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import binary_dilation

from ercn.data.entries import OPTIC_DISC

COLORMAP = "inferno"
OPACITY = 0.7  # at heat 1
# Okabe and Ito's colours, which colour-blind readers can tell apart; cold ones, unlike the heat, for common lesions.
COLORS = {
    "microaneurysms": "#56b4e9",
    "hemorrhages": "#009e73",
    "hard_exudates": "#f0e442",
    "soft_exudates": "#cc79a7",
    "irma": "#0072b2",
    "venous_beading": "#e69f00",
    "neovascularization": "#d55e00",
    OPTIC_DISC: "#ffffff",
}
OTHER = "#c9b3ff"
_OUTLINES = 512  # least side of outlines, pixels
_ROWS = 256  # blended at a time, so that a 200-megapixel picture needs no second float copy


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 and [H, W] in [0, 1] -> [H, W, 3] uint8: the heat in colour over the picture in grey.

    The opacity is 0.7 · heat and the colour inferno(heat); neither depends on the map's own range.
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


def outlines(masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """The outlines of masks bool [S, S] by kind: uint8 RGBA [T, T, 4], T the first multiple of S from 512 on.

    Each outline has its kind's colour, lies outside its mask and has a dark rim. Lesions lie over the optic disc.
    """
    size = next(iter(masks.values())).shape[0]
    factor = -(-_OUTLINES // size)
    width = max(1, factor * size // 300)
    result = np.zeros((factor * size, factor * size, 4), np.uint8)
    for kind in sorted(masks, key=lambda kind: kind != OPTIC_DISC):
        mask = masks[kind].repeat(factor, 0).repeat(factor, 1)
        line = binary_dilation(mask, iterations=width)
        result[binary_dilation(line) & ~line] = (0, 0, 0, 160)
        result[line & ~mask] = (*bytes.fromhex(COLORS.get(kind, OTHER)[1:]), 255)
    return result


def save_jpeg(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=92)
