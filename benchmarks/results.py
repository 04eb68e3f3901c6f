"""Result files: one JSON object with the environment, the machine's ceilings and the rows; the same rows as CSV.

While a run goes on, FILE.jsonl holds a header line and then one line per finished row, each flushed to disk; so a crash
loses nothing, and every reader here takes that file as well.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ercn._files import read_json, write_csv, write_json

FORMAT = 2
Row = dict[str, Any]


class Writer:
    """Appends to FILE.jsonl; ``finish`` writes FILE.json and FILE.csv in its place. Without FILE it only keeps."""

    def __init__(self, save: str, header: dict[str, Any]) -> None:
        self.header, self.rows = {"format": FORMAT, **header}, []
        self.path = Path(save) if save else None
        self._stream = None
        if self.path is None:
            return
        if self.path.suffix != ".json":
            raise ValueError(f"--save must name a .json file; got {save!r}")
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
        write_json(self.path, {**self.header, "rows": self.rows})
        write_csv(self.path.with_suffix(".csv"), [flat(row) for row in self.rows])
        self._stream.close()
        self.path.with_suffix(".jsonl").unlink()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null; the row's reason says what happened."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(row: Row) -> Row:
    """Nested values as columns of their own: ratios.eager.median and so on."""
    result: Row = {}
    for name, value in row.items():
        nested = value if isinstance(value, dict) else {}
        result.update({f"{name}.{key}": v for key, v in flat(nested).items()} if nested else {name: value})
    return result


def load(path: str | Path) -> dict[str, Any]:
    """A saved run, finished (.json) or cut short (.jsonl). ValueError names the file where it is neither."""
    path = Path(path)
    if not path.is_file():
        folder = sorted(str(f) for f in path.parent.glob("*.json*")) if path.parent.is_dir() else []
        raise ValueError(f"{path} is no file; result files in {path.parent}: {', '.join(folder) or 'none'}")
    if path.suffix == ".jsonl":
        header, *rows = (
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")
        )
        values = {**header, "rows": rows}
    else:
        values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT or "rows" not in values:
        raise ValueError(f"{path} is not a result file of ercn bench (format {FORMAT})")
    return values


def timed(run: dict[str, Any]) -> list[Row]:
    return [row for row in run["rows"] if row["status"] == "ok"]


def sentence(error: Exception) -> str:
    """What a row says of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
