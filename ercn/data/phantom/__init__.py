"""The phantom: synthetic fundus photographs of eyes that a generator draws, with lesions and pixel-exact masks.

A phantom tests the code and measures localization; it says nothing about clinical quality. The anatomy differs from
patient to patient (``anatomy``), lesions follow the ICDR rules (``lesions``), and distractors (``distractors``) do not
depend on the grade.
"""

from __future__ import annotations

import numpy as np

from ercn.data.phantom.anatomy import APERTURE, Anatomy, Eye
from ercn.data.phantom.difficulty import DIFFICULTIES, DifficultyName
from ercn.data.phantom.distractors import compress, paint_distractors, photograph
from ercn.data.phantom.lesions import LESIONS, paint, plan_lesions
from ercn.data.phantom.shapes import grid

__all__ = ["LESIONS", "phantom_grades", "phantom_optic_disc", "render_phantom"]

GRADE_SHARES = (0.40, 0.15, 0.15, 0.15, 0.15)


def _anatomy(patient: int, eye: Eye, seed: int) -> Anatomy:
    if eye not in ("left", "right"):
        raise ValueError(f"eye must be 'left' or 'right'; got {eye!r}")
    return Anatomy(np.random.default_rng([seed, patient, 0, 0]), _stream(patient, eye, seed, 0), eye)


def _stream(patient: int, eye: Eye, seed: int, purpose: int) -> np.random.Generator:
    """purpose: 0 the eye, 1 distractors, 2 lesions, 3 camera, 4 noise, 5 compression."""
    return np.random.default_rng([seed, patient, 1 + (eye == "right"), purpose])


def _uncompressed(patient, eye, grade, size, seed, level) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The photograph as float64 in 0 … 1, and the masks."""
    anatomy = _anatomy(patient, eye, seed)
    distractors, choice, camera, grain = (_stream(patient, eye, seed, purpose) for purpose in (1, 2, 3, 4))
    picture = anatomy.paint(size, level.vessels, level.texture)
    paint_distractors(picture, distractors, anatomy, level)
    x, y, radius = anatomy.disc[:3]
    lesions = plan_lesions(choice, grade, (x, y, 1.1 * radius), anatomy.vein_paths(), level)
    masks = paint(picture, lesions, ~anatomy.on_disc(size))
    return photograph(picture, camera, grain, level), masks


def render_phantom(
    patient: int, eye: Eye, grade: int, size: int, seed: int, difficulty: DifficultyName = "standard"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One synthetic fundus photograph and where its lesions are.

    A generator draws the eye, then distractors, then lesions by the ICDR rules (``lesions.plan_lesions``), then light,
    blur, noise and JPEG compression; only the lesions depend on the grade. Small lesions are drawn larger than life (a
    microaneurysm is at least 1/65 of the picture's width), so that they can be seen at 128 pixels.

    Args:
        patient, seed: non-negative numbers. eye: "left" or "right". grade: 0 … 4. size: side S in pixels, at least 32.
        difficulty: a row of ``ercn.data.phantom.difficulty``: "easy", "standard" or "hard".

    Returns:
        picture uint8 [S, S, 3], and a bool mask [S, S] for each kind of lesion that is present: pixels that its shapes
        cover by at least one half. Lesions are never on the optic disc.

    Deterministic in all six arguments, on every platform: PCG64 streams and float64 arithmetic that is rounded at the
    end. Places of anatomy, distractors and lesions do not depend on size, and the anatomy not on the difficulty.
    """
    if grade not in range(5):
        raise ValueError(f"grade must be 0, 1, 2, 3 or 4; got {grade!r}")
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels; got {size}")
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty must be one of {', '.join(map(repr, DIFFICULTIES))}; got {difficulty!r}")
    level = DIFFICULTIES[difficulty]
    picture, masks = _uncompressed(patient, eye, grade, size, seed, level)
    low, high = level.quality
    quality = int(_stream(patient, eye, seed, 5).integers(low, high + 1))
    return np.round(np.clip(compress(255 * picture, quality), 0, 255)).astype(np.uint8), masks


def phantom_optic_disc(patient: int, eye: Eye, size: int, seed: int) -> np.ndarray:
    """Mask of the optic disc in ``render_phantom``'s picture at any difficulty, bool [S, S]; it is not a lesion."""
    x, y = grid(size)
    return _anatomy(patient, eye, seed).on_disc(size) & (np.hypot(x, y) <= APERTURE)


def phantom_grades(patients: int, seed: int) -> list[tuple[int, int]]:
    """Grades (left, right) of a set of patients.

    The worse eye has grade 0 in 40 % of the patients and grades 1 … 4 in 15 % each, to the nearest whole patient and
    every grade at least once: a screening population, less skewed. The other eye has the same grade, or with chance 0.3
    the grade below. Raises ValueError for fewer than 5 patients.
    """
    if patients < 5:
        raise ValueError(f"a phantom set needs at least 5 patients, one for each grade; got patients={patients}")
    rng = np.random.default_rng([seed, 0x67726164])
    bounds = np.round(np.cumsum(GRADE_SHARES) * (patients - 5)).astype(int)
    worse = rng.permutation(np.repeat(np.arange(5), np.diff(bounds, prepend=0) + 1))
    other = np.maximum(worse - (rng.random(patients) < 0.3), 0)
    swap = rng.random(patients) < 0.5
    return [(int(b), int(a)) if s else (int(a), int(b)) for a, b, s in zip(worse, other, swap)]
