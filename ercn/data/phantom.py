"""The phantom: synthetic fundus photographs with lesions and pixel-exact masks, from one CC0 photograph.

A phantom proves the machinery and measures localization; it says nothing about clinical quality.

Source: `skimage/data/retina.jpg`, a normal left eye (M. Häggström 2014, WikiJournal of Medicine 1(2), CC0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import skimage
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from ercn.data.lesions import LESIONS, Lesion, paint, plan_lesions, stamp

__all__ = ["LESIONS", "phantom_grades", "phantom_optic_disc", "render_phantom"]

Eye = Literal["left", "right"]

GRADE_SHARES = (0.40, 0.15, 0.15, 0.15, 0.15)
_APERTURE = 0.97  # radius of the camera's round field, half width = 1

# Measured on the photograph, in its pixels: the fundus disc, the optic disc, and the large temporal vessels.
_PHOTO_CENTER, _PHOTO_RADIUS = np.array([705.0, 703.0]), 696.0
_OPTIC_DISC, _OPTIC_RADIUS = np.array([216.0, 649.0]), 108.0
_VEINS = (
    np.array(  # uppermost
        [(351, 353), (381, 330), (404, 300), (420, 266), (441, 235), (474, 214), (507, 197), (542, 182), (575, 163),
         (612, 157), (650, 160), (688, 164), (725, 160), (763, 155), (801, 155), (838, 160), (875, 170), (911, 181),
         (947, 189), (985, 188), (1023, 182), (1060, 173), (1096, 162)], float),
    np.array(  # upper
        [(244, 480), (275, 441), (314, 411), (357, 388), (394, 354), (435, 326), (485, 322), (534, 324), (583, 335),
         (632, 337), (681, 348), (724, 372), (766, 400), (810, 423), (860, 422), (909, 432), (958, 434), (1007, 427),
         (1053, 409), (1090, 377), (1127, 343), (1170, 319), (1219, 312)], float),
    np.array(  # lower
        [(192, 816), (214, 867), (236, 917), (257, 968), (276, 1018), (290, 1067), (321, 1113), (363, 1148),
         (412, 1174), (460, 1201), (515, 1210), (570, 1219), (625, 1221), (680, 1228), (735, 1229), (788, 1216),
         (843, 1226), (898, 1229), (953, 1230), (1009, 1228),
         (1060, 1208), (1110, 1186), (1161, 1165), (1212, 1143)], float),
    np.array(  # lower, nearer to the fovea
        [(220, 871), (265, 885), (312, 894), (353, 919), (392, 947), (435, 966), (483, 967), (531, 966), (579, 962),
         (624, 946), (668, 928), (715, 919), (761, 905), (800, 878), (846, 866), (894, 866), (942, 866), (989, 871),
         (1037, 870), (1084, 880), (1128, 891), (1174, 905), (1220, 916)], float),
)  # fmt: skip


@lru_cache(maxsize=2)
def _photograph(side: int) -> np.ndarray:
    """The photograph as float32 [3, side, side] in 0 … 1."""
    with Image.open(Path(skimage.__file__).parent / "data" / "retina.jpg") as picture:
        small = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(small, np.float32).transpose(2, 0, 1) / 255)


@dataclass(frozen=True)
class _Pose:
    """Where picture point p shows eye point q: q = w + Σ_k b_k sin(f_k · w + φ_k), w = Rot(angle) M p / zoom + shift.

    M mirrors x for a right eye. Eye coordinates: the photograph's disc is the unit disc.
    """

    mirror: float
    angle: float
    zoom: float
    shift: np.ndarray  # [2]
    bend: np.ndarray  # [K, 2]
    frequency: np.ndarray  # [K, 2]
    phase: np.ndarray  # [K]

    @classmethod
    def draw(cls, patient: np.random.Generator, eye: np.random.Generator, side: Eye) -> _Pose:
        frequency = patient.uniform(-4, 4, (4, 2))
        bend = patient.uniform(-0.009, 0.009, (4, 2))
        zoom = eye.uniform(1.10, 1.26)
        # |q| <= 0.97 / zoom + |shift| + Σ|b| must stay inside the photograph's disc
        room = min(0.985 - _APERTURE / zoom - np.hypot(*np.abs(bend).sum(0)), 0.08)
        direction, length = 2 * np.pi * eye.random(), room * np.sqrt(eye.random())
        shift = length * np.array([np.cos(direction), np.sin(direction)])
        angle = np.deg2rad(eye.uniform(-14, 14))
        phase = patient.uniform(0, 2 * np.pi, 4)
        return cls(1.0 if side == "left" else -1.0, angle, zoom, shift, bend, frequency, phase)

    def _bent(self, wx, wy):
        waves = [np.sin(fx * wx + fy * wy + p) for (fx, fy), p in zip(self.frequency, self.phase)]
        return sum(b[0] * s for b, s in zip(self.bend, waves)), sum(b[1] * s for b, s in zip(self.bend, waves))

    def to_eye(self, x, y):
        c, s = np.cos(self.angle) / self.zoom, np.sin(self.angle) / self.zoom
        x = self.mirror * x
        wx, wy = c * x - s * y + self.shift[0], s * x + c * y + self.shift[1]
        bx, by = self._bent(wx, wy)
        return wx + bx, wy + by

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """Inverse of ``to_eye`` for points [P, 2]; the bend is undone by fixed-point iteration."""
        w = points
        for _ in range(20):
            w = points - np.stack(self._bent(w[:, 0], w[:, 1]), 1)
        x, y = (w - self.shift).T * self.zoom
        c, s = np.cos(self.angle), np.sin(self.angle)
        return np.stack([self.mirror * (c * x + s * y), c * y - s * x], 1)


def _in_eye(pixels: np.ndarray) -> np.ndarray:
    return (pixels - _PHOTO_CENTER) / _PHOTO_RADIUS


def _generators(patient: int, eye: Eye, seed: int) -> list[np.random.Generator]:
    """One generator each for what both eyes share, for this eye's view, and for its lesions."""
    if eye not in ("left", "right"):
        raise ValueError(f"eye must be 'left' or 'right'; got {eye!r}")
    number = 1 + int(eye == "right")
    return [
        np.random.default_rng([seed, patient, side, purpose]) for side, purpose in ((0, 0), (number, 1), (number, 2))
    ]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of pixel centers, x [1, S] and y [S, 1]."""
    axis = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    return axis[None, :], axis[:, None]


def _on_optic_disc(qx, qy) -> np.ndarray:
    x, y = _in_eye(_OPTIC_DISC)
    return (qx - x) ** 2 + (qy - y) ** 2 <= (_OPTIC_RADIUS / _PHOTO_RADIUS) ** 2


def _light(picture, shared, view, x, y):
    """Pigment (both eyes alike), exposure, gamma, uneven lighting, vignette, focus and smudges of one photograph."""
    pigment = shared.uniform(-1, 1) * np.array([0.12, 0.26, 0.30]) + shared.normal(scale=0.04, size=3)
    gain = (1 - pigment) * view.uniform(0.82, 1.08)
    gamma = view.uniform(0.85, 1.2)
    slope, direction = view.uniform(0, 0.22), 2 * np.pi * view.random()
    vignette = view.uniform(0, 0.35)
    light = 1 + slope * (x * np.cos(direction) + y * np.sin(direction)) - vignette * (x * x + y * y)
    for _ in range(view.integers(0, 4)):
        r, a, radius = 0.9 * view.random(), 2 * np.pi * view.random(), view.uniform(0.04, 0.12)
        smudge = np.zeros(picture.shape[:2], np.float32)
        blob = np.array([[r * np.cos(a), r * np.sin(a), radius, radius * view.uniform(0.5, 1), np.pi * view.random()]])
        stamp(smudge, Lesion("", 0, blob, np.zeros((0, 2)), 1.6 * radius, 1.0))
        light *= 1 + view.uniform(-0.16, 0.12) * smudge
    blur = view.uniform(0, 0.0035) * picture.shape[0] / 2
    picture = gaussian_filter(picture, (blur, blur, 0)) if blur > 0.2 else picture
    return picture**gamma * (gain * light[..., None]).astype(np.float32)


def render_phantom(
    patient: int, eye: Eye, grade: int, size: int, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One synthetic fundus photograph and where its lesions are.

    The photograph is re-posed (rotation, zoom, shift, a smooth bend per patient, mirrored for the right eye), lesions
    are painted by the ICDR rules (``ercn.data.lesions.plan_lesions``), then color and lighting are varied. Pose, color
    and lighting do not depend on the grade. Small lesions are drawn somewhat larger than life (a microaneurysm is 1/65
    of the picture's width), so that they can be seen at 128 pixels.

    Args:
        patient, seed: non-negative numbers. eye: "left" or "right". grade: 0 … 4. size: side S in pixels, at least 32.

    Returns:
        picture uint8 [S, S, 3], and a bool mask [S, S] for each kind of lesion that is present: pixels that its shapes
        cover by at least one half. Never on the optic disc.

    Deterministic in all five arguments; the lesions' places do not depend on size.
    """
    if grade not in range(5):
        raise ValueError(f"grade must be 0, 1, 2, 3 or 4; got {grade!r}")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels; got {size}")
    shared, view, choice = _generators(patient, eye, seed)
    pose = _Pose.draw(shared, view, eye)
    x, y = _grid(size)
    qx, qy = pose.to_eye(x, y)

    photo = _photograph(min(1411, round(1.2 * size)))
    scale = photo.shape[1] / 1411
    column = ((qx * _PHOTO_RADIUS + _PHOTO_CENTER[0] + 0.5) * scale - 0.5).astype(np.float32)
    row = ((qy * _PHOTO_RADIUS + _PHOTO_CENTER[1] + 0.5) * scale - 0.5).astype(np.float32)
    picture = np.stack([map_coordinates(channel, (row, column), order=1, mode="nearest") for channel in photo], -1)

    center = pose.to_picture(_in_eye(_OPTIC_DISC)[None])[0]
    reach = 1.1 * pose.zoom * _OPTIC_RADIUS / _PHOTO_RADIUS
    veins = [pose.to_picture(_in_eye(v)) for v in _VEINS]
    lesions = plan_lesions(choice, grade, (*center, reach), veins)
    masks = paint(picture, lesions, ~_on_optic_disc(qx, qy))

    picture = _light(picture, shared, view, x, y)
    picture += view.uniform(0.003, 0.012) * view.standard_normal(picture.shape, np.float32)
    picture *= np.clip((_APERTURE - np.hypot(x, y)) * size / 2 + 0.5, 0, 1)[..., None]
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8), masks


