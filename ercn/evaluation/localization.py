"""Localisation of heat maps against lesion masks, and their heat on healthy eyes.

A map is counted into a histogram of 1024 levels on its fixed [0, 1] scale, once for lesion pixels and once for the
rest. Precision, recall and IoU at every threshold follow from sums of these histograms: pixels of any number of
pictures are pooled in constant memory, exactly for the quantised map, and the patient bootstrap is one matrix
product.

Pixel metrics use pictures with lesions only. FROC counts which lesions the marks of ``froc`` find; false marks count on
healthy pictures too. A picture is healthy where its grade is 0 and it has no lesion mask; a picture without grade and
mask is not counted.

References are maps that were not made from image labels: an unlearned filter, or a network trained on masks. They
get the same metrics as the maps, and are kept apart from them.

The optic disc is bright and no lesion: where the data set has its mask, its pixels count neither as lesion nor as the
rest, except where a lesion lies on it. Where there is no such mask, all pixels count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import distance_transform_edt

from ercn.evaluation import froc
from ercn.evaluation.metrics import bootstrap, entry, samples
from ercn.report.evaluation import Froc, HealthyResult, Heat, IntervalAt, LesionMaps, LocalizationResult, Metrics

ALL = ""  # the union of the lesions, as a kind
LEVELS = 1024
DIFFERENCES = (("refined_cam", "cam"), ("attention", "cam"))
_COMPARED = ("aupr", "aupr_picture", "iou", "froc")
TOLERANCE = 15 / 448  # of the picture's side: the pointing game's 15 pixels, at SEAM's picture size


def levels_of(heat: np.ndarray) -> np.ndarray:
    """The histogram level of each value of a map in [0, 1]."""
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
    """Counts at each level or above, float [..., LEVELS], from the counts at each level."""
    return np.cumsum(counts[..., ::-1], axis=-1, dtype=float)[..., ::-1]


def level_counts(levels: Sequence[np.ndarray]) -> np.ndarray:
    """Histograms int [N, LEVELS] of the levels of each of N pictures."""
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
    """Counts of one kind of lesion, a row for each picture that has it.

    rows: the picture's number. chance: share of pixels near a lesion. lesions: how many. By map: histograms
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
        """Metrics of a constant map: the share of lesion pixels; the share of pixels that count as a hit."""
        pixels = np.array(next(iter(self.histograms.values()))).sum(2)  # [pictures, 2]
        share = float(pixels[:, 1].sum() / pixels.sum())
        each = float((pixels[:, 1] / pixels.sum(1)).mean())
        return {"aupr": share, "aupr_picture": each, "iou": share, "pointing": float(np.mean(self.chance))}


