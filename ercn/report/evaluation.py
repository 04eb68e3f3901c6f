"""The result of an evaluation, ``evaluation/<name>.json``, as types that ``evaluate`` writes and reports read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from ercn._files import read_json


@dataclass(frozen=True)
class Interval:
    """A metric's value and its 95 % interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class IntervalAt(Interval):  # of {map >= threshold}
    threshold: float


@dataclass(frozen=True)
class Froc(Interval):  # sensitivity at each of froc.RATES
    sensitivity: list[float | None]


Metrics = dict[str, Interval]  # by name


@dataclass(frozen=True)
class Grading:
    """Grading metrics of one split; see ``ercn.evaluation.metrics.grading``. threshold: of referable DR."""

    threshold: float
    metrics: Metrics
    fixed_specificity: dict[str, dict[str, Any]]
    confusion: list[list[int]]
    majority: dict[str, float]
    recall: list[float | None]
    missing: list[int]
    reliability: dict[str, list[dict[str, float]]]
    roc: dict[str, list[float]] | None


@dataclass(frozen=True)
class LesionMaps:
    """Metrics by map, on ``pictures`` with ``count`` lesions of one kind or of all; floor: those of a constant map."""

    pictures: int
    patients: int
    count: int
    maps: dict[str, Metrics]
    references: dict[str, Metrics]
    floor: dict[str, float]


@dataclass(frozen=True)
class LocalizationResult(LesionMaps):
    """All lesions together, and ``lesions`` by kind, as ``Localization.summary`` explains.

    differences: "map", "minus" and intervals by metric. contrast: the filter among the references, "" for none.
    """

    optic_disc: dict[str, int]
    lesions: dict[str, LesionMaps]
    froc: dict[str, Any]
    differences: list[dict[str, Any]]
    contrast: str


class Heat(TypedDict, total=False):  # area and alarm: with a threshold only
    heat: Interval
    area: Interval
    alarm: Interval
    threshold: float | None


@dataclass(frozen=True)
class HealthyResult:
    """For each map: intervals of its heat on healthy pictures, and the threshold or None."""

    pictures: int
    patients: int
    maps: dict[str, Heat]
    references: dict[str, Heat]


@dataclass(frozen=True)
class EvaluationResult:
    """What ``evaluation/<name>.json`` holds.

    class_names: those that model and data have in common. scale: names of both scales, and where referable DR begins.
    map_thresholds: the data and split that chose the maps' thresholds. gallery: entries of ``write_gallery``.
    None: scale and grading without grades, localization without lesion masks, healthy without healthy pictures.
    """

    name: str
    notice: str
    dataset: str
    manifest: str
    bootstrap: dict[str, Any]
    temperature: float
    views: dict[str, Any]
    pictures: int
    patients: int
    class_names: list[str]
    scale: dict[str, Any] | None
    grading: Grading | None
    localization: LocalizationResult | None
    healthy: HealthyResult | None
    map_thresholds: str | None
    disclosure: str
    unreadable: list[str]
    gallery: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the fields of ``grading`` stand beside the others, or "metrics" is None."""
        result: dict[str, Any] = {}
        for name, value in asdict(self).items():
            result |= (value or {"metrics": None}) if name == "grading" else {name: value}
        return result


def read_evaluations(run: Path) -> tuple[dict[str, EvaluationResult], list[str]]:
    """The evaluations of a run by name, test first and val last; and the files left out, of an older version.

    ValueError names a file that lacks a key.
    """
    paths = (run / "evaluation").glob("*.json")
    paths = sorted(paths, key=lambda path: (path.stem != "test", path.stem == "val", path))
    read = {path: read_json(path) for path in paths}
    old = [str(path.relative_to(run)) for path, values in read.items() if "disclosure" not in values]
    return {path.stem: _result(values, path) for path, values in read.items() if "disclosure" in values}, old


def _result(values: dict[str, Any], path: Path) -> EvaluationResult:
    try:
        return _parsed(_with_intervals(values))
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error


def _parsed(values: dict[str, Any]) -> EvaluationResult:
    local, healthy = values["localization"], values["healthy"]
    if local is not None:
        local["lesions"] = {kind: _made(LesionMaps, part) for kind, part in local["lesions"].items()}
    values["grading"] = None if values["metrics"] is None else _made(Grading, values)
    values["localization"] = None if local is None else _made(LocalizationResult, local)
    values["healthy"] = None if healthy is None else _made(HealthyResult, healthy)
    return _made(EvaluationResult, values)


def _made(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{field.name: values[field.name] for field in fields(cls)})


def _with_intervals(value: Any) -> Any:
    """JSON in which every mapping with a "value" is an ``Interval``."""
    if isinstance(value, list):
        return [_with_intervals(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if "value" in value:
        return _made(IntervalAt if "threshold" in value else Froc if "sensitivity" in value else Interval, value)
    return {name: _with_intervals(entry) for name, entry in value.items()}
