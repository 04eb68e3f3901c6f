"""Localisation of heat maps against lesion masks, on pictures that have lesions.

A map is counted into a histogram of 1024 levels on its fixed [0, 1] scale, once for lesion pixels and once for the
rest. Precision, recall and IoU at every threshold follow from sums of these histograms, so pixels of any number of
pictures are pooled in constant memory, exactly for the quantised map, and the patient bootstrap is one matrix
product.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import distance_transform_edt

from ercn.training.metrics import bootstrap

LEVELS = 1024
TOLERANCE = 15 / 448  # of the picture's side: the pointing game's 15 pixels, at SEAM's picture size


def histograms(heat: np.ndarray, lesion: np.ndarray) -> np.ndarray:
    """Counts [2, LEVELS] of a map [S, S] in [0, 1]: row 0 outside, row 1 inside the lesions [S, S] bool."""
    level = np.minimum((heat * LEVELS).astype(int), LEVELS - 1)
    return np.stack([np.bincount(level[~lesion], minlength=LEVELS), np.bincount(level[lesion], minlength=LEVELS)])


def pointing(heat: np.ndarray, near: np.ndarray) -> float:
    """Pointing game (Zhang et al. 2018): is the maximum in ``near`` [S, S] bool? Ties count by their share."""
    return float(near[heat == heat.max()].mean())


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and IoU [R, LEVELS] of {map >= level / LEVELS} from histograms [R, 2, LEVELS]."""
    above = np.cumsum(counts[..., ::-1], axis=-1, dtype=float)[..., ::-1]
    false, true = above[:, 0], above[:, 1]
    lesion = np.maximum(true[:, :1], 1e-300)
    return true / np.maximum(true + false, 1e-300), true / lesion, true / (lesion + false)


def average_precision(counts: np.ndarray) -> np.ndarray:
    """Pixel AUPR as average precision, sum over thresholds of (recall gained) * precision, from [R, 2, LEVELS]."""
    precision, recall, _ = precision_recall(counts)
    gained = recall - np.concatenate([recall[:, 1:], np.zeros((len(recall), 1))], axis=1)
    return (gained * precision).sum(1)


@dataclass
class Localization:
    """Accumulates pictures with lesions; ``add`` takes maps {name: [S, S] in [0, 1]} and their lesion mask [S, S]."""

    patients: list[str] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    counts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hits: dict[str, list[float]] = field(default_factory=dict)

    def add(self, maps: dict[str, np.ndarray], lesion: np.ndarray, patient: str) -> None:
        lesion = lesion.astype(bool)
        if not lesion.any():
            return
        near = distance_transform_edt(~lesion) <= TOLERANCE * lesion.shape[0]
        self.patients.append(patient)
        self.chance.append(float(near.mean()))
        for name, heat in maps.items():
            self.counts.setdefault(name, []).append(histograms(heat, lesion))
            self.hits.setdefault(name, []).append(pointing(heat, near))

    def best_thresholds(self) -> dict[str, float]:
        """Threshold of the highest pooled IoU per map; meant for the validation split."""
        pooled = {name: np.sum(c, axis=0)[None] for name, c in self.counts.items()}
        return {name: int(precision_recall(c)[2][0].argmax()) / LEVELS for name, c in pooled.items()}

    def summary(self, thresholds: dict[str, float], *, draws: int, seed: int) -> dict | None:
        """JSON-ready metrics per map with patient-bootstrap intervals; None without any picture with lesions.

        thresholds: from validation; a map without one gets no ``iou``. ``iou_best`` picks its threshold on this very
        split and is optimistic. ``floor``: what a constant map reaches (share of lesion pixels; share of pixels that
        count as a hit).
        """
        if not self.patients:
            return None
        maps = {}
        for name, counts in self.counts.items():
            flat = np.stack(counts).reshape(len(counts), -1).astype(float)  # [N, 2 * LEVELS]
            hits = np.array(self.hits[name])
            threshold = thresholds.get(name)

            def metric(weight: np.ndarray, flat=flat, hits=hits, threshold=threshold) -> dict[str, np.ndarray]:
                pooled = (weight @ flat).reshape(-1, 2, LEVELS)
                iou = precision_recall(pooled)[2]
                values = {"aupr": average_precision(pooled), "iou_best": iou.max(1)}
                if threshold is not None:
                    values["iou"] = iou[:, round(threshold * LEVELS)]
                return values | {"pointing": weight @ hits / weight.sum(1)}

            maps[name] = bootstrap(metric, self.patients, draws, seed)
            if threshold is not None:
                maps[name]["iou"]["threshold"] = threshold
        pixels = np.sum(next(iter(self.counts.values())), axis=(0, 2))
        floor = {"aupr": float(pixels[1] / pixels.sum()), "pointing": float(np.mean(self.chance))}
        floor["iou"] = floor["aupr"]
        return {"pictures": len(self.patients), "patients": len(set(self.patients)), "maps": maps, "floor": floor}
