"""Metrics as rows of text, for the terminal and the reports, and the names that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ercn.maps import NAMES
from ercn.report.evaluation import EvaluationResult, Grading, HealthyResult, Interval, LesionMaps, LocalizationResult

METRICS = {
    "accuracy": "Accuracy",
    "kappa": "Quadratic weighted kappa",
    "f1": "Macro F1",
    "auc": "Macro AUC",
    "referable_auc": "Referable-DR AUC",
    "referable_sensitivity": "Referable-DR sensitivity",
    "referable_specificity": "Referable-DR specificity",
    "ece": "Expected calibration error, bias-corrected",
    "ece_uncalibrated": "… before calibration",
    "ece_plugin": "… as usual, biased upward",
    "brier": "Brier score",
}
REFERENCES = {
    "contrast": "best unlearned filter",
    "stride_ceiling": "ceiling of the stride",
    "supervised": "trained on masks",
}
TITLES = NAMES | REFERENCES
LOCALIZATION = {
    "aupr": "Pixel AUPR",
    "aupr_picture": "Pixel AUPR, mean over pictures",
    "iou": "IoU, threshold from validation",
    "iou_best": "IoU, best threshold here",
    "recall": "Recall, threshold from validation",
    "froc": "FROC score, by lesion",
    "pointing": "Pointing game",
    "lesion_aupr": "Pixel AUPR, mean over lesions",
    "lesion_iou": "IoU, mean over lesions",
}
FLOOR = {"aupr": "aupr", "aupr_picture": "aupr_picture", "iou": "iou", "iou_best": "iou", "pointing": "pointing"}
HEALTHY = {
    "heat": "Mean heat",
    "area": "Share of pixels above validation's threshold",
    "alarm": "Share of pictures with any such pixel",
}
COMPARED = {key: LOCALIZATION[key] for key in ("aupr", "aupr_picture", "iou", "froc")}


def reading(entry: Interval | None) -> str:
    """"0.812 (0.745 to 0.870)", "n/a" where undefined."""
    if entry is None or entry.value is None:
        return "n/a"
    interval = "" if entry.low is None else f" ({entry.low:.3f} to {entry.high:.3f})"
    return f"{entry.value:.3f}{interval}"


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def floors(grading: Grading) -> dict[str, str]:
    """What needs no model: always the most frequent class, or chance."""
    return {"accuracy": f"{grading.majority['accuracy']:.3f}", "kappa": "0", "auc": "0.5", "referable_auc": "0.5"}


def metric_rows(gradings: Sequence[Grading]) -> list[list[str]]:
    """Metric, one column per evaluation, floor; the accuracy's floor only where all evaluations share it."""
    rows = []
    for key, title in METRICS.items():
        floor = {floors(grading).get(key, "") for grading in gradings}
        values = (reading(grading.metrics[key]) for grading in gradings)
        rows.append([title, *values, floor.pop() if len(floor) == 1 else ""])
    return rows


def specificity_rows(gradings: Sequence[Grading]) -> list[list[str]]:
    """Sensitivity and specificity at each fixed specificity, one column per evaluation."""
    rows = []
    for name in gradings[0].fixed_specificity if gradings else ():
        for key, title in (
            ("sensitivity", f"Sensitivity at {name}"),
            ("specificity", "… specificity that this threshold has here"),
            ("roc_sensitivity", "… read off the ROC of these pictures"),
        ):
            rows.append([title, *(reading(grading.fixed_specificity[name].get(key)) for grading in gradings)])
    return rows


def measured(local: LesionMaps | HealthyResult) -> Mapping[str, Mapping[str, Any]]:
    """The maps, then the references."""
    return local.maps | local.references


def localization_rows(local: LesionMaps, names: Sequence[str]) -> list[list[str]]:
    """Metric, one column per map or reference, floor of a constant map."""
    every = measured(local)
    return [
        [title, *(reading(every[name].get(key)) for name in names), _floor(local, key)]
        for key, title in LOCALIZATION.items()
    ]


def lesion_rows(local: LocalizationResult, names: Sequence[str], key: str) -> list[list[str]]:
    """Lesion, its pictures, number of lesions, the metric of each map or reference, floor of a constant map."""
    return [
        [kind.replace("_", " "), str(part.pictures), str(part.count)]
        + [reading(measured(part).get(name, {}).get(key)) for name in names]
        + [_floor(part, key)]
        for kind, part in local.lesions.items()
    ]


def _floor(local: LesionMaps, key: str) -> str:
    return number(local.floor[FLOOR[key]]) if key in FLOOR else ""


def difference_rows(local: LocalizationResult) -> list[list[str]]:
    """The two maps, and the difference of each of ``COMPARED``."""
    return [
        [f"{NAMES[one['map']]} − {NAMES[one['minus']]}", *(reading(one.get(key)) for key in COMPARED)]
        for one in local.differences
    ]


def healthy_rows(healthy: HealthyResult) -> list[list[str]]:
    """Map or reference, and each of ``HEALTHY``."""
    return [
        [TITLES[name], *(reading(values.get(key)) for key in HEALTHY)] for name, values in measured(healthy).items()
    ]


def print_metrics(result: EvaluationResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)

    what = f"{result.name}: {result.pictures} pictures of {result.patients} patients, {result.dataset}"
    if grading := result.grading:
        show(what, ("metric", "value (95 % interval)", "floor"), metric_rows([grading]))
        show("referable DR at fixed specificity", ("metric", "value (95 % interval)"), specificity_rows([grading]))
    else:
        console.print(f"{what}: no grades, so localisation only")
    if local := result.localization:
        title = f"lesions: {local.pictures} pictures that have some"
        maps, references = list(local.maps), list(local.references)
        show(title, ("metric", *(NAMES[name] for name in maps), "floor"), localization_rows(local, maps))
        if references:
            rows = [row[:-1] for row in localization_rows(local, references)]
            title = "references: maps that no model of grades made"
            show(title, ("metric", *(TITLES[name] for name in references)), rows)
        if local.differences:
            show("paired differences", ("maps", *COMPARED.values()), difference_rows(local))
        for key in ("aupr", "recall") if local.lesions else ():
            title = f"{LOCALIZATION[key][0].lower()}{LOCALIZATION[key][1:]}, by lesion; intervals are in the report"
            columns = ("lesion", "pictures", "lesions", *(NAMES[name] for name in maps), "floor")
            count = len(columns) - (key not in FLOOR)
            rows = [[cell.partition(" (")[0] for cell in row[:count]] for row in lesion_rows(local, maps, key)]
            show(title, columns[:count], rows)
    if healthy := result.healthy:
        title = f"heat on healthy eyes: {healthy.pictures} pictures of grade 0"
        show(title, ("map", *HEALTHY.values()), healthy_rows(healthy))
    if grading and grading.missing:
        names = ", ".join(result.class_names[k] for k in grading.missing)
        console.print(f"no picture of: {names}; left out of the macro AUC")
    for name in result.unreadable:
        console.print(f"unreadable, skipped: {name}")
    if local or healthy:
        console.print(result.disclosure)
    console.print(result.notice)
