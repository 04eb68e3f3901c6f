"""Localisation of heat maps against lesion masks, and their heat on healthy eyes.

A map is counted into a histogram of 1024 levels on its fixed [0, 1] scale, once for lesion pixels and once for the
rest. Precision, recall and IoU at every threshold follow from sums of these histograms, so pixels of any number of
pictures are pooled in constant memory, exactly for the quantised map, and the patient bootstrap is one matrix
product.

Pictures with lesions have pixel metrics; lesions are found or missed by the marks of ``froc``, whose false marks count
on healthy pictures too. A picture is healthy where its label says grade 0 and it has no lesion mask; one without
label or mask counts nowhere.

References are maps that no model of image labels made (a filter, or what knows masks). They have every metric that the
maps have, apart from them.

The optic disc is the brightest thing in a fundus and no lesion: where the data set has its mask, its pixels count
neither as lesion nor as the rest, except those on which a lesion lies. Where there is none, all pixels count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt

from ercn.evaluation import froc
from ercn.evaluation.metrics import bootstrap, entry, samples

ALL = ""  # the union of the lesions, as a kind
LEVELS = 1024
DIFFERENCES = (("refined_cam", "cam"), ("attention", "cam"))
_COMPARED = ("aupr", "aupr_picture", "iou", "froc")
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


def at_least(counts: np.ndarray) -> np.ndarray:
    """How many are at each level or above, float [..., LEVELS], from how many are at it."""
    return np.cumsum(counts[..., ::-1], axis=-1, dtype=float)[..., ::-1]


def level_counts(levels: Sequence[np.ndarray]) -> np.ndarray:
    """How many of each picture's levels are each level: int [N, LEVELS]."""
    return np.array([np.bincount(own, minlength=LEVELS) for own in levels])


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and IoU [R, LEVELS] of {map >= level / LEVELS} from histograms [R, 2, LEVELS].

    Recall and IoU are NaN where there is no lesion.
    """
    above = at_least(counts)
    false, true = above[:, 0], above[:, 1]
    lesion = np.where(true[:, :1] > 0, true[:, :1], np.nan)
    return true / np.maximum(true + false, 1e-300), true / lesion, true / (lesion + false)


def average_precision(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Pixel AUPR [R] as average precision: the sum over thresholds of (recall gained) * precision."""
    gained = recall - np.concatenate([recall[:, 1:], np.zeros((len(recall), 1))], axis=1)
    return (gained * precision).sum(1)


@dataclass
class _Counts:
    """Of one kind of lesion, a row for each picture that has it.

    rows: the picture's number. chance: share of pixels that are near one. lesions: how many. By map: histograms
    [2, LEVELS], hits of the pointing game, and found, the level of the best mark of each lesion that has one.
    """

    rows: list[int] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    lesions: list[int] = field(default_factory=list)
    histograms: dict[str, list[np.ndarray]] = field(default_factory=dict)
    hits: dict[str, list[float]] = field(default_factory=dict)
    found: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def pooled(self, name: str) -> np.ndarray:
        return np.sum(self.histograms[name], axis=0)

    def floor(self) -> dict[str, float]:
        """What a constant map reaches: the share of lesion pixels; the share of pixels that count as a hit."""
        pixels = np.array(next(iter(self.histograms.values()))).sum(2)  # [pictures, 2]
        share = float(pixels[:, 1].sum() / pixels.sum())
        each = float((pixels[:, 1] / pixels.sum(1)).mean())
        return {"aupr": share, "aupr_picture": each, "iou": share, "pointing": float(np.mean(self.chance))}


