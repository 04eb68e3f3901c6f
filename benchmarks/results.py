"""Result files: CSV of one row per case and variant, after a line "# {…}" with environment and ceilings as JSON.

Cells are JSON where they are not text; an empty cell is a value that the row does not have. ``pandas.read_csv(file,
skiprows=1)`` reads the rows. While a run goes on, FILE.jsonl holds the first line and one line per finished row, each
flushed to disk, so that a crash loses nothing; every reader here takes that file as well.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from ercn._files import csv_text, write_text

FORMAT = 3
Row = dict[str, Any]


class Writer:
    """Appends to FILE.jsonl; ``finish`` writes FILE.csv in its place. Without FILE it only keeps the rows."""

    def __init__(self, save: str, header: dict[str, Any]) -> None:
        self.header, self.rows = {"format": FORMAT, **header}, []
        self.path = Path(save) if save else None
        self._stream = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(self.path.with_suffix(".jsonl"), "w", encoding="utf-8")  # noqa: SIM115 - closed by finish
        self._line(self.header)

    def add(self, row: Row) -> None:
        row = _finite(row)
        self.rows.append(row)
        self._line(row)

    def _line(self, value: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(value) + "\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def finish(self) -> None:
        if self.path is None:
            return
        write(self.path, {**self.header, "rows": self.rows})
        self._stream.close()
        self.path.with_suffix(".jsonl").unlink()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null; the row's reason says what happened."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, run: dict[str, Any]) -> None:
    """Writes a run, as ``load`` returns it, to a CSV file."""
    header = json.dumps({name: value for name, value in run.items() if name != "rows"}, allow_nan=False)
    write_text(path, f"# {header}\n{csv_text(_flat(row) for row in run['rows'])}")


def _flat(row: Row) -> dict[str, str]:
    """Cells; dictionaries as columns of their own: ratios.eager.median and so on."""
    cells: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, dict) and value and not any("." in key for key in value):
            cells |= {f"{name}.{key}": cell for key, cell in _flat(value).items()}
        else:
            cells[name] = value if _is_text(value) else json.dumps(value, allow_nan=False)
    return cells


def _is_text(value: Any) -> bool:
    """Whether a reader takes the cell for what it is: no number, word or list of JSON."""
    return isinstance(value, str) and bool(value) and _cell(value) == value


def _cell(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _row(cells: dict[str, str]) -> Row:
    """The row of the cells that are not empty."""
    row: Row = {}
    for name, cell in cells.items():
        *outer, inner = name.split(".")
        if cell:
            place = row
            for key in outer:
                place = place.setdefault(key, {})
            place[inner] = _cell(cell)
    return row


def load(path: str | Path) -> dict[str, Any]:
    """A saved run, finished (.csv) or cut short (.jsonl). ValueError names the file where it is neither."""
    path = Path(path)
    if not path.is_file():
        folder = sorted(str(f) for kind in ("csv", "jsonl") for f in path.parent.glob(f"*.{kind}"))
        raise ValueError(f"{path} is no file; result files in {path.parent}: {', '.join(folder) or 'none'}")
    first, _, rest = path.read_bytes().decode("utf-8", "replace").partition("\n")
    header = _cell(first.removeprefix("# "))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result file of ercn bench (format {FORMAT})")
    if path.suffix == ".jsonl":
        rows = [_cell(line) for line in rest.split("\n") if line.endswith("}")]
    else:
        table = csv.DictReader(io.StringIO(rest, newline=""), restkey="")
        rows = [None if "" in cells or None in cells.values() else _row(cells) for cells in table]
    if not all(isinstance(row, dict) and "case" in row for row in rows):
        raise ValueError(f"{path} is damaged: not every line of it is a row")
    return {**header, "rows": rows}


def timed(run: dict[str, Any]) -> list[Row]:
    return [row for row in run["rows"] if row["status"] == "ok"]


def sentence(error: Exception) -> str:
    """An error as the text of a row."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
