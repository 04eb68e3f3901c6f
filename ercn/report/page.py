"""One self-contained HTML page about a run, or comparing several, from the files in their folders; works offline.

``page.html.jinja`` is its template, which includes ``style.css`` and ``gallery.js``.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader

from ercn._files import DISCLAIMER, write_text
from ercn.config import ReportConfig
from ercn.maps import NAMES
from ercn.report.charts import training_charts
from ercn.report.overlay import COLORMAP, COLORS, OPACITY, OTHER
from ercn.report.results import differing_settings, results
from ercn.report.runs import Run, read_runs


def write_report(run: Path) -> Path:
    """Writes ``run/report.html`` from config.yaml, metrics.csv, export/ and evaluation/, as far as they exist."""
    write_text(run / "report.html", page(read_runs([run])))
    return run / "report.html"


def report(config: ReportConfig) -> Path:
    """Writes one page that compares the runs and returns ``config.out``.

    It shows, for every evaluation of any run, metrics with intervals side by side, confusion matrices, ROC and
    reliability, localisation by lesion, and the same pictures with each run's maps; then the training curves and the
    settings in which the runs differ. Raises ValueError where no run is named, FileNotFoundError where a folder is no
    run.
    """
    if not config.runs:
        raise ValueError("runs is empty; name the folders of the runs to compare: ercn report RUN RUN …")
    out = Path(config.out)
    if out.is_dir():
        raise ValueError(f"out {out} is a folder; give the name of the HTML file to write")
    write_text(out, page(read_runs([Path(run) for run in config.runs])))
    return out


def page(runs: Sequence[Run]) -> str:
    environment = Environment(loader=PackageLoader("ercn.report", "."), autoescape=True, trim_blocks=True)
    inferno = matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3]
    return environment.get_template("page.html.jinja").render(
        title=f"ERCN run “{runs[0].label}”" if len(runs) == 1 else f"{len(runs)} ERCN runs compared",
        notice=DISCLAIMER,
        runs=runs,
        phantom=any(run.dataset == "phantom" for run in runs),
        differing=differing_settings(runs),
        results=results(runs),
        training=training_charts(runs),
        map_names=NAMES,
        opacity=OPACITY,
        scale_colors=", ".join(matplotlib.colors.to_hex(inferno[i]) for i in range(0, 256, 15)),
        lesion_colors=lambda kinds: [(kind.replace("_", " "), COLORS.get(kind, OTHER)) for kind in kinds],
        lookup=base64.b64encode((inferno * 255).round().astype(np.uint8).tobytes()).decode(),
    )
