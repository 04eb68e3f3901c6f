"""One self-contained HTML page per run, made from the files in its folder; works offline."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image

from ercn._files import write_text
from ercn.training import table
from ercn.training.files import DISCLAIMER, read_json
from ercn.training.maps import NAMES
from ercn.training.overlay import COLORMAP

_PANEL = 256  # side of a gallery picture in the page, pixels


def write_report(run: Path) -> Path:
    """Writes ``run/report.html`` from config.yaml, metrics.csv, export/ and evaluation/, as far as they exist."""
    environment = Environment(loader=PackageLoader("ercn.training", "."), autoescape=True)
    curves = _curves(run / "metrics.csv")
    exported = [read_json(p) for name in ("model", "backbone") if (p := run / "export" / f"{name}.json").is_file()]
    page = environment.get_template("report.html.jinja").render(
        name=run.resolve().name,
        notice=DISCLAIMER,
        model=exported[0] if exported else {},
        phantom=bool(exported) and exported[0]["dataset"] == "phantom",
        curves=curves,
        evaluations=[_evaluation(run, path) for path in sorted((run / "evaluation").glob("*.json"), key=_test_first)],
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        environment=yaml.safe_dump(read_json(run / "environment.json"), sort_keys=False),
        colors=", ".join(matplotlib.colors.to_hex(c) for c in matplotlib.colormaps[COLORMAP](np.linspace(0, 1, 9))),
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def _test_first(path: Path) -> tuple[bool, str]:
    return path.stem != "test", path.stem


def _evaluation(run: Path, path: Path) -> dict[str, Any]:
    result = read_json(path)
    floor = table.floors(result)
    rows = [
        {"title": title, "value": table.reading(result["metrics"][key]), "floor": floor.get(key, "")}
        for key, title in table.METRICS.items()
    ]
    local = result["localization"]
    gallery = [
        entry | {"panels": {name: _inline(run / "evaluation" / file) for name, file in entry["panels"].items()}}
        for entry in result["gallery"]
    ]
    return result | {
        "rows": rows,
        "confusion_plot": _confusion(np.array(result["confusion"]), result["class_names"]),
        "missing_names": [result["class_names"][k] for k in result["missing"]],
        "recalls": list(zip(result["class_names"], np.sum(result["confusion"], axis=1), result["recall"])),
        "map_names": [NAMES[name] for name in local["maps"]] if local else [],
        "map_rows": table.localization_rows(local) if local else [],
        "gallery": gallery,
        "panel_names": {"picture": "picture", **NAMES, "lesion": "lesion mask"},
    }


def _curves(path: Path) -> list[dict[str, str]]:
    """One plot for the losses and one for the scores, each with a text that says what it shows."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return []
    series = {
        name: np.array([float(row[name]) if row[name] else np.nan for row in rows])
        for name in rows[0]
        if name not in ("epoch", "step", "seconds", "lr")
    }
    epochs = np.array([int(row["epoch"]) for row in rows])
    losses = {name: values for name, values in series.items() if "loss" in name}
    scores = {name: values for name, values in series.items() if "loss" not in name}
    return [
        {"title": title, "image": _plot(epochs, part), "text": _describe(title, part)}
        for title, part in (("Loss", losses), ("Scores", scores))
        if part
    ]


def _describe(title: str, series: dict[str, np.ndarray]) -> str:
    ends = "; ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in series.items())
    return f"{title} by epoch: {ends}"


def _plot(epochs: np.ndarray, series: dict[str, np.ndarray]) -> str:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), marker in zip(series.items(), "osD^vP*X<>" * 2):
        axes.plot(epochs, values, marker=marker, markersize=3, linewidth=1.4, label=name.replace("_", " "))
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _confusion(matrix: np.ndarray, names: list[str]) -> str:
    """Counts, shaded by the share of the row."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 1.8 + 0.75 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=30, ha="right")
    axes.set_yticks(ticks, names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    for i in ticks:
        for j in ticks:
            color = "white" if share[i, j] > 0.55 else "black"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=color)
    return _png(figure)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _inline(path: Path) -> str:
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.resize((_PANEL, _PANEL), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
