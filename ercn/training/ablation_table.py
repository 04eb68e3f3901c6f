"""The table of an ablation: means over seeds with patient-bootstrap intervals, as JSON, CSV, Markdown and a figure.

One bootstrap draw takes patients of the test split with replacement, the same ones for every row and seed; a row's
value in a draw is the mean over its seeds. So an interval is about which patients were tested, ``sd`` about the seed
(initial weights, order and augmentation), and the difference of two rows is compared draw by draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ercn._files import write_atomic, write_text
from ercn.training import metrics
from ercn.training.files import DISCLAIMER, environment, read_json, write_csv, write_json
from ercn.training.grid import Cell, Grid, Row
from ercn.training.localization import LEVELS, average_precision, precision_recall
from ercn.training.maps import NAMES

GRADING = {"kappa": "Quadratic weighted kappa", "referable_auc": "Referable-DR AUC"}
MAPS = {name: NAMES[name] for name in ("cam", "refined_cam", "attention")}
LESIONS = {"aupr": "lesion AUPR", "iou": "lesion IoU"}  # the threshold is validation's
COLUMNS = GRADING | {f"{key}_{name}": f"{title}, {MAPS[name]}" for key, title in LESIONS.items() for name in MAPS}
PROBES = {"knn_kappa": "kNN", "linear_kappa": "linear probe"}
SEED = 0  # of the bootstrap


def write(grid: Grid, cells: Mapping[tuple[str, int], Cell], out: Path, *, draws: int) -> Path:
    """Writes ``ablation.json``, ``.csv``, ``.md`` and ``.png`` of the cells that are finished; returns the third."""
    rows = [_row(grid, row, cells, draws) for row in grid.rows]
    result = {
        "notice": DISCLAIMER,
        "interval": f"95 % percentile over {draws} draws of test patients, of the mean over seeds",
        "iou": "at the threshold of the highest pooled IoU on validation",
        "seeds": list(grid.seeds),
        "rows": rows,
        "pretraining": _pretraining(grid, cells),
        "environment": environment(),
    }
    write_json(out / "ablation.json", result)
    write_csv(out / "ablation.csv", (line for row in rows for line in _lines(row)))
    write_atomic(out / "ablation.png", lambda path: _figure(rows).savefig(path, dpi=110))
    write_text(out / "ablation.md", _markdown(result))
    return out / "ablation.md"


@cache
def draws_of(folder: Path, draws: int) -> dict[str, np.ndarray]:
    """Every column of a finished cell as [1 + draws]: its value, then its value in each draw."""
    thresholds = read_json(folder / "cell.json")["thresholds"]["maps"]
    with np.load(folder / "cell.npz") as file:
        data = dict(file)
    patients = data["patients"].tolist()
    columns = [patients.index(patient) for patient in data["lesion_patients"].tolist()]
    probability, truth = data["probability"], data["truth"]
    classes = probability.shape[1]
    score, positive = metrics.referable(probability), metrics.is_referable(truth, classes)

    def values(weight: np.ndarray) -> dict[str, np.ndarray]:
        matrix = metrics.confusion(truth, probability.argmax(1), classes, weight)
        result = {
            "kappa": metrics.quadratic_kappa(matrix),
            "referable_auc": metrics.roc_auc(score, positive, weight),
        }
        for name in MAPS:
            if (counts := data.get(f"counts_{name}")) is None:
                continue
            pooled = (weight[:, columns] @ counts.reshape(len(counts), -1).astype(float)).reshape(-1, 2, LEVELS)
            precision, recall, iou = precision_recall(pooled)
            result[f"aupr_{name}"] = average_precision(precision, recall)
            if name in thresholds:
                result[f"iou_{name}"] = iou[:, round(thresholds[name] * LEVELS)]
        return result

    parts = [values(w) for w in (np.ones((1, len(patients))), *metrics.resamples(patients, draws, SEED))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _row(grid: Grid, row: Row, cells: Mapping[tuple[str, int], Cell], draws: int) -> dict[str, Any]:
    own = _finished(grid, row.name, cells, draws)
    folders = [cells[row.name, seed].folder for seed in own]
    base = _finished(grid, row.base, cells, draws) if row.base else {}
    both = own.keys() & base.keys()
    return {
        "name": row.name,
        "group": row.group,
        "base": row.base,
        "seeds": sorted(own),
        "cells": [folder.name for folder in folders],
        "cpu_seconds": [read_json(folder / "cell.json")["seconds"]["cpu"] for folder in folders],
        "values": _summary([own[seed] for seed in sorted(own)]),
        "difference": _summary([{k: own[s][k] - base[s][k] for k in own[s].keys() & base[s].keys()} for s in both]),
    }


def _finished(grid: Grid, row: str, cells: Mapping[tuple[str, int], Cell], draws: int) -> dict[int, dict]:
    """The draws of a row's finished cells, by seed."""
    folders = {seed: cells[row, seed].folder for seed in grid.seeds}
    return {seed: draws_of(folder, draws) for seed, folder in folders.items() if (folder / "cell.json").is_file()}


