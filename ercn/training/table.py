"""Metrics as a table for the terminal, and the names and readings that the report shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ercn.training.maps import NAMES

METRICS = {
    "accuracy": "Accuracy",
    "kappa": "Quadratic weighted kappa",
    "f1": "Macro F1",
    "auc": "Macro AUC",
    "referable_auc": "Referable-DR AUC",
    "referable_sensitivity": "Referable-DR sensitivity",
    "referable_specificity": "Referable-DR specificity",
    "ece": "Expected calibration error",
    "ece_uncalibrated": "… before calibration",
    "brier": "Brier score",
}
LOCALIZATION = {
    "aupr": "Pixel AUPR",
    "iou": "IoU, threshold from validation",
    "iou_best": "IoU, best threshold here",
    "pointing": "Pointing game",
    "lesion_aupr": "Pixel AUPR, mean over lesions",
    "lesion_iou": "IoU, mean over lesions",
}
FLOOR = {"aupr": "aupr", "iou": "iou", "iou_best": "iou", "pointing": "pointing"}  # of a constant map


def reading(entry: dict[str, Any] | None) -> str:
    """"0.812 (0.745 to 0.870)", "n/a" where undefined."""
    if entry is None or entry["value"] is None:
        return "n/a"
    interval = "" if entry["low"] is None else f" ({entry['low']:.3f} to {entry['high']:.3f})"
    return f"{entry['value']:.3f}{interval}"


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def floors(result: dict[str, Any]) -> dict[str, str]:
    """What needs no model: always the most frequent class, or chance."""
    majority = result["majority"]
    return {"accuracy": f"{majority['accuracy']:.3f}", "kappa": "0", "auc": "0.5", "referable_auc": "0.5"}


def metric_rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Metric, one column per evaluation, floor; that of the accuracy only where all have the same."""
    rows = []
    for key, title in METRICS.items():
        floor = {floors(result).get(key, "") for result in found}
        values = (reading(result["metrics"][key]) for result in found)
        rows.append([title, *values, floor.pop() if len(floor) == 1 else ""])
    return rows


def localization_rows(localization: dict[str, Any]) -> list[list[str]]:
    """Metric, one column per map, floor of a constant map."""
    maps, floor = localization["maps"].values(), localization["floor"]
    return [
        [title, *(reading(values.get(key)) for values in maps), number(floor[FLOOR[key]]) if key in FLOOR else ""]
        for key, title in LOCALIZATION.items()
    ]


def print_metrics(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    what = f"{result['name']}: {result['pictures']} pictures of {result['patients']} patients, {result['dataset']}"
    if result["metrics"]:
        table = Table(title=what, title_justify="left")
        for column in ("metric", "value (95 % interval)", "floor"):
            table.add_column(column)
        for row in metric_rows([result]):
            table.add_row(*row)
        console.print(table)
    else:
        console.print(f"{what}: no grades, so localisation only")
    if result["localization"]:
        local = result["localization"]
        table = Table(title=f"lesions: {local['pictures']} pictures that have some", title_justify="left")
        for column in ("metric", *(NAMES[name] for name in local["maps"]), "floor"):
            table.add_column(column)
        for row in localization_rows(local):
            table.add_row(*row)
        console.print(table)
        if local["lesions"]:
            table = Table(title="pixel AUPR by lesion; intervals are in the report", title_justify="left")
            for column in ("lesion", "pictures", *(NAMES[name] for name in local["maps"]), "floor"):
                table.add_column(column)
            for kind, part in local["lesions"].items():
                values = (number(part["maps"][name]["aupr"]["value"]) for name in local["maps"])
                table.add_row(kind.replace("_", " "), str(part["pictures"]), *values, number(part["floor"]["aupr"]))
            console.print(table)
    if result.get("missing"):
        names = ", ".join(result["class_names"][k] for k in result["missing"])
        console.print(f"no picture of: {names}; left out of the macro AUC")
    for name in result["unreadable"]:
        console.print(f"unreadable, skipped: {name}")
    console.print(result["notice"])
