"""The table of the phantom's difficulties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["DIFFICULTIES", "Difficulty", "DifficultyName"]

DifficultyName = Literal["easy", "standard", "hard"]


@dataclass(frozen=True)
class Difficulty:
    """One difficulty. Each picture draws from the ranges; lengths are in half widths of the picture.

    size: factor on the lengths of lesions. contrast: range of the lesions' opacity. spread: its variation between the
        lesions of an eye.
    distractors: factor on their numbers. strength: factor on their opacity.
    vessels: factor on the opacity of healthy vessels.
    texture: factor on the photograph's texture and on the choroid. light: factor on the unevenness of the light.
    blur, noise: standard deviations of the camera's blur and of the sensor's noise (in 0 … 1). quality: of the JPEG.
    """

    size: float
    contrast: tuple[float, float]
    spread: float
    distractors: float
    strength: float
    vessels: float
    texture: float
    light: float
    blur: tuple[float, float]
    noise: tuple[float, float]
    quality: tuple[int, int]


_TABLE = (
    Difficulty(1.50, (0.85, 1.00), 0.15, 0.15, 0.60, 0.9, 0.7, 0.6, (0.002, 0.006), (0.003, 0.008), (88, 96)),
    Difficulty(1.25, (0.85, 1.00), 0.20, 0.65, 1.00, 1.1, 1.0, 1.0, (0.003, 0.008), (0.006, 0.014), (75, 95)),
    Difficulty(1.00, (0.65, 0.95), 0.30, 1.00, 1.00, 1.1, 1.2, 1.3, (0.004, 0.010), (0.008, 0.020), (65, 92)),
)
DIFFICULTIES: dict[str, Difficulty] = dict(zip(get_args(DifficultyName), _TABLE))
