"""FROC by lesion: the share of lesions that a map finds against its false marks per picture.

A lesion is a connected component (8 neighbours) of a mask. A mark is a local maximum of the map, the highest value of a
square window of half side ``TOLERANCE``; equal neighbours are one mark, in their middle. It finds every lesion with a
pixel within ``TOLERANCE``, and is false where it finds no lesion of any kind. Its confidence is the map's value, so one
list of marks serves every threshold: those of threshold t are the peaks of the components of {map >= t}. If whole
components were marks, one that floods the picture would find all lesions without a false mark.

The score is the mean sensitivity at 1/8, 1/4, 1/2, 1, 2, 4 and 8 false marks per picture, healthy pictures included:
Niemeijer et al. 2010 (Retinopathy Online Challenge, doi 10.1109/TMI.2009.2033909), as in LUNA16 and CAMELYON16.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import label, maximum_filter

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_NEIGHBOURS = np.ones((3, 3), int)


def peaks(heat: np.ndarray, radius: int) -> np.ndarray:
    """Row and column, int [C, 2], of the local maxima above 0 of a map [S, S]."""
    top = (heat == maximum_filter(heat, 2 * radius + 1)) & (heat > 0)
    place = np.argwhere(top)
    own = label(top, _NEIGHBOURS)[0][top] - 1  # in the order of argwhere
    size = np.bincount(own)
    middle = np.stack([np.bincount(own, place[:, axis]) / size for axis in (0, 1)], axis=1)
    order = np.lexsort((((place - middle[own]) ** 2).sum(1), own))
    return place[order[np.unique(own[order], return_index=True)[1]]]


class Lesions:
    """The numbered lesions of a mask [S, S]. count: how many there are."""

    def __init__(self, mask: np.ndarray, tolerance: float) -> None:
        reach = int(tolerance)
        numbered, self.count = label(mask, _NEIGHBOURS)
        self._numbered = np.pad(numbered, reach)
        y, x = np.mgrid[: 2 * reach + 1, : 2 * reach + 1]
        self._window = np.stack(np.nonzero((y - reach) ** 2 + (x - reach) ** 2 <= tolerance**2))

    def found(self, place: np.ndarray, level: np.ndarray) -> np.ndarray:
        """For each lesion that is found, the highest level of the marks that find it: int [at most ``count``].

        place: marks [C, 2], as of ``peaks``. level: their levels [C], above 0.
        """
        near = self._numbered[tuple(place.T[:, :, None] + self._window[:, None])]  # [C, window]
        best = np.zeros(self.count + 1, level.dtype)
        np.maximum.at(best, near, np.broadcast_to(level[:, None], near.shape))
        return best[1:][best[1:] > 0]


def operating_points(false: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """The lowest level int [R, 7] with at most each of ``RATES`` false marks per picture; LEVELS where there is none.

    false: number of false marks at each level or above, [R, LEVELS]. pictures: number of pictures, [R].
    """
    return np.stack([(false > rate * pictures[:, None]).sum(1) for rate in RATES], axis=1)


def sensitivities(found: np.ndarray, points: np.ndarray, lesions: np.ndarray) -> np.ndarray:
    """Share [R, 7] of the lesions found at ``operating_points``; not interpolated, NaN without lesions.

    found: number of lesions found at each level or above, [R, LEVELS]. lesions: number of lesions, [R].
    """
    reached = np.take_along_axis(np.pad(found, ((0, 0), (0, 1))), points, axis=1)
    return reached / np.where(lesions > 0, lesions, np.nan)[:, None]
