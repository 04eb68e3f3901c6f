"""What reports read from a run's folder."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml

from ercn._files import read_json
from ercn.config import flatten
from ercn.report.evaluation import EvaluationResult, read_evaluations

# Okabe and Ito's colours, for colour-blind readers too; a marker each for readers without colour.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^DvPX"


@dataclass
class Run:
    """label: shortest end of the folder's path that no other run of the page has. settings: options by dotted name.
    history: series by epoch of metrics.csv. evaluations: by name. config, environment: as text.

    The other fields are those of the export's JSON, read plainly: a network that cannot be loaded has a page too.
    They are None without an export; epoch and temperature also for a backbone.
    """

    folder: Path
    label: str
    color: str
    marker: str
    settings: dict[str, Any]
    history: dict[str, list[float]]
    evaluations: dict[str, EvaluationResult]
    config: str
    environment: str
    dataset: str | None
    manifest: str | None
    epoch: int | None
    temperature: float | None
    unreadable: list[dict[str, str]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """FileNotFoundError where a folder is no run of ercn."""
    return [_read(*run) for run in zip(folders, _labels(folders), cycle(COLORS), cycle(MARKERS))]


def _read(folder: Path, label: str, color: str, marker: str) -> Run:
    config = folder / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} is no run of ercn: it has no config.yaml")
    exports = [folder / "export" / name for name in ("model.json", "backbone.json")]
    exported: dict[str, Any] = next((read_json(path) for path in exports if path.is_file()), {})
    text = config.read_text(encoding="utf-8")
    evaluations, old = read_evaluations(folder)
    for name in old:
        print(f"{folder / name} was written by an older version of ercn and is left out; evaluate it again", flush=True)
    return Run(
        folder=folder,
        label=label,
        color=color,
        marker=marker,
        settings=flatten(yaml.safe_load(text)),
        history=_history(folder / "metrics.csv"),
        evaluations=evaluations,
        config=text,
        environment=yaml.safe_dump(read_json(folder / "environment.json"), sort_keys=False),
        dataset=exported.get("dataset"),
        manifest=exported.get("manifest"),
        epoch=exported.get("epoch"),
        temperature=exported.get("temperature"),
        unreadable=exported.get("unreadable", []),
    )


def _history(path: Path) -> dict[str, list[float]]:
    """Columns of metrics.csv, NaN where a cell is empty."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}


def _labels(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    most = max(map(len, parts))
    for count in range(1, most + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ValueError(f"the same run is named twice: {', '.join(map(str, folders))}")
