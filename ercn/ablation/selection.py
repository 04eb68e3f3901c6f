"""``ercn select``: chooses a row of a grid on the validation split; no picture of the test split is read.

    score = sum over the grid's ``choose`` of weight · mean over seeds of the column

The row of the highest score wins, in its group and of all. A row is eligible where all its seeds are finished, it has
every column of ``choose``, and no seed lost its CAM (``maps.LOST``); the last condition is dropped where no row meets
it. The margin is that to the second, the best eligible row with other cells, taken draw by draw of the same validation
patients. Its interval says nothing about the seeds; in how many of them the winner is ahead is given beside it.

The winner's score is the largest of many, and so too good; report the test split of pictures that had no part in the
choice (``grid``).

out/selection.json    every row with every column of the table, each seed's value and score; the choice
out/selection.csv     the columns and scores of each row, one a line; .md for readers
out/chosen.yaml       the winner's configuration for ``ercn train --config``, with the grid's first seed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ercn._files import write_csv, write_json, write_text
from ercn.ablation.grid import Cell, Grid, load_grid
from ercn.ablation.runner import run_cells
from ercn.ablation.table import (
    COLUMNS,
    finished,
    flat_reading,
    lines_of,
    lost,
    markdown_table,
    name_of,
    paragraphs,
    reading,
    results,
)
from ercn.config import RunConfig, SelectConfig
from ercn.evaluation import metrics
from ercn.training.run_folder import plain

LEAST_SEEDS = 5
SPLIT = "val"


def select(config: SelectConfig) -> Path:
    """Runs the unfinished cells of the grid and chooses; returns ``selection.md``. It resumes as ``ablate`` does.

    Rows with failed cells cannot be chosen. Raises ValueError for a grid that is inconsistent, has fewer than
    ``LEAST_SEEDS`` seeds or nothing to choose by, before anything runs; and at the end where cells failed, naming them.
    """
    grid, out = load_grid(config.grid), Path(config.out)
    seeds = len(set(grid.seeds))
    if seeds < LEAST_SEEDS:
        raise ValueError(f"{config.grid}: to choose takes at least {LEAST_SEEDS} seeds; the grid has {seeds}")
    _check(grid, config.grid)
    return run_cells(grid, out, SPLIT, partial(_write, grid, out, config.bootstrap))


def _check(grid: Grid, where: str) -> None:
    if not grid.choose:
        raise ValueError(f"{where}: choose is missing; it weights columns, as in choose: {{kappa: 1.0}}")
    for name, weight in grid.choose.items():
        if name not in COLUMNS:
            raise ValueError(f"{where}: choose: {name!r} is no column; there are {', '.join(COLUMNS)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not np.isfinite(weight):
            raise ValueError(f"{where}: choose: the weight of {name} must be a number; got {weight!r}")


def _write(grid: Grid, out: Path, draws: int, cells: Mapping[tuple[str, int], Cell], about: Mapping[str, Any]) -> Path:
    """Writes the four files for the finished cells; ``chosen.yaml`` only where a row can be chosen."""
    result = results(grid, cells, draws=draws, about=about)
    scores = {row["name"]: _score(grid, cells, row, draws) for row in result["rows"]}  # [seeds, 1 + draws]
    for row in result["rows"]:
        score = scores[row["name"]]
        row["score"] = None if score is None else _entry(score)
        row["hindrance"] = _hindrance(grid, row)
    fit = [row for row in result["rows"] if row["hindrance"] is None]
    groups = {row["group"]: [other for other in fit if other["group"] == row["group"]] for row in fit}
    result |= {
        "choose": grid.choose,
        "groups": [{"group": group} | _best(rows, scores) for group, rows in groups.items()],
        "chosen": _best(fit, scores) if fit else None,
    }
    best = {entry["row"]: "best of its group" for entry in result["groups"]}
    best |= {result["chosen"]["row"]: "chosen"} if fit else {}
    for row in result["rows"]:
        notes = [
            row["hindrance"],
            best.get(row["name"]),
            f"CAM lost in {flat_reading(row)} seeds" if lost(row) else None,
        ]
        row["place"] = "; ".join(filter(None, notes))
    write_json(out / "selection.json", result)
    write_csv(out / "selection.csv", (line for row in result["rows"] for line in _lines(row)))
    write_text(out / "selection.md", "\n\n".join(_paragraphs(result)) + "\n")
    if result["chosen"]:
        write_text(out / "chosen.yaml", _yaml(grid, cells, result["chosen"]["row"]))
    return out / "selection.md"


def _score(grid: Grid, cells: Mapping[tuple[str, int], Cell], row: Mapping[str, Any], draws: int) -> np.ndarray | None:
    """[seeds, 1 + draws]; None where a column is missing."""
    if not row["seeds"] or grid.choose.keys() - row["values"].keys():
        return None
    own = finished(grid, row["name"], cells, draws, SPLIT)
    return np.stack([sum(w * own[seed][name] for name, w in grid.choose.items()) for seed in row["seeds"]])


def _entry(score: np.ndarray) -> dict[str, Any]:
    low, high = metrics.interval(score[:, 1:].mean(0))
    return {"value": float(score[:, 0].mean()), "low": low, "high": high, "each": score[:, 0].tolist()}


def _hindrance(grid: Grid, row: Mapping[str, Any]) -> str | None:
    """Why the row cannot be chosen, apart from a lost CAM."""
    if missing := len(set(grid.seeds)) - len(row["seeds"]):
        return f"{missing} seeds are missing"
    if absent := sorted(grid.choose.keys() - row["values"].keys()):
        return f"has no {', '.join(absent)}"
    return None


def _best(rows: list[dict[str, Any]], scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The row of the highest score, the first among equals, and its margin to the second."""
    rows = [row for row in rows if not lost(row)] or rows
    ranked = sorted(rows, key=lambda row: -row["score"]["value"])
    first, second = ranked[0], next((row for row in ranked if row["cells"] != ranked[0]["cells"]), None)
    result = {"row": first["name"], "second": None, "margin": None, "beyond": None, "ahead": None}
    if second is not None:
        margin = _entry(scores[first["name"]] - scores[second["name"]])
        result |= {
            "second": second["name"],
            "margin": margin,
            "beyond": margin["low"] is not None and margin["low"] > 0,
            "ahead": sum(value > 0 for value in margin["each"]),
        }
    return result


