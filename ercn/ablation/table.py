"""The table of an ablation: means over seeds with patient-bootstrap intervals, as JSON, CSV, Markdown and a figure.

One bootstrap draw takes patients of the split with replacement, the same ones for every row and seed; a row's value in
a draw is the mean over its seeds. So an interval covers the choice of patients, ``sd`` that of the seed (initial
weights, order and augmentation), and differences of two rows, or of two maps of one row, are taken draw by draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ercn._environment import environment
from ercn._files import DISCLAIMER, read_json, write_atomic, write_csv, write_json, write_text
from ercn.ablation.grid import Cell, Grid, Row
from ercn.evaluation import froc, metrics
from ercn.evaluation.localization import DIFFERENCES, LEVELS, at_least, average_precision, precision_recall
from ercn.maps import LOST, NAMES
from ercn.report.table import TITLES

GRADING = {"kappa": "Quadratic weighted kappa", "referable_auc": "Referable-DR AUC"}
LESIONS = {"aupr": "lesion AUPR", "froc": "FROC score", "iou": "lesion IoU"}
GAINS = {f"gain_{one}": (one, other) for one, other in DIFFERENCES}  # of the lesion AUPR
HEATS = {f"heat_{name}": name for name in ("cam", "refined_cam")}
COLUMNS = GRADING | {f"{key}_{name}": f"{title}, {NAMES[name]}" for key, title in LESIONS.items() for name in NAMES}
COLUMNS |= {key: f"lesion AUPR, {NAMES[one]} − {NAMES[other]}" for key, (one, other) in GAINS.items()}
COLUMNS |= {key: f"heat on healthy eyes, {NAMES[name]}" for key, name in HEATS.items()}
PROBES = {"knn_kappa": "kNN", "linear_kappa": "linear probe"}
SEED = 0  # of the bootstrap


def write(
    grid: Grid, cells: Mapping[tuple[str, int], Cell], out: Path, *, draws: int, about: Mapping[str, Any]
) -> Path:
    """Writes ``ablation.json``, ``.csv``, ``.md`` and ``.png`` of the finished cells; returns the third.

    about: "dataset", "prepare", "split" and "pictures" of the data, and "ceiling", the folder of its results or None.
    """
    result = results(grid, cells, draws=draws, about=about)
    rows = result["rows"]
    write_json(out / "ablation.json", result)
    write_csv(out / "ablation.csv", (line for row in rows for line in lines_of(row)))
    write_atomic(out / "ablation.png", lambda path: _figure(rows).savefig(path, dpi=110))
    write_text(out / "ablation.md", "\n\n".join(paragraphs(result)) + "\n")
    return out / "ablation.md"


def results(
    grid: Grid, cells: Mapping[tuple[str, int], Cell], *, draws: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of the table, JSON-ready."""
    split = about["split"]
    iou = "at the threshold of the highest pooled IoU on validation"
    return {
        "notice": DISCLAIMER,
        "data": dict(about),
        "interval": f"95 % percentile over {draws} draws of {split} patients, of the mean over seeds",
        "iou": iou + (": these very pictures, so it is the best there is here" if split == "val" else ""),
        "seeds": list(grid.seeds),
        "rows": [_row(grid, row, cells, draws, split) for row in grid.rows],
        "references": _references(grid, cells, draws, about),
        "pretraining": _pretraining(grid, cells),
        "environment": environment(),
    }


