"""The page's charts as SVG: legible at any size, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ercn.maps import NAMES
from ercn.report.evaluation import EvaluationResult, LocalizationResult
from ercn.report.runs import Run
from ercn.report.table import REFERENCES

_STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#57606a",
    "axes.labelcolor": "#1b1f24",
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "ercn",
}
_FLOOR = "#8a929a"


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _square(diagonal: bool) -> tuple[Figure, Any]:
    figure = _figure(4.2, 3.7)
    axes = figure.add_subplot()
    if diagonal:
        axes.plot([0, 1], [0, 1], color=_FLOOR, linewidth=1, linestyle=(0, (4, 3)))
    return figure, axes


def _panels(local: Sequence[tuple[Run, LocalizationResult]], margin: float, height: float) -> tuple[Figure, dict]:
    """A figure, and the axes for each map, by name."""
    maps = [name for name in NAMES if any(name in result.maps for _, result in local)]
    figure = _figure(2.3 * len(maps) + margin, height)
    axes = figure.subplots(1, len(maps), sharex=True, sharey=True, squeeze=False)[0]
    for name, own in zip(maps, axes):
        own.set_title(NAMES[name], fontsize=9.5)
    return figure, dict(zip(maps, axes))


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _styled(draw):
    def drawn(*args):
        with matplotlib.rc_context(_STYLE):
            return draw(*args)

    drawn.__doc__ = draw.__doc__
    return drawn


@_styled
def training_charts(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Loss and validation scores by epoch, a colour for each run; a single run shows all parts of its loss."""
    histories = [(run, run.history) for run in runs if run.history]
    if not histories:
        return []
    names = list(dict.fromkeys(name for _, history in histories for name in history))
    losses = [name for name in names if name in ("loss", "val_loss") or (len(runs) == 1 and "loss" in name)]
    scores = [name for name in names if "loss" not in name and name not in ("epoch", "step", "seconds", "lr")]
    result = []
    for title, group in (("Loss", losses), ("Scores", scores)):
        shown = [(run, history, name) for name in group for run, history in histories if name in history]
        if not shown:
            continue
        several = len(runs) > 1  # a panel for each series, in which the runs are compared
        figure = _figure(3.9 * len(group), 3.2) if several else _figure(5.4, 3.2)
        axes = figure.subplots(1, len(group) if several else 1, squeeze=False)[0]
        for i, (run, history, name) in enumerate(shown):
            title_of = name.replace("_", " ")
            style = {"markersize": 3.2, "linewidth": 1.5}
            if several:
                ax = axes[group.index(name)]
                ax.set_title(title_of, fontsize=9.5)
                style |= {"marker": run.marker, "color": run.color, "label": run.label}
            else:
                ax = axes[0]
                style |= {"marker": "osD^vP*X<>"[i % 10], "label": title_of}
            ax.plot(history["epoch"], history[name], **style)
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(axis="y")
        axes[0].legend(fontsize=8.5)
        ends = "; ".join(f"{run.label} {name} from {h[name][0]:.3g} to {h[name][-1]:.3g}" for run, h, name in shown)
        result.append({"title": title, "image": _svg(figure), "text": f"{title} by epoch: {ends}"})
    return result


@_styled
def confusion(result: EvaluationResult) -> dict[str, str]:
    """Counts, shaded by the share of the row."""
    matrix, names = np.array(result.grading.confusion), result.class_names
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, axes = _square(diagonal=False)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    for i in ticks:
        for j in ticks:
            color = "white" if share[i, j] > 0.55 else "#1b1f24"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=color, fontsize=10.5)
    rows = (f"{name}: {', '.join(map(str, row))}" for name, row in zip(names, matrix))
    return {"image": _svg(figure), "text": f"Confusion matrix, rows are the truth: {'; '.join(rows)}"}


@_styled
def roc(graded: Sequence[tuple[Run, EvaluationResult]]) -> dict[str, str] | None:
    """ROC of referable DR, with a mark at the threshold from validation."""
    shown = [(run, result.grading) for run, result in graded if result.grading.roc]
    if not shown:
        return None
    figure, axes = _square(diagonal=True)
    texts = []
    for run, grading in shown:
        metrics = grading.metrics
        axes.plot(grading.roc["fpr"], grading.roc["tpr"], color=run.color, linewidth=1.7)
        place = 1 - metrics["referable_specificity"].value, metrics["referable_sensitivity"].value
        name = f"{run.label}: " if len(graded) > 1 else ""
        area = f"AUC {metrics['referable_auc'].value:.3f}"
        axes.plot(*place, color=run.color, marker=run.marker, markersize=7, markeredgecolor="white", label=name + area)
        texts.append(f"{name}{area}, at the threshold sensitivity {place[1]:.3f}, specificity {1 - place[0]:.3f}")
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid()
    axes.legend(loc="lower right", fontsize=8.5)
    return {"image": _svg(figure), "text": f"ROC of referable DR. {'; '.join(texts)}"}