def _summary(seeds: list[dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Per column: the mean over seeds with its interval, the standard deviation over seeds, and each seed's value."""
    result = {}
    for name in COLUMNS:
        if not seeds or any(name not in own for own in seeds):
            continue
        table = np.stack([own[name] for own in seeds])  # [seeds, 1 + draws]
        low, high = metrics.interval(table[:, 1:].mean(0))
        sd = float(table[:, 0].std(ddof=1)) if len(seeds) > 1 else None
        each = [float(v) for v in table[:, 0]]
        result[name] = {"value": float(np.mean(each)), "low": low, "high": high, "sd": sd, "each": each}
    return result


def _pretraining(grid: Grid, cells: Mapping[tuple[str, int], Cell]) -> list[dict[str, Any]]:
    """What kNN and linear probe said before and after each pre-training, by its name in the grid."""
    runs: dict[str, dict[str, None]] = {name: {} for name in grid.pretrain}
    for row in grid.rows:
        name = next((r.pretrain for r in reversed(grid.chain(row)) if r.pretrain is not None), "")
        for seed in grid.seeds if name else ():
            runs[name][cells[row.name, seed].pretrain.run.out] = None
    result = []
    for name, folders in runs.items():
        done = [Path(folder) for folder in folders if (Path(folder) / "cost.json").is_file()]
        probes = [read_json(folder / "export" / "backbone.json")["probe"] for folder in done]
        result.append(
            {
                "name": name,
                "probes": [probe for probe in probes if probe is not None],
                "cpu_seconds": [read_json(folder / "cost.json")["cpu"] for folder in done],
            }
        )
    return result


def _lines(row: dict[str, Any]) -> list[dict[str, Any]]:
    """CSV: one line for each row and column."""
    lines = []
    for name, value in row["values"].items():
        line = {"group": row["group"], "row": row["name"], "column": name, "seeds": len(row["seeds"])}
        line |= {key: value[key] for key in ("value", "low", "high", "sd")}
        if name in row["difference"]:
            line["base"] = row["base"]
            line |= {f"difference_{key}": row["difference"][name][key] for key in ("value", "low", "high", "sd")}
        lines.append({key: f"{v:.4f}" if isinstance(v, float) else v for key, v in line.items()})
    return lines


def _markdown(result: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    parts = [f"Mean over seeds {seeds} ({result['interval']}). IoU is {result['iou']}."]
    titles = {"values": "", "difference": "Difference from the row that each one builds on, draw by draw:"}
    for part, title in titles.items():
        rows = [row for row in result["rows"] if row[part] or part == "values"]
        if not rows:
            continue
        parts += [title] if title else []
        for columns in ([*GRADING, *(f"aupr_{name}" for name in MAPS)], [f"iou_{name}" for name in MAPS]):
            names = [COLUMNS[name] for name in columns]
            header = ["", "row", *(["builds on"] if part == "difference" else []), *names]
            lines = [header, ["---"] * len(header)]
            group = None
            for row in rows:
                readings = [_reading(row[part].get(name), signed=part == "difference") for name in columns]
                first = "" if row["group"] == group else row["group"]
                done, wanted = len(row["seeds"]), len(result["seeds"])
                missing = "" if done == wanted else f" ({done} of {wanted} seeds)"
                base = [row["base"]] if part == "difference" else []
                lines.append([first, row["name"] + missing, *base, *readings])
                group = row["group"]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if any(entry["probes"] for entry in result["pretraining"]):
        parts.append("Validation kappa of frozen features, mean over seeds (smallest to largest):")
        lines = [["pre-training", *(f"{t}, {when}" for t in PROBES.values() for when in ("untrained", "pre-trained"))]]
        lines.append(["---"] * len(lines[0]))
        for entry in result["pretraining"]:
            line = [entry["name"]]
            for name in PROBES:
                for when in ("before", "after"):
                    values = [probe[when][name] for probe in entry["probes"]]
                    line.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "n/a")
            lines.append(line)
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _reading(entry: dict[str, Any] | None, *, signed: bool) -> str:
    """"0.812 (0.745 to 0.870)"; a difference has its sign, and is bold where its interval leaves out 0."""
    if entry is None:
        return ""
    sign = "+" if signed else ""
    text = f"{entry['value']:{sign}.3f}"
    if entry["low"] is None:
        return text
    text += f" ({entry['low']:{sign}.3f} to {entry['high']:{sign}.3f})"
    beyond = round(entry["low"], 3) * round(entry["high"], 3) > 0
    return f"**{text}**" if signed and beyond else text


def _figure(rows: list[dict[str, Any]]) -> Figure:
    """One panel for each metric, the rows below each other, a dot and its interval for each map."""
    panels = {title: {"": key} for key, title in GRADING.items()}
    panels |= {title: {name: f"{key}_{name}" for name in MAPS} for key, title in LESIONS.items()}
    figure = Figure(figsize=(15, 1.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    colors = dict(zip(("", *MAPS), ("black", "tab:blue", "tab:orange", "tab:green")))
    for axis, (title, series) in zip(axes, panels.items()):
        for i, (name, key) in enumerate(series.items()):
            shown = [(y, row["values"][key]) for y, row in enumerate(rows) if key in row["values"]]
            at = [y + 0.22 * (i - (len(series) - 1) / 2) for y, _ in shown]
            middle = [entry["value"] for _, entry in shown]
            reach = [
                [0 if entry["low"] is None else max(0.0, side * (entry[end] - entry["value"])) for _, entry in shown]
                for side, end in ((-1, "low"), (1, "high"))
            ]
            label = MAPS.get(name)
            axis.errorbar(middle, at, xerr=reach, fmt="o", ms=4, lw=1, color=colors[name], label=label)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    groups = [row["group"] for row in rows]
    starts = [y for y in range(len(rows)) if y == 0 or groups[y] != groups[y - 1]]
    for start, end in zip(starts, [*starts[1:], len(rows)]):
        place = {"xy": (1.02, (start + end - 1) / 2), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
        axes[-1].annotate(groups[start], rotation=270, va="center", **place)
        for axis in axes if start else ():
            axis.axhline(start - 0.5, color="gray", lw=0.8)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower right", ncols=len(MAPS), fontsize=9)
    return figure