@dataclass
class _Healthy:
    """A row for each healthy picture: its number, and by map the histogram [LEVELS] and the mean heat."""

    rows: list[int] = field(default_factory=list)
    histograms: dict[str, list[np.ndarray]] = field(default_factory=dict)
    heat: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Localization:
    """Accumulates pictures with lesions, for all lesions together and for each kind, and healthy pictures.

    owners: the patient of each picture. discs: number of pictures with lesions whose optic disc was excluded. marks: by
    map, the levels of each picture's false marks. references: names of the maps that are references. contrast: the
    filter that ``settle`` kept. marked: False looks for no marks, for a split without masks.
    """

    owners: list[str] = field(default_factory=list)
    discs: int = 0
    counts: dict[str, _Counts] = field(default_factory=dict)
    healthy: _Healthy = field(default_factory=_Healthy)
    marks: dict[str, list[np.ndarray]] = field(default_factory=dict)
    references: set[str] = field(default_factory=set)
    contrast: str = ""
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
        """Counts a picture that has lesions or is healthy by its label, and skips others.

        maps, references: [S, S] in [0, 1] by name. lesions: masks [S, S] bool by kind. disc: mask of the optic disc,
        if known.
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
            places[name] = place[(counted & (level > 0))[tuple(place.T)]]  # peaks on the disc are no marks
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
        """Patients of the pictures with lesions, in the order of their histograms."""
        return [self.owners[row] for row in self.counts[ALL].rows] if self.counts else []

    @property
    def kinds(self) -> list[str]:
        return sorted(self.counts.keys() - {ALL})

    def settle(self, trials: Iterable[str]) -> None:
        """Keeps of the filters ``trials`` that of the highest pooled AUPR, as the reference "contrast".

        Meant for validation. ``contrast`` is then its name, "" where there is no filter or no lesion.
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
                part["contrast"] = kept[best]
        self.references = self.references - set(trials) | ({"contrast"} if best else set())
        self.contrast = best

    def best_thresholds(self, kind: str = ALL) -> dict[str, float]:
        """Threshold of the highest pooled IoU per map; meant for the validation split."""
        counts = self.counts.get(kind, _Counts())
        return {
            name: int(precision_recall(counts.pooled(name)[None])[2][0].argmax()) / LEVELS for name in counts.histograms
        }

    def thresholds(self) -> dict[str, dict]:
        """``best_thresholds`` of all lesions together, as "maps", and of each kind, as "lesions"."""
        return {"maps": self.best_thresholds(), "lesions": {kind: self.best_thresholds(kind) for kind in self.kinds}}

    def summary(self, thresholds: Mapping[str, dict], *, draws: int, seed: int) -> LocalizationResult | None:
        """Metrics of each map with patient-bootstrap intervals; None without any picture with lesions.

        thresholds: ``thresholds()`` of the validation split; a map without one gets no ``iou`` and no ``recall``.
        ``iou_best`` picks its threshold on this very split and is optimistic. ``aupr_picture`` is the mean AUPR of the
        single pictures. ``recall``, of pixels, is at the map's threshold for all lesions together, also for a kind.
        ``lesion_aupr`` and ``lesion_iou`` are means over the kinds of lesions. ``lesions`` has the same for each kind,
        on the pictures that have it; pixels of other lesions count as the rest there, but marks that find them are not
        false. ``differences``: of ``DIFFERENCES``, draw by draw of the same bootstrap, each map at its own threshold.
        """
        if not self.counts:
            return None
        chosen = {ALL: thresholds.get("maps", {})} | dict(thresholds.get("lesions", {}))
        groups: dict[str, dict[str, dict[str, Metrics]]]
        groups = {kind: {"maps": {}, "references": {}} for kind in (ALL, *self.kinds)}
        compared: dict[str, dict[str, np.ndarray]] = {}
        for name in self.counts[ALL].histograms:
            cuts = {kind: chosen.get(kind, {}).get(name) for kind in groups}
            drawn = samples(self._metric(name, cuts), self.owners, draws, seed)
            compared[name] = {key: drawn[key] for key in _COMPARED if key in drawn}
            part = "references" if name in self.references else "maps"
            entries = {key: entry(sample) for key, sample in drawn.items()}
            for key, value in entries.items():
                kind, _, metric = key.rpartition("/")
                if metric.startswith("sensitivity "):
                    continue
                if metric == "froc":
                    at = key.removesuffix("froc") + "sensitivity "
                    value = Froc(**vars(value), sensitivity=[entries[f"{at}{rate}"].value for rate in froc.RATES])
                elif metric in ("iou", "recall"):
                    value = IntervalAt(**vars(value), threshold=cuts[kind if metric == "iou" else ALL])
                groups[kind][part].setdefault(name, {})[metric] = value
        return LocalizationResult(
            **self._about(ALL, groups[ALL]),
            optic_disc={"excluded": self.discs},
            lesions={kind: LesionMaps(**self._about(kind, groups[kind])) for kind in self.kinds},
            froc={
                "rates": list(froc.RATES),
                "tolerance": TOLERANCE,
                "pictures": len(self.owners),
                "healthy": len(self.healthy.rows),
            },
            differences=[
                {"map": one, "minus": other} | _difference(compared[one], compared[other])
                for one, other in DIFFERENCES
                if one in compared and other in compared
            ],
            contrast=self.contrast,
        )

    def healthy_summary(self, thresholds: Mapping[str, dict], *, draws: int, seed: int) -> HealthyResult | None:
        """Heat of each map on healthy pictures, with patient-bootstrap intervals; None without such pictures.

        ``heat`` is the mean of the map. With the map's threshold from validation, for all lesions together, also
        ``area``, the mean share of pixels that reach it, and ``alarm``, the share of pictures with such a pixel.
        """
        if not self.healthy.rows:
            return None
        patients = [self.owners[row] for row in self.healthy.rows]
        maps: dict[str, Heat] = {}
        references: dict[str, Heat] = {}
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

            part = references if name in self.references else maps
            part[name] = Heat(**bootstrap(metric, patients, draws, seed), threshold=cut)
        return HealthyResult(len(patients), len(set(patients)), maps, references)

    def _metric(self, name: str, cuts: Mapping[str, float | None]):
        """The function weight [R, N] -> {"kind/metric": [R]} of one map, "metric" for all lesions together."""
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

    def _about(self, kind: str, maps: dict[str, dict[str, Metrics]]) -> dict:
        """The fields of ``LesionMaps``."""
        counts = self.counts[kind]
        patients = {self.owners[row] for row in counts.rows}
        about = {"pictures": len(counts.rows), "patients": len(patients), "count": sum(counts.lesions)}
        return about | maps | {"floor": counts.floor()}


def _difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> Metrics:
    """The difference of each metric that both have; samples are paired, draw by draw."""
    return {key: entry(one[key] - other[key]) for key in _COMPARED if key in one and key in other}


def _share(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean [R] of values [N] with weights [R, N]; NaN where all are 0."""
    total = weight.sum(1)
    return np.where(total > 0, weight @ values / np.maximum(total, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where all are."""
    defined = ~np.isnan(values)
    return np.where(defined.any(0), np.nansum(values, 0) / np.maximum(defined.sum(0), 1), np.nan)