def phantom_optic_disc(patient: int, eye: Eye, size: int, seed: int) -> np.ndarray:
    """Mask of the optic disc in ``render_phantom``'s picture, bool [S, S]; it is not a lesion."""
    shared, view, _ = _generators(patient, eye, seed)
    x, y = _grid(size)
    inside = np.hypot(x, y) <= _APERTURE
    return _on_optic_disc(*_Pose.draw(shared, view, eye).to_eye(x, y)) & inside


def phantom_grades(patients: int, seed: int) -> list[tuple[int, int]]:
    """Grades (left, right) of a set of patients.

    The worse eye has grade 0 in 40 % of the patients and grades 1 … 4 in 15 % each, to the nearest whole patient and
    every grade once at least, a mild form of a screening population. The other eye has the same grade, or with chance
    0.3 the one below. Raises ValueError for fewer than 5 patients.
    """
    if patients < 5:
        raise ValueError(f"a phantom set needs at least 5 patients, one for each grade; got patients={patients}")
    rng = np.random.default_rng([seed, 0x67726164])
    bounds = np.round(np.cumsum(GRADE_SHARES) * (patients - 5)).astype(int)
    worse = rng.permutation(np.repeat(np.arange(5), np.diff(bounds, prepend=0) + 1))
    other = np.maximum(worse - (rng.random(patients) < 0.3), 0)
    swap = rng.random(patients) < 0.5
    return [(int(b), int(a)) if s else (int(a), int(b)) for a, b, s in zip(worse, other, swap)]
