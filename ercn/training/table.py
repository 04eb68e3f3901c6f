"""Metrics as a table for the terminal, and the names and readings that the report shares."""

from __future__ import annotations

from typing import Any

from ercn.training.maps import NAMES

METRICS = {
    "accuracy": "Accuracy",
    "kappa": "Quadratic weighted kappa",
    "auc": "Macro AUC",
    "referable_auc": "Referable-DR AUC",
    "referable_sensitivity": "Referable-DR sensitivity",
    "referable_specificity": "Referable-DR specificity",
    "ece": "Expected calibration error",
    "brier": "Brier score",
}
LOCALIZATION = {
    "aupr": "Pixel AUPR",
    "iou": "IoU, threshold from validation",
    "iou_best": "IoU, best threshold here",
    "pointing": "Pointing game",
}


def reading(entry: dict[str, Any] | None) -> str:
    """"0.812 (0.745 to 0.870)", "n/a" where undefined."""
    if entry is None or entry["value"] is None:
        return "n/a"
    interval = "" if entry["low"] is None else f" ({entry['low']:.3f} to {entry['high']:.3f})"
    return f"{entry['value']:.3f}{interval}"


def floors(result: dict[str, Any]) -> dict[str, str]:
    """What needs no model: always the most frequent class, or chance."""
    majority = result["majority"]
    return {"accuracy": f"{majority['accuracy']:.3f}", "kappa": "0", "auc": "0.5", "referable_auc": "0.5"}


def localization_rows(localization: dict[str, Any]) -> list[list[str]]:
    """Metric, one column per map, floor of a constant map."""
    floor = localization["floor"] | {"iou_best": localization["floor"]["iou"]}
    return [
        [title, *(reading(values.get(key)) for values in localization["maps"].values()), f"{floor[key]:.3f}"]
        for key, title in LOCALIZATION.items()
    ]


def print_metrics(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    what = f"{result['name']}: {result['pictures']} pictures of {result['patients']} patients, {result['dataset']}"
    table = Table(title=what, title_justify="left")
    for column in ("metric", "value (95 % interval)", "floor"):
        table.add_column(column)
    floor = floors(result)
    for key, title in METRICS.items():
        table.add_row(title, reading(result["metrics"][key]), floor.get(key, ""))
    console.print(table)
    if result["localization"]:
        local = result["localization"]
        table = Table(title=f"lesions: {local['pictures']} pictures that have some", title_justify="left")
        for column in ("metric", *(NAMES[name] for name in local["maps"]), "floor"):
            table.add_column(column)
        for row in localization_rows(local):
            table.add_row(*row)
        console.print(table)
    if result["missing"]:
        names = ", ".join(result["class_names"][k] for k in result["missing"])
        console.print(f"no picture of: {names}; left out of the macro AUC")
    for name in result["unreadable"]:
        console.print(f"unreadable, skipped: {name}")
    console.print(result["notice"])
