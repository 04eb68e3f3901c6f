"""What a report needs of a run's folder."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ercn._files import read_json
from ercn.config import flatten

# Okabe and Ito's colours, for colour-blind readers too; a marker each for readers without colour.
STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#000000", "X"),
)


@dataclass
class Run:
    """label: shortest end of the folder's path that no other run of the page has. model: the export's description,
    empty before there is one. history: series by epoch of metrics.csv. evaluations: by name.
    """

    folder: Path
    label: str
    color: str
    marker: str
    model: dict[str, Any]
    settings: dict[str, Any]
    history: dict[str, list[float]]
    evaluations: dict[str, dict[str, Any]]
    config: str
    environment: str
    unreadable: list[dict[str, str]] = field(default_factory=list)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """FileNotFoundError where a folder is no run of ercn."""
    labels = _labels(folders)
    return [_read(folder, label, *STYLES[i % len(STYLES)]) for i, (folder, label) in enumerate(zip(folders, labels))]


def _read(folder: Path, label: str, color: str, marker: str) -> Run:
    config = folder / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} is no run of ercn: it has no config.yaml")
    exported = [read_json(p) for name in ("model", "backbone") if (p := folder / "export" / f"{name}.json").is_file()]
    model = exported[0] if exported else {}
    text = config.read_text(encoding="utf-8")
    evaluations, old = read_evaluations(folder)
    for name in old:
        print(f"{folder / name} was written by an older version of ercn and is left out; evaluate it again", flush=True)
    return Run(
        folder,
        label,
        color,
        marker,
        model,
        flatten(yaml.safe_load(text)),
        _history(folder / "metrics.csv"),
        evaluations,
        text,
        yaml.safe_dump(read_json(folder / "environment.json"), sort_keys=False),
        model.get("unreadable", []),
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


def read_evaluations(run: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The evaluations of a run by name, test first and val last; and the files left out, of an older version."""
    paths = (run / "evaluation").glob("*.json")
    paths = sorted(paths, key=lambda path: (path.stem != "test", path.stem == "val", path))
    read = {path: read_json(path) for path in paths}
    old = [str(path.relative_to(run)) for path, evaluation in read.items() if "disclosure" not in evaluation]
    return {path.stem: evaluation for path, evaluation in read.items() if "disclosure" in evaluation}, old