@_styled
def reliability(result: EvaluationResult) -> dict[str, str]:
    """Accuracy against confidence, before and after calibration; a mark's area is its share of the pictures."""
    figure, axes = _square(diagonal=True)
    texts = []
    for when, color, marker, key in (("before", "#d55e00", "s", "ece_uncalibrated"), ("after", "#0072b2", "o", "ece")):
        bins = result.grading.reliability[when]
        x, y, n = (np.array([one[name] for one in bins]) for name in ("confidence", "accuracy", "pictures"))
        label = f"{when} calibration, ECE {result.grading.metrics[key].value:.3f}"
        if when == "before" and result.temperature == 1:
            continue
        axes.plot(x, y, color=color, linewidth=1.2, alpha=0.6)
        size = 14 + 220 * n / n.sum()
        axes.scatter(x, y, s=size, color=color, marker=marker, alpha=0.85, edgecolor="white", label=label)
        texts.append(label)
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1.02), ylim=(-0.02, 1.04), aspect="equal")
    axes.grid()
    legend = axes.legend(loc="upper left", fontsize=8.5)
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    return {"image": _svg(figure), "text": f"Reliability diagram: {'; '.join(texts)}"}


@_styled
def lesions(local: Sequence[tuple[Run, LocalizationResult]]) -> dict[str, str] | None:
    """Pixel AUPR of each map by lesion, with intervals, and that of a constant map."""
    kinds = list(dict.fromkeys(kind for _, result in local for kind in result.lesions))
    if not kinds:
        return None
    figure, panels = _panels(local, 1.6, 1.1 + (0.30 + 0.11 * len(local)) * len(kinds))
    texts = []
    for name, axes in panels.items():
        for i, (run, result) in enumerate(local):
            offset = 0.16 * (i - (len(local) - 1) / 2)
            for row, kind in enumerate(kinds):
                part = result.lesions.get(kind)
                entry = part and part.maps.get(name, {}).get("aupr")
                if entry is None or entry.value is None:
                    continue
                if entry.low is not None:
                    axes.plot([entry.low, entry.high], [row + offset] * 2, color=run.color, linewidth=1.6)
                axes.plot(entry.value, row + offset, color=run.color, marker=run.marker, markersize=5)
                floor = part.floor["aupr"]
                axes.plot(floor, row + offset, color=_FLOOR, marker="|", markersize=9, markeredgewidth=1.6)
                texts.append(f"{run.label}, {NAMES[name]}, {kind.replace('_', ' ')}: {entry.value:.3f}")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel("pixel AUPR")
    first = next(iter(panels.values()))
    first.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    first.set_ylim(len(kinds) - 0.5, -0.5)
    first.set_xlim(left=0)
    return {"image": _svg(figure), "text": f"Pixel AUPR by lesion. {'; '.join(texts)}"}


@_styled
def froc(local: Sequence[tuple[Run, LocalizationResult]]) -> dict[str, str] | None:
    """Lesions found against false marks per picture: a panel for each map, the first run's references in grey."""
    if not local:
        return None
    figure, panels = _panels(local, 1.2, 2.9)
    first, texts = local[0][1], []
    for name, axes in panels.items():
        for style, (reference, values) in zip(("-", "--", ":"), first.references.items()):
            at = {"color": _FLOOR, "linewidth": 1.2, "linestyle": style}
            axes.plot(first.froc["rates"], values["froc"].sensitivity, label=REFERENCES[reference], **at)
        for run, result in local:
            if name in result.maps:
                score = result.maps[name]["froc"]
                style = {"color": run.color, "marker": run.marker, "markersize": 4, "linewidth": 1.6}
                label = run.label if len(local) > 1 else NAMES[name]
                axes.plot(result.froc["rates"], score.sensitivity, label=label, **style)
                texts.append(f"{run.label}, {NAMES[name]}: mean sensitivity {score.value:.3f}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(first.froc["rates"], ["⅛", "¼", "½", "1", "2", "4", "8"])
        axes.set_xlabel("false marks per picture")
        axes.grid()
    left = next(iter(panels.values()))
    left.set(ylim=(-0.02, 1.02), ylabel="lesions found")
    left.legend(fontsize=8)
    return {"image": _svg(figure), "text": f"FROC by lesion. {'; '.join(texts)}"}
