"""Reading the CSV files of data sets: all faults of a file in one message, each with its row, column and value."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from ercn.data.images import DataError

SHOWN = 10


class Table:
    """A CSV file in UTF-8 with or without a byte order mark, any line ends.

    Blanks around names and values are dropped, blank rows and empty further columns ignored. Values stay strings, so
    that ids keep their leading zeros. Rows are counted as a text editor does, from 1. Raises DataError if the file
    cannot be read or lacks one of ``columns``.

    header: whether the first row names the columns; otherwise they are ``columns``, in this order.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, delimiter: str = ",", header: bool = True):
        self.path = path
        self.faults: list[str] = []
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8 CSV"
            ) from None
        if "\0" in text:
            raise DataError(f"{path}: holds NUL characters; save it as UTF-8 CSV")
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
        self.columns = [name.strip() for name in next(reader, [])] if header else list(columns)
        while self.columns and not self.columns[-1]:
            self.columns.pop()
        for name in columns:
            if self.columns.count(name) != 1:
                found = ", ".join(map(repr, self.columns)) or "nothing"
                raise DataError(f"{path}: needs one column {name!r}; found the columns {found}")
        self._rows: list[tuple[int, dict[str, str]]] = []
        try:
            for values in reader:
                self._add(reader.line_num, [value.strip() for value in values])
        except csv.Error as error:
            raise DataError(f"{path}: row {reader.line_num}: {error}") from None

    def _add(self, row: int, values: list[str]) -> None:
        if not any(values):
            return
        if len(values) < len(self.columns) or any(values[len(self.columns) :]):
            self.fault(row, f"{len(values)} values for {len(self.columns)} columns")
        else:
            self._rows.append((row, dict(zip(self.columns, values))))

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        return iter(self._rows)

    def fault(self, row: int, text: str) -> None:
        self.faults.append(f"row {row}: {text}")

    def label(self, row: int, column: str, value: str, labels: Mapping[str, object]):
        """``labels[value]``, or None and a fault."""
        if value not in labels:
            self.fault(row, f"column {column!r}: {value!r} is not one of {', '.join(labels)}")
        return labels.get(value)

    def integer(self, row: int, column: str, value: str) -> int:
        """``value`` as an integer, or 0 and a fault."""
        try:
            return int(value)
        except ValueError:
            self.fault(row, f"column {column!r}: {value!r} is not an integer")
            return 0

    def unique(self, row: int, column: str, value: str, seen: dict[str, int]) -> bool:
        """Whether ``value`` can be an id: not empty, no path, not ``seen`` in an earlier row; else it is a fault.

        Ids name files, and some file systems ignore case: ids that differ only in case count as equal.
        """
        if not value or any(c in value for c in "/\\:\0") or value.startswith("."):
            self.fault(row, f"column {column!r}: {value!r} is not a picture's name")
            return False
        first = seen.setdefault(value.lower(), row)
        if first != row:
            self.fault(row, f"column {column!r}: {value!r} again; first in row {first}")
            return False
        return True

    def check(self) -> None:
        """Raises DataError with the first faults, if there were any, or if the table has no rows."""
        if self.faults:
            more = len(self.faults) - SHOWN
            tail = f"; and {more} more" if more > 0 else ""
            raise DataError(f"{self.path}: {len(self.faults)} fault(s): " + "; ".join(self.faults[:SHOWN]) + tail)
        if not self._rows:
            raise DataError(f"{self.path}: no rows")
