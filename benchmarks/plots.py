"""``ercn bench plot FILE…``: roofline, time and memory against size, ratios; several files stand side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ercn.benchmarks.ceilings import peak_gflops
from ercn.benchmarks.config import PlotConfig
from ercn.benchmarks.environment import machine
from ercn.benchmarks.results import Row, load, timed

COLORS = {"eager": "C3", "compile": "C1", "blockwise": "C5", "sdpa": "C7", "t_gemm": "k", "t_mlp": "k"}
MARKERS = {"affinity": "o", "mil": "s", "refinement": "D", "walk": "v", "model": "^", "overhead": "P"}


def plot(config: PlotConfig) -> int:
    """Write the figures into ``out`` and print their names. ValueError where no file has a time."""
    runs = [load(path) for path in config.files]
    if not any(timed(run) for run in runs):
        raise ValueError(f"no row with a time in {', '.join(config.files)}")
    import matplotlib

    matplotlib.use("Agg")
    titles = [_title(path, run) for path, run in zip(config.files, runs)]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    figures = {"roofline": roofline(runs, titles), "ratios": ratios(runs, titles)}
    for op in sorted({row["op"] for run in runs for row in timed(run)}):
        figures[f"time_{op}"] = against_size(runs, titles, op, "median_ms", "ms")
        figures[f"memory_{op}"] = against_size(runs, titles, op, "peak_extra_mb", "peak extra MB")
    for name, figure in figures.items():
        if figure is None:
            continue
        for suffix in ("png", "svg"):
            figure.savefig(out / f"{name}.{suffix}", dpi=150, bbox_inches="tight")
            print(out / f"{name}.{suffix}")
    return 0


def _title(path: str, run: dict[str, Any]) -> str:
    commit = (run["environment"].get("git") or {}).get("commit", "unknown commit")[:12]
    return (
        f"{Path(path).name}: {machine(run['environment'])}\ntorch {run['environment']['packages']['torch']}, {commit}"
    )


def _axes(rows: int, columns: int, height: float = 3.6):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _color(variant: str) -> str:
    ours = {"ercn-cpu": "C0", "ercn-cuda": "C0", "ercn-triton": "C2", "ercn-reference": "C4", "ercn-auto": "C9"}
    return COLORS.get(variant) or ours.get(variant, "C8")


def roofline(runs: list[dict[str, Any]], titles: list[str]):
    """Dense-equivalent rate over FLOPs per minimum byte, under the measured peaks and copy bandwidth."""
    figure, axes = _axes(1, len(runs), 5)
    for axis, run, title in zip(axes[0], runs, titles):
        rows = [row for row in timed(run) if row["dense_flops"]]
        intensity = [row["dense_flops"] / row["min_bytes"] for row in rows]
        low, high = min(intensity, default=1) / 2, max(intensity, default=1) * 2
        bandwidth = run["ceilings"]["copy_gbps"]
        for dtype in run["ceilings"]["gemm_gflops"]:
            rate = peak_gflops(run["ceilings"], dtype)
            ridge = rate / bandwidth
            left = min(low, ridge / 8)
            axis.plot([left, ridge, max(high, ridge)], [left * bandwidth, rate, rate], "k-", lw=1)
            axis.annotate(f"{dtype} {rate:,.0f}", (max(high, ridge), rate), ha="right", va="bottom", fontsize=7)
        for variant in sorted({row["variant"] for row in rows}):
            for op, marker in MARKERS.items():
                own = [(x, r) for x, r in zip(intensity, rows) if (r["variant"], r["op"]) == (variant, op)]
                points = [(x, r["dense_gflops"]) for x, r in own]
                if points:
                    axis.scatter(*zip(*points), s=18, color=_color(variant), marker=marker, label=f"{variant}, {op}")
        axis.set(xscale="log", yscale="log", xlabel="dense FLOPs / minimum byte", ylabel="dense-equivalent GFLOP/s")
        axis.set_title(title, fontsize=8)
        axis.legend(fontsize=6)
    return figure


def against_size(runs: list[dict[str, Any]], titles: list[str], op: str, field: str, label: str):
    """One line per variant over the size, for what has two sizes or more; a cross where one stops fitting in memory."""
    groups = sorted({_group(row) for run in runs for row in run["rows"] if row["op"] == op})
    groups = [g for g in groups if len({r["size"] for run in runs for r in timed(run) if _group(r) == g}) > 1]
    if not groups:
        return None
    figure, axes = _axes(len(groups), len(runs))
    for line, group in zip(axes, groups):
        for axis, run, title in zip(line, runs, titles):
            rows = [row for row in run["rows"] if _group(row) == group]
            _lines(axis, rows, field)
            axis.set(xscale="log", yscale="log", xlabel="pixels" if op != "mil" else "instances", ylabel=label)
            axis.set_title(f"{' · '.join(group)}\n{title}", fontsize=7)
            if axis.lines:
                axis.legend(fontsize=6)
    return figure


def _group(row: Row) -> tuple[str, ...]:
    return row["op"], row["direction"], row["dtype"], row["series"]


def _lines(axis, rows: list[Row], field: str) -> None:
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["size"])
        points = [(row["size"], row[field]) for row in own if row["status"] == "ok" and row[field]]
        if not points:
            continue
        axis.plot(*zip(*points), marker=".", color=_color(variant), label=variant)
        beyond = [row["size"] for row in own if row["status"] == "skipped" and row["size"] > points[-1][0]]
        if beyond:
            axis.plot(*points[-1], marker="x", ms=9, mew=2, color=_color(variant))
            axis.annotate(f"no room at {beyond[0]:,}", points[-1], fontsize=6, color=_color(variant))


def ratios(runs: list[dict[str, Any]], titles: list[str]):
    """Time over that of the case's baseline product (of eager for the network), a bar per variant."""
    cases = sorted({row["case"] for run in runs for row in timed(run)})
    figure, axes = _axes(1, len(runs), max(3.0, 0.5 * len(cases)))
    for axis, run, title in zip(axes[0], runs, titles):
        seen = set()
        for place, case in enumerate(cases):
            rows = [r for r in timed(run) if r["case"] == case and r["baseline"] in r["ratios"]]
            for i, row in enumerate(rows):
                name = row["variant"]
                value, height = row["ratios"][row["baseline"]]["median"], 0.8 / len(rows)
                axis.barh(place + i * height, value, height, color=_color(name), label=None if name in seen else name)
                seen.add(name)
        axis.axvline(1, color="k", lw=0.8)
        axis.set_yticks([i + 0.4 for i in range(len(cases))], cases, fontsize=6)
        axis.set(xscale="log", xlabel="time / baseline product (network: / eager)")
        axis.set_title(title, fontsize=8)
        if seen:
            axis.legend(fontsize=6)
    return figure