def _lines(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the CSV: those of the table, and one more for the score."""
    lines = lines_of(row)
    if row["score"] is not None:
        lines += lines_of(row | {"values": {"score": row["score"] | {"sd": None}}})
    return [line | {"place": row["place"]} for line in lines]


def _paragraphs(result: dict[str, Any]) -> list[str]:
    rule = " + ".join(f"{weight:g} · {name}" for name, weight in result["choose"].items())
    parts = [f"Chosen on validation by {rule}; the test split was not read."]
    if result["chosen"]:
        parts += [f"Chosen: **{result['chosen']['row']}**; {_margin(result['chosen'], result)} chosen.yaml has it."]
    else:
        parts += ["No row can be chosen yet."]
    named = [entry for entry in result["groups"] if entry["group"]]
    parts += ["\n".join(f"- {e['group']}: **{e['row']}**; {_margin(e, result)}" for e in named)] if named else []
    lines = [["", "row", "score", "score of each seed", *(COLUMNS[name] for name in result["choose"]), "flat CAM", ""]]
    for row in result["rows"]:
        each = ", ".join(f"{value:.3f}" for value in row["score"]["each"]) if row["score"] else ""
        values = [reading(row["values"].get(name), signed=False) for name in result["choose"]]
        line = [row["group"], name_of(row, result), reading(row["score"], signed=False), each, *values]
        lines.append([*line, flat_reading(row), row["place"]])
    return [*parts, markdown_table(lines), *paragraphs(result)]


def _margin(entry: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if entry["second"] is None:
        return "there is no second."
    leaves = "the interval leaves out 0" if entry["beyond"] else "the interval does not leave out 0"
    margin = reading(entry["margin"], signed=True).strip("*")
    ahead = f"ahead in {entry['ahead']} of {len(result['seeds'])} seeds"
    return f"{margin} before {entry['second']}; {leaves}; {ahead}."


def _yaml(grid: Grid, cells: Mapping[tuple[str, int], Cell], name: str) -> str:
    """The winner's ``TrainConfig`` with out, resume and progress at their defaults."""
    cell = cells[name, grid.seeds[0]]
    default = RunConfig()
    run = replace(cell.config.run, out=default.out, resume=default.resume, progress=default.progress)
    head = f"# {name}, chosen by ercn select\n"
    if cell.weights is not None:
        head += "# Its figures are of weights that another row trained, which it only evaluated with these options.\n"
    return head + yaml.safe_dump(plain(replace(cell.config, run=run)), sort_keys=False)