@dataclass
class _Healthy:
    """A row for each healthy picture: its number, and by map the histogram [LEVELS] and the mean of its heat."""

    rows: list[int] = field(default_factory=list)
    histograms: dict[str, list[np.ndarray]] = field(default_factory=dict)
    heat: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Localization:
    """Accumulates pictures with lesions, for all lesions together and for each kind, and healthy pictures.

    owners: the patient of each. discs: in how many pictures with lesions the optic disc was left out. marks: by map,
    of each picture the levels of the marks that find no lesion. references: names of the maps that are references.
    marked: False looks for no marks, for a split without masks, where no lesion could be found.
    """

    owners: list[str] = field(default_factory=list)
    discs: int = 0
    counts: dict[str, _Counts] = field(default_factory=dict)
    healthy: _Healthy = field(default_factory=_Healthy)
    marks: dict[str, list[np.ndarray]] = field(default_factory=dict)
    references: set[str] = field(default_factory=set)
    marked: bool = True

    def add(
        self,
        maps: Mapping[str, np.ndarray],
        lesions: Mapping[str, np.ndarray],
        patient: str,
        disc: np.ndarray | None = None,
        *,
        healthy: bool = False,
        references: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Counts a picture that has lesions, or is healthy by its label; every other one is passed over.

        maps, references: [S, S] in [0, 1] by name. lesions: masks [S, S] bool by kind. disc: the optic disc's mask, if
        known.
        """
        present = {kind: mask for kind, mask in lesions.items() if mask.any()}
        if not present and not healthy:
            return
        heats = {**maps, **(references or {})}
        self.references |= set(references or {})
        size = next(iter(heats.values())).shape[0]
        union = np.logical_or.reduce(list(present.values())) if present else np.zeros((size, size), bool)
        counted = np.ones_like(union) if disc is None else ~disc | union
        row, tolerance = len(self.owners), TOLERANCE * size
        self.owners.append(patient)
        self.discs += int(bool(present) and not counted.all())
        levels = {name: levels_of(heat) for name, heat in heats.items()}
        places = {}
        for name, level in levels.items() if self.marked else ():
            place = froc.peaks(heats[name], int(tolerance))
            places[name] = place[(counted & (level > 0))[tuple(place.T)]]  # marks on the disc are none
        close = np.zeros_like(union)
        for kind, mask in ({ALL: union} | present).items() if present else ():
            near = distance_transform_edt(~mask) <= tolerance
            close |= near
            spots = froc.Lesions(mask, tolerance)
            own = self.counts.setdefault(kind, _Counts())
            own.rows.append(row)
            own.chance.append(float(near[counted].mean()))
            own.lesions.append(spots.count)
            for name, heat in heats.items():
                own.histograms.setdefault(name, []).append(histograms(levels[name], mask, counted))
                own.hits.setdefault(name, []).append(pointing(heat, near, counted))
                at = places[name][near[tuple(places[name].T)]]
                own.found.setdefault(name, []).append(spots.found(at, levels[name][tuple(at.T)]))
        for name, place in places.items():
            at = place[~close[tuple(place.T)]]
            self.marks.setdefault(name, []).append(levels[name][tuple(at.T)])
        if not present:
            self.healthy.rows.append(row)
            for name, heat in heats.items():
                spread = np.bincount(levels[name][counted], minlength=LEVELS).astype(np.int32)
                self.healthy.histograms.setdefault(name, []).append(spread)
                self.healthy.heat.setdefault(name, []).append(float(heat[counted].mean()))

    @property
    def patients(self) -> list[str]:
        """Of the pictures with lesions, in the order of their histograms."""
        return [self.owners[row] for row in self.counts[ALL].rows] if self.counts else []

    @property
    def kinds(self) -> list[str]:
        return sorted(self.counts.keys() - {ALL})

    def settle(self, trials: Iterable[str], name: str) -> str:
        """Keeps of the references ``trials`` that of the highest pooled AUPR, as ``name``; meant for validation.

        Returns which it was, or "" where there is none or no lesion; then none is kept.
        """
        trials, best = list(trials), ""
        if self.counts and trials:
            precision, recall, _ = precision_recall(np.stack([self.counts[ALL].pooled(trial) for trial in trials]))
            best = trials[int(average_precision(precision, recall).argmax())]
        parts = [self.marks, self.healthy.histograms, self.healthy.heat]
        parts += [part for own in self.counts.values() for part in (own.histograms, own.hits, own.found)]
        for part in parts:
            kept = {trial: part.pop(trial) for trial in trials if trial in part}
            if best in kept:
                part[name] = kept[best]
        self.references = self.references - set(trials) | ({name} if best else set())
        return best

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

        thresholds: ``thresholds()`` of the validation split; a map without one gets no ``iou`` and no ``recall``.
        ``iou_best`` picks its threshold on this very split and is optimistic. ``aupr_picture`` is the mean of the
        pictures' own AUPR. ``recall``, of pixels, is at the map's threshold for all lesions together, also for a kind.
        ``froc`` is the mean of its ``sensitivity`` at ``froc.RATES``. ``lesion_aupr`` and ``lesion_iou`` are means over
        the kinds of lesions. ``lesions`` has the same for each kind, on the pictures that have it; pixels of other
        lesions count as the rest there, but marks that find them are not false. ``floor``: what a constant map reaches.
        ``differences``: of ``DIFFERENCES``, draw by draw of the same bootstrap, each map at its own threshold.
        """
        if not self.counts:
            return None
        chosen = {ALL: thresholds.get("maps", {})} | dict(thresholds.get("lesions", {}))
        groups: dict[str, dict] = {kind: {"maps": {}, "references": {}} for kind in (ALL, *self.kinds)}
        compared: dict[str, dict[str, np.ndarray]] = {}
        for name in self.counts[ALL].histograms:
            cuts = {kind: chosen.get(kind, {}).get(name) for kind in groups}
            drawn = samples(self._metric(name, cuts), self.owners, draws, seed)
            compared[name] = {key: drawn[key] for key in _COMPARED if key in drawn}
            part = "references" if name in self.references else "maps"
            for key, sample in drawn.items():
                kind, _, metric = key.rpartition("/")
                own = groups[kind][part].setdefault(name, {})
                if metric.startswith("sensitivity "):
                    own["froc"].setdefault("sensitivity", []).append(entry(sample)["value"])
                    continue
                own[metric] = entry(sample)
                if metric in ("iou", "recall"):
                    own[metric]["threshold"] = cuts[kind if metric == "iou" else ALL]
        result = {kind: self._part(kind, group) for kind, group in groups.items()}
        return result[ALL] | {
            "optic_disc": {"excluded": self.discs},
            "lesions": {kind: result[kind] for kind in self.kinds},
            "froc": {
                "rates": list(froc.RATES),
                "tolerance": TOLERANCE,
                "pictures": len(self.owners),
                "healthy": len(self.healthy.rows),
            },
            "differences": [
                {"map": one, "minus": other} | _difference(compared[one], compared[other])
                for one, other in DIFFERENCES
                if one in compared and other in compared
            ],
        }

    def healthy_summary(self, thresholds: Mapping[str, dict], *, draws: int, seed: int) -> dict | None:
        """JSON-ready heat of each map on healthy pictures, with patient-bootstrap intervals; None where there is none.

        ``heat`` is the mean of the map. With the map's threshold from validation, of all lesions together, also
        ``area``, the mean share of pixels that reach it, and ``alarm``, the share of pictures of which any pixel does.
        """
        if not self.healthy.rows:
            return None
        patients = [self.owners[row] for row in self.healthy.rows]
        result: dict[str, Any] = {"pictures": len(patients), "patients": len(set(patients))}
        result |= {"maps": {}, "references": {}}
        for name, spreads in self.healthy.histograms.items():
            columns = {"heat": np.array(self.healthy.heat[name])}
            cut = thresholds.get("maps", {}).get(name)
            if cut is not None:
                spread = np.array(spreads)
                above = spread[:, round(cut * LEVELS) :].sum(1)
                columns |= {"area": above / spread.sum(1), "alarm": (above > 0).astype(float)}
            table = np.stack(list(columns.values()), axis=1)

            def metric(weight: np.ndarray, names=tuple(columns), table=table) -> dict[str, np.ndarray]:
                return dict(zip(names, (weight @ table / weight.sum(1, keepdims=True)).T))

            part = "references" if name in self.references else "maps"
            result[part][name] = bootstrap(metric, patients, draws, seed) | {"threshold": cut}
        return result

    def _metric(self, name: str, cuts: Mapping[str, float | None]):
        """weight [R, N] -> {"kind/metric": [R]} of one map, with the bare metric's name for all lesions together."""
        counts = {kind: self.counts[kind] for kind in cuts}
        flat = {kind: np.array(c.histograms[name], float).reshape(-1, 2 * LEVELS) for kind, c in counts.items()}
        hits = {kind: np.array(c.hits[name]) for kind, c in counts.items()}
        curves = {kind: precision_recall(np.array(c.histograms[name])) for kind, c in counts.items()}
        each = {kind: average_precision(curve[0], curve[1]) for kind, curve in curves.items()}
        found = {kind: at_least(level_counts(c.found[name])) for kind, c in counts.items()}
        marks = at_least(level_counts(self.marks[name]))

        def metric(weight: np.ndarray) -> dict[str, np.ndarray]:
            values = {}
            points = froc.operating_points(weight @ marks, weight.sum(1))
            for kind, cut in cuts.items():
                own = weight[:, counts[kind].rows]
                prefix = f"{kind}/" if kind else ""
                precision, recall, iou = precision_recall((own @ flat[kind]).reshape(-1, 2, LEVELS))
                values[f"{prefix}aupr"] = average_precision(precision, recall)
                values[f"{prefix}aupr_picture"] = _share(own, each[kind])
                values[f"{prefix}iou_best"] = iou.max(1)
                if cut is not None:
                    values[f"{prefix}iou"] = iou[:, round(cut * LEVELS)]
                if cuts[ALL] is not None:
                    values[f"{prefix}recall"] = recall[:, round(cuts[ALL] * LEVELS)]
                values[f"{prefix}pointing"] = _share(own, hits[kind])
                at = froc.sensitivities(own @ found[kind], points, own @ np.array(counts[kind].lesions))
                values[f"{prefix}froc"] = at.mean(1)
                values |= {f"{prefix}sensitivity {rate}": at[:, i] for i, rate in enumerate(froc.RATES)}
            for key in ("aupr", "iou"):
                parts = [values[f"{kind}/{key}"] for kind in self.kinds if f"{kind}/{key}" in values]
                if parts:
                    values[f"lesion_{key}"] = _mean(np.stack(parts))
            return values

        return metric

    def _part(self, kind: str, group: dict[str, dict]) -> dict:
        counts = self.counts[kind]
        patients = {self.owners[row] for row in counts.rows}
        about = {"pictures": len(counts.rows), "patients": len(patients), "count": sum(counts.lesions)}
        return about | group | {"floor": counts.floor()}


def _difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Of each metric that both have; samples are paired, draw by draw."""
    return {key: entry(one[key] - other[key]) for key in _COMPARED if key in one and key in other}


def _share(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean [R] of values [N] with weights [R, N]; NaN where all are 0."""
    total = weight.sum(1)
    return np.where(total > 0, weight @ values / np.maximum(total, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return np.where(defined.any(0), np.nansum(values, 0) / np.maximum(defined.sum(0), 1), np.nan)
