"""Distractors: what a fundus photograph shows besides vessels and lesions of retinopathy, independent of the grade.

In the retina: drusen, pigment spots, naevi, scars, reflexes of the nerve fibres and the fovea. In the camera: uneven
light, haze, smudges and dust, blur, noise, JPEG compression.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from ercn.data.phantom.anatomy import APERTURE, Anatomy
from ercn.data.phantom.difficulty import Difficulty
from ercn.data.phantom.shapes import blend, coverage, grid, smooth_noise

__all__ = ["compress", "paint_distractors", "photograph"]


def _count(rng: np.random.Generator, most: float) -> int:
    """Log-uniform in 0 … most: few in most eyes, many in some."""
    return int(np.exp(rng.random() * np.log1p(most)) - 1 + rng.random())


def _spots(rng, count, radius, around=None, spread=0.3) -> np.ndarray:
    """Ellipses [count, 5], log-uniform in radius, over the whole field or normally distributed ``around`` a point."""
    low, high = radius
    r = low * (high / low) ** (rng.random(count) ** 1.4)
    d, a = 0.93 * np.sqrt(rng.random(count)), 2 * np.pi * rng.random(count)
    where = np.stack([d * np.cos(a), d * np.sin(a)], 1)
    normal = rng.normal(scale=spread, size=(count, 2))
    if around is not None:
        where = around + normal
    return np.column_stack([where, r, r * rng.uniform(0.65, 1.0, count), np.pi * rng.random(count)])


def _wobble(rng, count, strength) -> np.ndarray:
    amplitude = strength * rng.normal(size=(count, 3)) / np.arange(1, 4)
    return np.stack([amplitude, 2 * np.pi * rng.random((count, 3))], -1)


def paint_distractors(picture: np.ndarray, rng: np.random.Generator, eye: Anatomy, level: Difficulty) -> None:
    """Paints the distractors of the retina into ``picture`` float64 [S, S, 3] in 0 … 1, in place."""
    size = len(picture)
    more, strong = level.distractors, level.strength
    keep = ~eye.on_disc(size)

    def lay(how, tint, blobs, softness, opacity, wobble):
        n = len(blobs)
        edge = blobs[:, 3] * rng.uniform(*softness, n)
        weight = np.minimum(strong * rng.uniform(*opacity, n), 0.95)
        shapes = _wobble(rng, n, wobble)
        if n:
            blend(picture, how, tint, keep * coverage(size, blobs, edge, weight, shapes))

    def hue(tint, scale):
        return np.clip(np.asarray(tint) + rng.normal(scale=scale, size=3), 0, 1)

    center = eye.fovea + rng.normal(scale=0.08, size=2)
    drusen = _spots(rng, _count(rng, 45 * more), (0.009, 0.026), center, rng.uniform(0.12, 0.5))
    lay("cover", hue((0.90, 0.72, 0.52), 0.03), drusen, (0.9, 1.8), (0.3, 0.85), 0.08)
    few = _spots(rng, _count(rng, 14 * more), (0.010, 0.03))
    lay("cover", hue((0.86, 0.71, 0.58), 0.03), few, (0.7, 1.6), (0.3, 0.85), 0.1)
    scars = _spots(rng, _count(rng, 3 * more), (0.03, 0.09))
    lay("absorb", (0.45, 0.45, 0.50), scars * [1, 1, 1.25, 1.25, 1], (0.3, 0.9), (0.2, 0.8), 0.15)
    lay("cover", hue((0.92, 0.76, 0.58), 0.03), scars, (0.3, 0.9), (0.3, 0.8), 0.15)
    pigment = _spots(rng, _count(rng, 40 * more), (0.011, 0.05))
    lay("absorb", hue((0.44, 0.44, 0.52), 0.05), pigment, (0.5, 1.6), (0.3, 0.95), 0.16)
    nests = _spots(rng, _count(rng, 25 * more), (0.010, 0.026), rng.uniform(-0.6, 0.6, 2), rng.uniform(0.06, 0.2))
    lay("absorb", hue((0.42, 0.40, 0.44), 0.05), nests, (0.4, 1.0), (0.4, 1.0), 0.16)
    naevi = _spots(rng, int(rng.random() < 0.3 * min(more, 1.5)), (0.07, 0.22))
    lay("absorb", (0.62, 0.64, 0.68), naevi, (0.3, 1.0), (0.4, 1.0), 0.12)

    count = _count(rng, 50 * more)  # reflexes of nerve fibres: streaks that run away from the optic disc
    start, length = eye.disc[2] * rng.uniform(1.1, 4.0, count), rng.uniform(0.03, 0.11, count)
    turn = 2 * np.pi * rng.random(count)
    x, y = eye.disc[0] + start * np.cos(turn), eye.disc[1] + start * np.sin(turn)
    angle = turn + rng.normal(scale=0.25, size=count)
    streaks = np.column_stack([x, y, length, rng.uniform(0.005, 0.013, count), angle])
    lay("cover", hue((0.86, 0.78, 0.62), 0.03), streaks, (0.8, 1.5), (0.08, 0.42), 0.05)
    glints = _spots(rng, 1 + _count(rng, 4 * more), (0.008, 0.02), eye.fovea, 0.02)
    lay("cover", (0.95, 0.85, 0.70), glints, (0.6, 1.5), (0.1, 0.7), 0.1)


def photograph(picture: np.ndarray, rng: np.random.Generator, grain: np.random.Generator, level: Difficulty):
    """The camera's picture of the retina, not compressed: float64 [S, S, 3] in 0 … 1. grain: stream of the noise."""
    size = len(picture)
    x, y = grid(size)
    gain = rng.uniform(0.72, 1.18) * np.exp(rng.normal(scale=[0.05, 0.04, 0.09]))
    gamma = rng.uniform(0.85, 1.2)
    slope, direction = level.light * rng.uniform(0, 0.25), 2 * np.pi * rng.random()
    vignette = level.light * rng.uniform(0, 0.4)
    light = 1 + slope * (x * np.cos(direction) + y * np.sin(direction)) - vignette * (x * x + y * y)
    light *= np.exp(0.06 * level.light * smooth_noise(rng, size, 4))
    picture = np.clip(picture, 1e-6, None) ** gamma * (gain * np.clip(light, 0.15, None)[..., None])
    direction, haze = 2 * np.pi * rng.random(), max(rng.uniform(-0.5, 0.3), 0.0) * level.light
    edge = np.clip(1.5 * (x * np.cos(direction) + y * np.sin(direction)) - 0.6, 0, 1) ** 2
    picture += (haze * edge)[..., None] * (np.array([0.9, 0.75, 0.65]) - picture)
    for sign, most, radius, softness, strength in (
        (-1, 4, (0.05, 0.15), 1.6, 0.25),  # smudges, dark and bright
        (1, 4, (0.04, 0.14), 1.6, 0.30),
        (-1, 18, (0.009, 0.026), 0.7, 0.55),  # dust
        (1, 10, (0.008, 0.018), 0.7, 0.45),
    ):
        spots = _spots(rng, _count(rng, most * level.distractors), radius)
        weight = level.strength * strength * rng.uniform(0.3, 1.0, len(spots))
        if len(spots):
            alpha = coverage(size, spots, softness * spots[:, 3], np.minimum(weight, 0.9))
            blend(picture, "absorb" if sign < 0 else "cover", (0, 0, 0) if sign < 0 else (0.9, 0.85, 0.8), alpha)
    blur = rng.uniform(*level.blur) * size / 2
    picture = gaussian_filter(picture, (blur, blur, 0)) if blur > 0.2 else picture
    noise = rng.uniform(*level.noise)
    coarse = gaussian_filter(grain.standard_normal(picture.shape), (0.6, 0.6, 0)) * [1.0, 0.9, 1.3]
    picture = picture + 1.7 * noise * coarse
    return np.clip(picture, 0, 1) * np.clip((APERTURE - np.hypot(x, y)) * size / 2 + 0.5, 0, 1)[..., None]


