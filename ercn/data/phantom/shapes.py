"""Soft-edged ellipses on a pixel grid, many at a time, and smooth noise.

Coordinates: the picture's half width is 1, x to the right, y down, origin in the centre. All arithmetic is float64, so
that last-bit differences between platforms are far below one level of a picture with 8 bits.
"""

from __future__ import annotations

import numpy as np

__all__ = ["blend", "coverage", "grid", "smooth_noise"]

_CHUNK = 1 << 18  # array elements computed at once


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of pixel centers, x float64 [1, S] and y float64 [S, 1]."""
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    return axis[None, :], axis[:, None]


def coverage(
    size: int,
    blobs: np.ndarray,
    edge: np.ndarray | float,
    weight: np.ndarray | float = 1.0,
    wobble: np.ndarray | None = None,
    flat: np.ndarray | None = None,
) -> np.ndarray:
    """The largest of weight_n · c_n at each pixel, float64 [S, S]; c_n is the share of it that ellipse n covers.

    c = clip(1/2 - (ρ / w - 1) √(along · across) / edge, 0, 1), where ρ is 1 on the ellipse and
    w(θ) = 1 + Σ_k a_k cos((k + 2) θ + φ_k) its wobbling outline.

    Args:
        blobs: [N, 5], rows (x, y, radius along, radius across, angle).
        edge, weight: a number or [N]. edge: width over which c falls from 1 to 0, at least one pixel is used.
        wobble: [N, K, 2], rows (a_k, φ_k), or None.
        flat: bool [N], the part above the centre is cut off, or None.
    """
    pixel = 2 / size
    edge = np.maximum(np.broadcast_to(edge, len(blobs)), pixel)
    weight = np.broadcast_to(weight, len(blobs))
    round_ = wobble is None and flat is None and bool((blobs[:, 2] == blobs[:, 3]).all())
    grow = 1.0 if wobble is None else 1.3
    half = np.ceil((grow * blobs[:, 2:4].max(1, initial=0) + 0.5 * edge) / pixel).astype(np.int64)
    half = np.where(half > 4, 1 << np.ceil(np.log2(half) - 1e-9).astype(np.int64), half)  # few different patch sizes
    column, row = (np.floor((blobs[:, i] + 1) / pixel).astype(np.int64) for i in (0, 1))
    seen = (np.abs(2 * column + 1 - size) < size + 2 * half) & (np.abs(2 * row + 1 - size) < size + 2 * half)
    result = np.zeros(size * size)
    for h in np.unique(half[seen]):
        patch = np.arange(-h, h + 1)
        rows = np.flatnonzero(seen & (half == h))
        for n in np.array_split(rows, -(-len(rows) * len(patch) ** 2 // _CHUNK)):
            dx = ((column[n, None] + patch + 0.5) * pixel - 1 - blobs[n, :1])[:, None, :]
            dy = ((row[n, None] + patch + 0.5) * pixel - 1 - blobs[n, 1:2])[:, :, None]
            along, across, angle = blobs[n, 2:].T[:, :, None, None]
            width = edge[n, None, None]
            if round_:
                share = 0.5 + (along - np.sqrt(dx * dx + dy * dy)) / width
            else:
                cos, sin = np.cos(angle), np.sin(angle)
                u, v = (dx * cos + dy * sin) / along, (dy * cos - dx * sin) / across
                rho = np.sqrt(u * u + v * v)
                if wobble is not None:
                    theta = np.arctan2(v, u)
                    a, phase = wobble[n, :, :, None, None].transpose(2, 1, 0, 3, 4)
                    rho /= 1 + sum(a[k] * np.cos((k + 2) * theta + phase[k]) for k in range(len(a)))
                share = 0.5 - (rho - 1) * np.sqrt(along * across) / width
                if flat is not None:
                    share = np.where(flat[n, None, None], np.minimum(share, 0.5 + dy / width), share)
            value = np.clip(share, 0, 1) * weight[n, None, None]
            y, x = (row[n, None] + patch)[:, :, None], (column[n, None] + patch)[:, None, :]
            inside = (value > 0) & (x >= 0) & (x < size) & (y >= 0) & (y < size)
            np.maximum.at(result, (y * size + x)[inside], value[inside])
    return result.reshape(size, size)


def blend(picture: np.ndarray, how: str, tint, alpha: np.ndarray) -> None:
    """``picture`` [S, S, 3] times the tint ("absorb") or towards it ("cover"), in place, by the opacity [S, S]."""
    if how == "absorb":
        picture *= 1 - alpha[..., None] * (1 - np.asarray(tint))
    else:
        picture += alpha[..., None] * (np.asarray(tint) - picture)


def smooth_noise(rng: np.random.Generator, size: int, waves: float) -> np.ndarray:
    """A cubic B-spline over a lattice of normal numbers, float64 [S, S] of unit variance.

    waves: lattice cells across the picture. ``size`` only changes the sampling of the field.
    """
    cells = int(np.ceil(waves)) + 3
    lattice = rng.standard_normal((cells, cells))
    at = (np.arange(size) + 0.5) / size * waves + 1
    distance = np.abs(at[:, None] - np.arange(cells))
    near, far = np.clip(1 - distance, 0, None), np.clip(2 - distance, 0, None)
    basis = (far**3 - 4 * near**3) / 6
    return basis @ lattice @ basis.T / (151 / 315)  # 151 / 315: variance of such a spline along one axis
