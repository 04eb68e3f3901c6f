"""The maps A between two views x and A(x) of a picture: the same A applies to pictures and to activation maps.

``A(x)`` takes x [B, C, h, w] at any resolution of one field of view to the frame of view 2, so that cam(A(x)) can be
compared with A(cam(x)); one A holds for the whole batch. A is drawn for the places of the model's map elements
(``ercn.elements``): with ``align_corners`` the outer elements are on the outer pixels' centres.
``A.valid(h, w)`` is a bool map of view 2 at h × w, True where it shows a place inside the picture.

All forward passes are deterministic. On CUDA the backward passes of bilinear resizing (``Rescale``) and ``grid_sample``
(``Affine``) are not bit-reproducible, and torch refuses the latter under ``use_deterministic_algorithms``; the backward
passes of the other maps are deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ercn.elements import resize

KINDS = ("rescale", "flip", "rot90", "translate", "affine")

# Limits of "translate" and "affine": degrees, share of the picture's side, scale.
MAX_ROTATION = 30.0
MAX_SHIFT = 0.15
SCALE_RANGE = (0.8, 1.25)


class _Everywhere:
    """A map A whose view 2 shows only places inside the picture."""

    def valid(self, h: int, w: int, device: torch.device | str | None = None) -> Tensor:
        return torch.ones(h, w, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Identity(_Everywhere):
    """A(x) = x; ``ercn_loss`` then works with one view."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def inverse(self) -> Identity:
        return self


@dataclass(frozen=True)
class Rescale(_Everywhere):
    """Bilinear resize to round(factor · side), at least 1 (SEAM: factor 0.3, aligned corners)."""

    factor: float
    align_corners: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return resize(x, [max(1, round(side * self.factor)) for side in x.shape[-2:]], self.align_corners)


@dataclass(frozen=True)
class Flip(_Everywhere):
    """Mirror left-right (dim 3) or top-bottom (dim 2). Exact, its own inverse."""

    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.flip(self.dim)

    def inverse(self) -> Flip:
        return self


@dataclass(frozen=True)
class Rot90(_Everywhere):
    """k quarter turns counter-clockwise. Exact; h × w becomes w × h for odd k."""

    k: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.rot90(self.k, (2, 3))

    def inverse(self) -> Rot90:
        return Rot90(-self.k % 4)


@dataclass(frozen=True)
class Affine:
    """Bilinear sampling at affinely mapped coordinates; places outside the picture repeat its border and are not valid.

    theta: (a, b, c, d, e, f); view 2 at (x, y) shows the picture at (ax + by + c, dx + ey + f). Coordinates run from
    -1 to 1 between the centres of the outer pixels of the picture or elements of the map with ``align_corners``, else
    between their outer edges, so they mean the same place at every resolution.
    """

    theta: tuple[float, float, float, float, float, float]
    align_corners: bool = True

    def _grid(self, h: int, w: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        theta = torch.tensor(self.theta, dtype=dtype, device=device).view(1, 2, 3)
        return F.affine_grid(theta, [1, 1, h, w], align_corners=self.align_corners)  # [1, h, w, 2]

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # coordinates need float32
        grid = self._grid(*x.shape[-2:], wide.dtype, x.device).expand(x.shape[0], -1, -1, -1)
        moved = F.grid_sample(wide, grid, mode="bilinear", padding_mode="border", align_corners=self.align_corners)
        return moved.to(x.dtype)

    def valid(self, h: int, w: int, device: torch.device | str | None = None) -> Tensor:
        """True where all four source pixels lie inside the picture (to a thousandth of a pixel)."""
        grid = self._grid(h, w, torch.float32, device)[0]
        size = torch.tensor([w, h], device=device)
        limit = 1 + 0.002 / (size - 1).clamp(min=1) if self.align_corners else 1 - 0.998 / size
        return (grid.abs() <= limit).all(-1)


Transform = Identity | Rescale | Flip | Rot90 | Affine


def sample_transform(
    kind: str,
    generator: torch.Generator | None,
    *,
    rescale: float = 0.3,
    size: int | tuple[int, int],
    align_corners: bool,
) -> Transform:
    """Draw the map A between two views.

    Args:
        kind: "rescale" (nothing is drawn), "flip" (left-right or top-bottom), "rot90" (1, 2 or 3 quarter turns),
            "translate" (whole pixels of the picture, up to 0.15 of its side each way), "affine" (rotation up to 30°
            either way, scale 0.8 to 1.25 and translation as above), "all" (one of these five, equally likely) or
            "none" (``Identity``).
        generator: on the CPU; the draw depends on its state only. None takes torch's default generator.
        rescale: factor of "rescale", in (0, 1].
        size: side of the square picture in pixels, or (height, width).
        align_corners: of the model whose maps are compared.
    """
    h, w = (size, size) if isinstance(size, int) else size

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64, generator=generator).item()

    def choice(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    if kind == "all":
        kind = KINDS[choice(len(KINDS))]
    if kind == "none":
        return Identity()
    if kind == "rescale":
        if not 0 < rescale <= 1:
            raise ValueError(f"rescale must be in (0, 1], the size of view 2 over that of view 1, but is {rescale}")
        return Rescale(rescale, align_corners)
    if kind == "flip":
        return Flip(2 + choice(2))
    if kind == "rot90":
        return Rot90(1 + choice(3))
    if kind not in ("translate", "affine"):
        raise ValueError(f"unknown transform {kind!r}; known: {', '.join(KINDS)}, all, none")
    # A shift of s pixels is 2·s / span in coordinates from -1 to 1; whole pixels leave the picture unblurred.
    span_x, span_y = w - align_corners, h - align_corners
    dx, dy = (2 * round(uniform(-MAX_SHIFT, MAX_SHIFT) * side) / span for side, span in ((w, span_x), (h, span_y)))
    if kind == "translate":
        return Affine((1.0, 0.0, dx, 0.0, 1.0, dy), align_corners)
    angle = math.radians(uniform(-MAX_ROTATION, MAX_ROTATION))
    scale = math.exp(uniform(*map(math.log, SCALE_RANGE)))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    ratio = span_y / span_x  # the rotation is of pixels, not of coordinates
    return Affine((cos, -sin * ratio, dx, sin / ratio, cos, dy), align_corners)
