"""Localisation of heat maps against lesion masks, on pictures that have lesions.

A map is counted into a histogram of 1024 levels on its fixed [0, 1] scale, once for lesion pixels and once for the
rest. Precision, recall and IoU at every threshold follow from sums of these histograms, so pixels of any number of
pictures are pooled in constant memory, exactly for the quantised map, and the patient bootstrap is one matrix
product.

The optic disc is the brightest thing in a fundus and no lesion: where the data set has its mask, its pixels count
neither as lesion nor as the rest, except those on which a lesion lies. Where there is none, all pixels count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import distance_transform_edt

from ercn.training.metrics import bootstrap

ALL = ""  # the union of the lesions, as a kind
LEVELS = 1024
TOLERANCE = 15 / 448  # of the picture's side: the pointing game's 15 pixels, at SEAM's picture size


def levels_of(heat: np.ndarray) -> np.ndarray:
    """The histogram's level of each value of a map in [0, 1]."""
    return np.minimum((heat * LEVELS).astype(np.int16), LEVELS - 1)


def histograms(level: np.ndarray, lesion: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Counts int32 [2, LEVELS] of a map's levels [S, S] at the pixels ``counted``: outside and inside the lesions."""
    inside = np.bincount(level[lesion & counted], minlength=LEVELS)
    outside = np.bincount(level[~lesion & counted], minlength=LEVELS)
    return np.stack([outside, inside]).astype(np.int32)


def pointing(heat: np.ndarray, near: np.ndarray, counted: np.ndarray) -> float:
    """Pointing game (Zhang et al. 2018): is the maximum in ``near`` [S, S] bool? Ties count by their share."""
    return float(near[counted & (heat == heat[counted].max())].mean())


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and IoU [R, LEVELS] of {map >= level / LEVELS} from histograms [R, 2, LEVELS].

    Recall and IoU are NaN where there is no lesion.
    """
    above = np.cumsum(counts[..., ::-1], axis=-1, dtype=float)[..., ::-1]
    false, true = above[:, 0], above[:, 1]
    lesion = np.where(true[:, :1] > 0, true[:, :1], np.nan)
    return true / np.maximum(true + false, 1e-300), true / lesion, true / (lesion + false)


def average_precision(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Pixel AUPR [R] as average precision: the sum over thresholds of (recall gained) * precision."""
    gained = recall - np.concatenate([recall[:, 1:], np.zeros((len(recall), 1))], axis=1)
    return (gained * precision).sum(1)


@dataclass
class _Counts:
    """Of one kind of lesion, a row for each picture that has it: its number, its histograms and hits by map."""

    rows: list[int] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    histograms: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hits: dict[str, list[float]] = field(default_factory=dict)

    def pooled(self, name: str) -> np.ndarray:
        return np.sum(self.histograms[name], axis=0)

    def floor(self) -> dict[str, float]:
        """What a constant map reaches: the share of lesion pixels; the share of pixels that count as a hit."""
        pixels = self.pooled(next(iter(self.histograms))).sum(1)
        share = float(pixels[1] / pixels.sum())
        return {"aupr": share, "iou": share, "pointing": float(np.mean(self.chance))}


@dataclass
class Localization:
    """Accumulates pictures with lesions, for all lesions together and for each kind.

    patients: of those pictures. discs: how many of them had the optic disc left out.
    """

    patients: list[str] = field(default_factory=list)
    discs: int = 0
    counts: dict[str, _Counts] = field(default_factory=dict)

    def add(
        self,
        maps: Mapping[str, np.ndarray],
        lesions: Mapping[str, np.ndarray],
        patient: str,
        disc: np.ndarray | None = None,
    ) -> None:
        """maps: [S, S] in [0, 1] by name. lesions: masks [S, S] bool by kind. disc: the optic disc's mask, if known."""
        found = {kind: mask for kind, mask in lesions.items() if mask.any()}
        if not found:
            return
        union = np.logical_or.reduce(list(found.values()))
        counted = np.ones_like(union) if disc is None else ~disc | union
        self.discs += int(not counted.all())
        levels = {name: levels_of(heat) for name, heat in maps.items()}
        for kind, mask in ({ALL: union} | found).items():
            near = distance_transform_edt(~mask) <= TOLERANCE * mask.shape[0]
            own = self.counts.setdefault(kind, _Counts())
            own.rows.append(len(self.patients))
            own.chance.append(float(near[counted].mean()))
            for name, heat in maps.items():
                own.histograms.setdefault(name, []).append(histograms(levels[name], mask, counted))
                own.hits.setdefault(name, []).append(pointing(heat, near, counted))
        self.patients.append(patient)

    @property
    def kinds(self) -> list[str]:
        return sorted(self.counts.keys() - {ALL})

    def best_thresholds(self, kind: str = ALL) -> dict[str, float]:
        """Threshold of the highest pooled IoU per map; meant for the validation split."""
        counts = self.counts.get(kind, _Counts())
        return {
            name: int(precision_recall(counts.pooled(name)[None])[2][0].argmax()) / LEVELS for name in counts.histograms
        }

    def thresholds(self) -> dict[str, dict]:
        """``best_thresholds`` of all lesions together, as "maps", and of each kind, as "lesions"."""
        return {"maps": self.best_thresholds(), "lesions": {kind: self.best_thresholds(kind) for kind in self.kinds}}

    def summary(self, thresholds: Mapping[str, dict], *, draws: int, seed: int) -> dict | None:
        """JSON-ready metrics per map with patient-bootstrap intervals; None without any picture with lesions.

        thresholds: ``thresholds()`` of the validation split; a map without one gets no ``iou``. ``iou_best`` picks its
        threshold on this very split and is optimistic. ``lesion_aupr`` and ``lesion_iou`` are means over the kinds of
        lesions. ``lesions`` has the same for each kind, on the pictures that have it; pixels of other lesions count
        as the rest there. ``floor``: what a constant map reaches.
        """
        if not self.patients:
            return None
        chosen = {ALL: thresholds.get("maps", {})} | dict(thresholds.get("lesions", {}))
        by_kind: dict[str, dict] = {kind: {} for kind in (ALL, *self.kinds)}
        for name in self.counts[ALL].histograms:
            cuts = {kind: chosen.get(kind, {}).get(name) for kind in by_kind}
            values = bootstrap(self._metric(name, cuts), self.patients, draws, seed)
            for key, value in values.items():
                kind, _, metric = key.rpartition("/")
                by_kind[kind].setdefault(name, {})[metric] = value
                if metric == "iou":
                    value["threshold"] = cuts[kind]
        result = {kind: self._part(kind, maps) for kind, maps in by_kind.items()}
        lesions = {kind: result[kind] for kind in self.kinds}
        return result[ALL] | {"optic_disc": {"excluded": self.discs}, "lesions": lesions}

    def _metric(self, name: str, cuts: Mapping[str, float | None]):
        """weight [R, N] -> {"kind/metric": [R]} of one map, with the bare metric's name for all lesions together."""
        counts = {kind: self.counts[kind] for kind in cuts}
        flat = {kind: np.array(c.histograms[name], float).reshape(-1, 2 * LEVELS) for kind, c in counts.items()}
        hits = {kind: np.array(c.hits[name]) for kind, c in counts.items()}

        def metric(weight: np.ndarray) -> dict[str, np.ndarray]:
            values = {}
            for kind, cut in cuts.items():
                own = weight[:, self.counts[kind].rows]
                prefix = f"{kind}/" if kind else ""
                precision, recall, iou = precision_recall((own @ flat[kind]).reshape(-1, 2, LEVELS))
                values[f"{prefix}aupr"] = average_precision(precision, recall)
                values[f"{prefix}iou_best"] = iou.max(1)
                if cut is not None:
                    values[f"{prefix}iou"] = iou[:, round(cut * LEVELS)]
                total = own.sum(1)
                values[f"{prefix}pointing"] = np.where(total > 0, own @ hits[kind] / np.maximum(total, 1), np.nan)
            for key in ("aupr", "iou"):
                each = [values[f"{kind}/{key}"] for kind in self.kinds if f"{kind}/{key}" in values]
                if each:
                    values[f"lesion_{key}"] = _mean(np.stack(each))
            return values

        return metric

    def _part(self, kind: str, maps: dict[str, dict]) -> dict:
        counts = self.counts[kind]
        patients = {self.patients[row] for row in counts.rows}
        return {"pictures": len(counts.rows), "patients": len(patients), "maps": maps, "floor": counts.floor()}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return np.where(defined.any(0), np.nansum(values, 0) / np.maximum(defined.sum(0), 1), np.nan)