# ITU T.81 (the JPEG standard), Annex K: quantization of luminance and chrominance at quality 50.
_LUMINANCE = np.array(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29,
     51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121,
     120, 101, 72, 92, 95, 98, 112, 100, 103, 99], float).reshape(8, 8)  # fmt: skip
_CHROMINANCE = np.full((8, 8), 99.0)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_DCT = np.sqrt(0.25) * np.cos(np.pi / 16 * np.outer(np.arange(8), 2 * np.arange(8) + 1))
_DCT[0] = np.sqrt(1 / 8)


def compress(picture: np.ndarray, quality: int) -> np.ndarray:
    """``picture`` float64 [S, S, 3] in 0 … 255 after JPEG compression of that quality, not rounded.

    The standard's transform and quantization in float64, chrominance at half the resolution: the result is the same on
    every platform, which that of a library is not.
    """
    size = len(picture)
    pad = -size % 16
    ycc = np.pad(picture, ((0, pad), (0, pad), (0, 0)), mode="edge") @ _TO_YCC.T
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    side = size + pad
    planes = []
    for channel, table in enumerate((_LUMINANCE, _CHROMINANCE, _CHROMINANCE)):
        plane = ycc[..., channel]
        if channel:
            plane = plane.reshape(side // 2, 2, side // 2, 2).mean((1, 3))
        step = np.clip(np.floor((table * scale + 50) / 100), 1, 255)
        n = len(plane) // 8
        blocks = plane.reshape(n, 8, n, 8).transpose(0, 2, 1, 3) - (0 if channel else 128)
        blocks = _DCT.T @ (np.round(_DCT @ blocks @ _DCT.T / step) * step) @ _DCT + (0 if channel else 128)
        plane = blocks.transpose(0, 2, 1, 3).reshape(8 * n, 8 * n)
        planes.append(plane.repeat(2, 0).repeat(2, 1) if channel else plane)
    return (np.stack(planes, -1) @ np.linalg.inv(_TO_YCC).T)[:size, :size]
