"""Unlearned filters, the floor of every heat map: contrasts of the picture itself.

Lesions that such a filter finds need no network. A map from grades alone must be better than the best filter, and a
phantom on which a filter is good cannot show that a network has learned.

With x [3, S, S] the picture in 0 … 1, g its green channel, B_n the mean over a square of side n S / 256 (in pixels, to
the nearest odd number) and G_s the Gaussian of sigma s S / 256, every map is min(1, 2 f), the same scale in all
pictures and at all sizes:

    box_n      f = max over the channels of |x - B_n x|
    dark_n     f = max(0, B_n g - g)                bright_n   f = max(0, g - B_n g)
    black_hat  f = closing of g - g                 white_hat  f = g - opening of g, with the square of B_17
    dog_s      f = max over the channels of |G_s x - G_4s x|
    green_n    f = |G_1 g - B_n g|
    ratio_n    f = G_1 |L - B_n L| with L = log((r + 1/64) / (g + 1/64)), r the red channel: the density of blood
    log_s      f = (s S / 256)² |Laplacian of G_s g|
    std_n      f = sqrt(B_n g² - (B_n g)²)

Outside the camera's round field, and near its edge, every map is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy import ndimage

GAIN = 2
MARGIN = 4  # of 256: width of the ring within the field's edge that is left out
_NEAR = 65  # of 256: side of the mean that extends the field beyond its edge


def _odd(n: float, size: int) -> int:
    return 2 * round((n * size / 256 - 1) / 2) + 1


def _mean(x: np.ndarray, n: float) -> np.ndarray:
    """B_n of [..., S, S]."""
    return ndimage.uniform_filter(x, (1,) * (x.ndim - 2) + (_odd(n, x.shape[-1]),) * 2, mode="nearest")


def _gauss(x: np.ndarray, s: float) -> np.ndarray:
    """G_s of [..., S, S]."""
    return ndimage.gaussian_filter(x, (0,) * (x.ndim - 2) + (s * x.shape[-1] / 256,) * 2, mode="nearest", truncate=3)


def _box(x: np.ndarray, n: float) -> np.ndarray:
    return np.abs(x - _mean(x, n)).max(0)


def _dark(x: np.ndarray, n: float) -> np.ndarray:
    return np.maximum(_mean(x[1], n) - x[1], 0)


def _bright(x: np.ndarray, n: float) -> np.ndarray:
    return np.maximum(x[1] - _mean(x[1], n), 0)


def _black_hat(x: np.ndarray, n: float) -> np.ndarray:
    return ndimage.black_tophat(x[1], _odd(n, x.shape[-1]), mode="nearest")


def _white_hat(x: np.ndarray, n: float) -> np.ndarray:
    return ndimage.white_tophat(x[1], _odd(n, x.shape[-1]), mode="nearest")


def _dog(x: np.ndarray, s: float) -> np.ndarray:
    return np.abs(_gauss(x, s) - _gauss(x, 4 * s)).max(0)


def _green(x: np.ndarray, n: float) -> np.ndarray:
    return np.abs(_gauss(x[1], 1) - _mean(x[1], n))


def _ratio(x: np.ndarray, n: float) -> np.ndarray:
    density = np.log((x[0] + 1 / 64) / (x[1] + 1 / 64))
    return _gauss(np.abs(density - _mean(density, n)), 1)


def _log(x: np.ndarray, s: float) -> np.ndarray:
    return (s * x.shape[-1] / 256) ** 2 * np.abs(ndimage.laplace(_gauss(x[1], s), mode="nearest"))


def _std(x: np.ndarray, n: float) -> np.ndarray:
    small = x[1] - _mean(x[1], 33)  # small values, whose squares are exact enough in float32
    return np.sqrt(np.maximum(_mean(small**2, n) - _mean(small, n) ** 2, 0))


_CONTRASTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{f"box_{n}": partial(_box, n=n) for n in (9, 17, 33)},
    **{f"dark_{n}": partial(_dark, n=n) for n in (9, 17, 33)},
    **{f"bright_{n}": partial(_bright, n=n) for n in (9, 17, 33)},
    "black_hat": partial(_black_hat, n=17),
    "white_hat": partial(_white_hat, n=17),
    "dog_1": partial(_dog, s=1),
    "dog_2": partial(_dog, s=2),
    "green_49": partial(_green, n=49),
    "ratio_27": partial(_ratio, n=27),
    "log_2": partial(_log, s=2),
    "std_9": partial(_std, n=9),
}


def field(picture: np.ndarray) -> np.ndarray:
    """The camera's round field in a picture uint8 [S, S, 3], without its edge: bool [S, S].

    The border has one color, that of the corners: black, or the gray of ``ercn.data.normalization``. The field is the
    set of pixels that differ from black by 12 % of the picture's range, or from gray at all, and pixels that lie
    between such ones in their row and in their column. A ring of ``MARGIN`` is left out. Without a border, all is
    field.
    """
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]].astype(np.float32)
    value = np.abs(picture - np.median(corners, axis=0)).max(2).astype(np.float32)
    even = np.median(corners) > 64  # gray, which is the same everywhere
    inside = _mean(value, 5) > (4 if even else max(8, 0.12 * np.percentile(value, 95)))
    if np.ptp(corners, axis=0).max() > 16 or not inside.any():
        return np.ones(value.shape, bool)
    within = _between(inside, 0) & _between(inside, 1)
    return ndimage.minimum_filter(within, 2 * round(MARGIN * len(value) / 256) + 1, mode="nearest")


def _between(inside: np.ndarray, axis: int) -> np.ndarray:
    """Between the first and the last True along the axis."""
    after = np.flip(np.maximum.accumulate(np.flip(inside, axis), axis), axis)
    return np.maximum.accumulate(inside, axis) & after


def contrasts(picture: np.ndarray, names: Sequence[str] = tuple(_CONTRASTS)) -> dict[str, np.ndarray]:
    """The maps of these names of a picture uint8 [S, S, 3], float32 [S, S] in [0, 1]; faster than one by one.

    Beyond its edge the field continues as the mean of the pixels nearby, so that the edge itself is no contrast.
    ValueError for a picture of another shape or type.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or len(picture) != picture.shape[1]:
        raise ValueError(f"picture must be uint8 [S, S, 3]; got {picture.dtype} {list(picture.shape)}")
    inside = field(picture)
    x = picture.transpose(2, 0, 1).astype(np.float32) / 255
    share = np.maximum(_mean(inside.astype(np.float32), _NEAR), 1e-3)
    x = np.where(inside, x, _mean(x * inside, _NEAR) / share)
    return {name: np.minimum(GAIN * _CONTRASTS[name](x), 1) * inside for name in names}


def contrast(picture: np.ndarray, name: str) -> np.ndarray:
    """One of ``contrasts``."""
    return contrasts(picture, (name,))[name]


FILTERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {name: partial(contrast, name=name) for name in _CONTRASTS}