@cache
def draws_of(folder: Path, draws: int, split: str) -> dict[str, np.ndarray]:
    """Every column of a finished cell as [1 + draws]: its value, then its value in each draw.

    Also "aupr", "froc" and "iou" of its references.
    """
    thresholds = read_json(folder / f"{split}.json")["thresholds"]["maps"]
    with np.load(folder / f"{split}.npz") as file:
        data = dict(file)
    patients = data["patients"].tolist()
    seen = np.array([patients.index(patient) for patient in data["owners"].tolist()])
    lesions, healthy = seen[data["lesion_rows"]], seen[data["healthy_rows"]]

    def values(weight: np.ndarray) -> dict[str, np.ndarray]:
        result = _grading(data["probability"], data["truth"], weight) if "probability" in data else {}
        for name in TITLES:
            if (counts := data.get(f"counts_{name}")) is None:
                continue
            own, pictures = weight[:, lesions], weight[:, seen]
            pooled = (own @ counts.reshape(len(counts), -1).astype(float)).reshape(-1, 2, LEVELS)
            precision, recall, iou = precision_recall(pooled)
            result[f"aupr_{name}"] = average_precision(precision, recall)
            points = froc.operating_points(at_least(pictures @ data[f"marks_{name}"]), pictures.sum(1))
            found = at_least(own @ data[f"found_{name}"])
            result[f"froc_{name}"] = froc.sensitivities(found, points, own @ data["lesions"]).mean(1)
            if name in thresholds:
                result[f"iou_{name}"] = iou[:, round(thresholds[name] * LEVELS)]
        for key, (one, other) in GAINS.items():
            if f"counts_{one}" in data and f"counts_{other}" in data:
                result[key] = result[f"aupr_{one}"] - result[f"aupr_{other}"]
        for key in HEATS if len(healthy) else ():
            if key in data:
                drawn = weight[:, healthy]
                total = drawn.sum(1)
                result[key] = np.where(total > 0, drawn @ data[key] / np.maximum(total, 1), np.nan)
        return result

    parts = [values(w) for w in (np.ones((1, len(patients))), *metrics.resamples(patients, draws, SEED))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _grading(probability: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    classes = probability.shape[1]
    matrix = metrics.confusion(truth, probability.argmax(1), classes, weight)
    score, positive = metrics.referable(probability), metrics.is_referable(truth, classes)
    return {"kappa": metrics.quadratic_kappa(matrix), "referable_auc": metrics.roc_auc(score, positive, weight)}


def _row(grid: Grid, row: Row, cells: Mapping[tuple[str, int], Cell], draws: int, split: str) -> dict[str, Any]:
    own = finished(grid, row.name, cells, draws, split)
    folders = [cells[row.name, seed].folder for seed in own]
    costs = [folder / "cost.json" for folder in folders]  # of training
    base = finished(grid, row.base, cells, draws, split) if row.base else {}
    both = own.keys() & base.keys()
    return {
        "name": row.name,
        "group": row.group,
        "base": row.base,
        "seeds": sorted(own),
        "cells": [folder.name for folder in folders],
        "cpu_seconds": [read_json(cost)["cpu"] for cost in costs if cost.is_file()],
        "flat_cam": [read_json(folder / f"{split}.json")["flat_cam"] for folder in folders],
        "values": summary([own[seed] for seed in sorted(own)]),
        "difference": summary([{k: own[s][k] - base[s][k] for k in own[s].keys() & base[s].keys()} for s in both]),
    }


def lost(row: Mapping[str, Any]) -> int:
    """Number of the row's seeds whose CAM is lost."""
    return sum(share > LOST for share in row["flat_cam"])


def finished(
    grid: Grid, row: str, cells: Mapping[tuple[str, int], Cell], draws: int, split: str
) -> dict[int, dict[str, np.ndarray]]:
    """The draws of a row's finished cells, by seed."""
    folders = {seed: cells[row, seed].folder for seed in grid.seeds}
    done = {seed: folder for seed, folder in folders.items() if (folder / f"{split}.json").is_file()}
    return {seed: draws_of(folder, draws, split) for seed, folder in done.items()}


def _references(
    grid: Grid, cells: Mapping[tuple[str, int], Cell], draws: int, about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Each reference once, with the rows that share it: rows of one picture size and, for its ceiling, stride."""
    split, result = about["split"], {}
    for row in grid.rows:
        for seed, own in finished(grid, row.name, cells, draws, split).items():
            cell = read_json(cells[row.name, seed].folder / f"{split}.json")
            for name in ("contrast", "stride_ceiling"):
                if f"aupr_{name}" not in own:
                    continue
                detail = cell["contrast"] if name == "contrast" else _grid_of(cell["config"])
                place = result.setdefault((name, detail, float(own[f"aupr_{name}"][0])), _reference(name, detail, own))
                place["rows"] += [row.name] if row.name not in place["rows"] else []
    references = sorted(result.values(), key=lambda entry: list(TITLES).index(entry["name"]))
    folder = Path(about["ceiling"] or "")
    if about["ceiling"] and (folder / f"{split}.json").is_file():
        size = read_json(folder / f"{split}.json")["image_size"]
        references.append(_reference("supervised", f"U-Net at {size} px", draws_of(folder, draws, split)))
    return references


def _grid_of(config: Mapping[str, Any]) -> str:
    model = config["model"]
    return f"an element for {model['patch'] or model['output_stride']} px of {config['data']['image_size']}"


def _reference(name: str, detail: str, own: Mapping[str, np.ndarray]) -> dict[str, Any]:
    values = {key: vars(metrics.entry(own[f"{key}_{name}"])) for key in ("aupr", "froc")}
    return {"name": name, "title": TITLES[name], "detail": detail, "rows": [], **values}


def summary(seeds: list[dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Per column: the mean over seeds with its interval, the standard deviation over seeds, and each seed's value.

    A column that is missing or undefined for a seed is left out.
    """
    result = {}
    for name in COLUMNS:
        if not seeds or any(name not in own or np.isnan(own[name][0]) for own in seeds):
            continue
        table = np.stack([own[name] for own in seeds])  # [seeds, 1 + draws]
        low, high = metrics.interval(table[:, 1:].mean(0))
        sd = float(table[:, 0].std(ddof=1)) if len(seeds) > 1 else None
        each = [float(v) for v in table[:, 0]]
        result[name] = {"value": float(np.mean(each)), "low": low, "high": high, "sd": sd, "each": each}
    return result


def _pretraining(grid: Grid, cells: Mapping[tuple[str, int], Cell]) -> list[dict[str, Any]]:
    """Results of kNN and linear probe before and after each pre-training of the grid."""
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


def lines_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the CSV, one for each column of a row."""
    lines = []
    for name, value in row["values"].items():
        line = {"group": row["group"], "row": row["name"], "column": name, "seeds": len(row["seeds"])}
        line |= {key: value[key] for key in ("value", "low", "high", "sd")}
        line |= {f"seed {seed}": one for seed, one in zip(row["seeds"], value["each"])}
        if name in row["difference"]:
            line["base"] = row["base"]
            line |= {f"difference_{key}": row["difference"][name][key] for key in ("value", "low", "high", "sd")}
        lines.append({key: f"{v:.4f}" if isinstance(v, float) else v for key, v in line.items()})
    return lines


def paragraphs(result: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    seeds = ", ".join(map(str, result["seeds"]))
    parts = [pictures_of(result["data"]), f"Mean over seeds {seeds} ({result['interval']}). IoU is {result['iou']}."]
    parts += _row_tables(result, "values")
    if any(row["difference"] for row in result["rows"]):
        parts.append("Difference from the row that each one builds on, draw by draw:")
        parts += _row_tables(result, "difference")
    if result["references"]:
        parts += ["Maps beside those of the rows, which no model of grades made:", _reference_table(result)]
    if any(entry["probes"] for entry in result["pretraining"]):
        parts += ["Validation kappa of frozen features, mean over seeds (smallest to largest):", _probe_table(result)]
    return parts


def _row_tables(result: dict[str, Any], part: str) -> list[str]:
    """Tables of "values" or "difference" of the rows, a table for each group of columns."""
    difference = part == "difference"
    rows = [row for row in result["rows"] if row[part] or not difference]
    groups = [[*GRADING, *GAINS, *HEATS], *([f"{key}_{name}" for name in NAMES] for key in LESIONS)]
    tables = []
    for columns in groups:
        flat = columns == groups[0] and not difference
        lines = [["", "row", *(["builds on"] if difference else []), *(COLUMNS[name] for name in columns)]]
        lines[0] += ["flat CAM"] if flat else []
        group = None
        for row in rows:
            line = ["" if row["group"] == group else row["group"], name_of(row, result)]
            line += [row["base"]] if difference else []
            line += [reading(row[part].get(name), signed=difference or name in GAINS) for name in columns]
            lines.append(line + ([flat_reading(row)] if flat else []))
            group = row["group"]
        tables.append(markdown_table(lines))
    return tables


def _reference_table(result: dict[str, Any]) -> str:
    done = [row["name"] for row in result["rows"] if row["seeds"]]
    lines = [["reference", "", *(LESIONS[key] for key in ("aupr", "froc")), "rows"]]
    for entry in result["references"]:
        rows = "" if entry["rows"] in ([], done) else ", ".join(entry["rows"])
        values = [reading(entry[key], signed=False) for key in ("aupr", "froc")]
        lines.append([entry["title"], entry["detail"], *values, rows or "all"])
    return markdown_table(lines)


def _probe_table(result: dict[str, Any]) -> str:
    lines = [["pre-training", *(f"{t}, {when}" for t in PROBES.values() for when in ("untrained", "pre-trained"))]]
    for entry in result["pretraining"]:
        line = [entry["name"]]
        for name in PROBES:
            for when in ("before", "after"):
                values = [probe[when][name] for probe in entry["probes"]]
                line.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "n/a")
        lines.append(line)
    return markdown_table(lines)


def pictures_of(data: Mapping[str, Any]) -> str:
    """A sentence on the pictures that the figures are of."""
    drawn = ", ".join(f"{key} {value}" for key, value in data["prepare"].items())
    count = ", ".join(f"{value} {key}" for key, value in data["pictures"].items())
    return f"{data['dataset']} ({drawn}); pictures: {count}. The figures are of the {data['split']} split."


def markdown_table(lines: list[list[str]]) -> str:
    """The first line is the header."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def name_of(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The row's name, with its number of seeds where some are missing."""
    done, wanted = len(row["seeds"]), len(result["seeds"])
    return row["name"] + ("" if done == wanted else f" ({done} of {wanted} seeds)")


def flat_reading(row: Mapping[str, Any]) -> str:
    return f"{lost(row)} of {len(row['seeds'])}"


def reading(entry: dict[str, Any] | None, *, signed: bool) -> str:
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
    """A panel for each metric, the rows below each other, a dot and an interval for each map."""
    one, other = GAINS["gain_refined_cam"]
    panels = {
        GRADING["kappa"]: {"": "kappa"},
        LESIONS["aupr"]: {name: f"aupr_{name}" for name in NAMES},
        f"{LESIONS['aupr']}, {NAMES[one]} − {NAMES[other]}": {"": "gain_refined_cam"},
    }
    figure = Figure(figsize=(15, 1.6 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    colors = dict(zip(("", *NAMES), ("black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:gray")))
    for axis, (title, series) in zip(axes, panels.items()):
        for i, (name, key) in enumerate(series.items()):
            shown = [(y, row["values"][key]) for y, row in enumerate(rows) if key in row["values"]]
            at = [y + 0.15 * (i - (len(series) - 1) / 2) for y, _ in shown]
            middle = [entry["value"] for _, entry in shown]
            reach = [
                [0 if entry["low"] is None else max(0.0, side * (entry[end] - entry["value"])) for _, entry in shown]
                for side, end in ((-1, "low"), (1, "high"))
            ]
            label = NAMES.get(name)
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
    axes[2].axvline(0, color="gray", lw=0.8)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower right", ncols=len(NAMES), fontsize=9)
    return figure
