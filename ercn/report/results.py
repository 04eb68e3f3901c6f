"""The evaluations of one or several runs side by side, as the page's tables, charts and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ercn.maps import NAMES
from ercn.report import charts, table
from ercn.report.evaluation import EvaluationResult, LocalizationResult
from ercn.report.runs import Run

PICTURE, MAP = 512, 256  # largest side in the page, pixels
_LEFT_OUT = ("run.out", "run.resume", "run.progress", "data.workers", "data.root")


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, with the value of each run."""
    names = [name for run in runs for name in run.settings]
    rows = [(name, [str(run.settings.get(name, "–")) for run in runs]) for name in dict.fromkeys(names)]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name not in _LEFT_OUT]


def results(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the page shows of each evaluation that any run has, the test split first."""
    names = dict.fromkeys(name for run in runs for name in run.evaluations)
    order = sorted(names, key=lambda name: (name != "test", name == "val"))
    return [_result(name, runs) for name in order]


def _result(name: str, every: Sequence[Run]) -> dict[str, Any]:
    runs = [run for run in every if name in run.evaluations]
    evaluations = [run.evaluations[name] for run in runs]
    graded = [(run, result) for run, result in zip(runs, evaluations) if result.grading]
    gradings = [result.grading for _, result in graded]
    local = [(run, result.localization) for run, result in zip(runs, evaluations) if result.localization]
    return {
        "name": name,
        "runs": runs,
        "absent": [run for run in every if run not in runs],
        "evaluations": evaluations,
        "same_pictures": len({(result.manifest, result.pictures) for result in evaluations}) == 1,
        "graded": [run for run, _ in graded],
        "metrics": table.metric_rows(gradings),
        "specificity": table.specificity_rows(gradings),
        "recall": _recall([result for _, result in graded]),
        "scales": _scales(graded),
        "missing": sorted({result.class_names[k] for _, result in graded for k in result.grading.missing}),
        "confusion": [(run, charts.confusion(result)) for run, result in graded],
        "roc": charts.roc(graded),
        "reliability": [(run, charts.reliability(result)) for run, result in graded],
        "localized": [run for run, _ in local],
        "maps": _map_tables(local),
        "differences": [(run, row) for run, result in local for row in table.difference_rows(result)],
        "compared": list(table.COMPARED.values()),
        "froc": charts.froc(local),
        "references": _references(local),
        "lesions": charts.lesions(local),
        "lesion_tables": _lesion_tables(local),
        "healthy": [
            (run, result.healthy.pictures, row)
            for run, result in zip(runs, evaluations)
            if result.healthy
            for row in table.healthy_rows(result.healthy)
        ],
        "healthy_columns": list(table.HEALTHY.values()),
        "disclosures": list(dict.fromkeys(result.disclosure for result in evaluations)),
        "discs": sorted({(result.optic_disc["excluded"], result.pictures) for _, result in local}),
        "gallery": _gallery(runs, evaluations),
    }


def _scales(graded: Sequence[tuple[Run, EvaluationResult]]) -> list[tuple[dict[str, Any], list[Run]]]:
    """The scales on which runs were compared with the data, each with its runs."""
    result: list[tuple[dict[str, Any], list[Run]]] = []
    for run, evaluation in graded:
        scale = evaluation.scale | {"names": evaluation.class_names}
        owners = next((owners for known, owners in result if known == scale), None)
        if owners is None:
            result.append((scale, [run]))
        else:
            owners.append(run)
    return result


def _recall(evaluations: Sequence[EvaluationResult]) -> list[tuple[str, int, list[str]]]:
    """Class, its pictures in the first run, and each run's recall; nothing where the runs' classes differ."""
    if len({tuple(result.class_names) for result in evaluations}) != 1:
        return []
    pictures = map(sum, evaluations[0].grading.confusion)
    recalls = zip(*(map(table.number, result.grading.recall) for result in evaluations))
    return list(zip(evaluations[0].class_names, pictures, map(list, recalls)))


def _map_tables(local: Sequence[tuple[Run, LocalizationResult]]) -> dict[str, Any] | None:
    """One run: its maps side by side. Several: the runs side by side, a row for each metric and map."""
    if not local:
        return None
    names = _measured(local)
    if len(local) == 1:
        return {
            "columns": [table.TITLES[name] for name in names],
            "rows": table.localization_rows(local[0][1], names),
        }
    rows = []
    for key, title in table.LOCALIZATION.items():
        floors = {table.number(result.floor[table.FLOOR[key]]) for _, result in local if key in table.FLOOR}
        floor = floors.pop() if len(floors) == 1 else ""
        for name in names:
            values = (table.reading(table.measured(result).get(name, {}).get(key)) for _, result in local)
            rows.append([title, table.TITLES[name], *values, floor])
            title = ""
    return {"columns": ["Map", *(run for run, _ in local)], "rows": rows}


def _measured(local: Sequence[tuple[Run, LocalizationResult]]) -> list[str]:
    """The maps and references that any of the runs has."""
    return [name for name in table.TITLES if any(name in table.measured(result) for _, result in local)]


def _references(local: Sequence[tuple[Run, LocalizationResult]]) -> list[str]:
    """A sentence on each kind of reference that any of the runs has."""
    names = set(_measured(local))
    filters = sorted({result.contrast for _, result in local} - {""})
    texts = {
        "contrast": f"the unlearned filter {', '.join(filters)}",
        "stride_ceiling": "the masks themselves on the grid of the maps",
        "supervised": "a U-Net that was trained on masks",
    }
    return [f"{table.TITLES[name]}: {text}" for name, text in texts.items() if name in names]


def _lesion_tables(local: Sequence[tuple[Run, LocalizationResult]]) -> list[dict[str, Any]]:
    """A table for each of three metrics, its rows the lesions of all runs."""
    names = _measured(local)
    return [
        {
            "title": table.LOCALIZATION[key],
            "columns": [table.TITLES[name] for name in names],
            "rows": [[run.label, *row] for run, result in local for row in table.lesion_rows(result, names, key)],
        }
        for key in ("aupr", "recall", "froc")
    ]


def _gallery(runs: Sequence[Run], evaluations: Sequence[EvaluationResult]) -> dict[str, Any]:
    """cases: one for each picture, with the views of the runs that show it. maps, lesions: those that any case has."""
    cases: dict[str, dict[str, Any]] = {}
    for run, result in zip(runs, evaluations):
        for entry in result.gallery:
            key = f"{result.manifest}/{entry['key']}"
            case = cases.setdefault(key, {"truth": entry["truth"], "lesions": entry["lesions"], "views": []})
            files = {name: run.folder / "evaluation" / file for name, file in entry["panels"].items()}
            view = {"run": run, "predicted": entry["predicted"], "probability": entry["probability"]}
            view["wrong"] = entry["truth"] is not None and entry["truth"] != entry["predicted"]
            case["views"].append(view | {"panels": {name: _inline(name, path) for name, path in files.items()}})
    panels = {name for case in cases.values() for view in case["views"] for name in view["panels"]}
    lesions = sorted({kind for case in cases.values() for kind in case["lesions"]})
    return {
        "cases": list(cases.values()),
        "maps": [name for name in NAMES if name in panels],
        "lesions": lesions + (["optic_disc"] if "lesions" in panels else []),
    }


def _inline(name: str, path: Path) -> str:
    """A data URI of at most ``PICTURE`` or ``MAP`` pixels a side; maps are grey JPEGs, off by a level or two."""
    buffer = io.BytesIO()
    most = MAP if name in NAMES else PICTURE
    with Image.open(path) as picture:
        if picture.width > most:
            picture = picture.resize((most, most), Image.Resampling.LANCZOS)
        if name == "lesions":
            picture.save(buffer, "PNG", optimize=True)
        else:
            picture.save(buffer, "JPEG", quality=88)
    kind = "png" if name == "lesions" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
