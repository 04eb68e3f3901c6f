"""Files that are either whole or not there: written under a temporary name, then renamed; and JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISCLAIMER = "For research only. Not a medical device; not for diagnosis."  # in every file that says something of eyes
TEMPORARY = ".tmp-"  # how temporary names begin; a kill leaves such files behind


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path of the same suffix, which becomes ``path`` when the block ends well."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary path beside ``path``, flushes the file to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """UTF-8, the line ends of ``text`` as they are."""
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode()))


def remove_temporary(folder: Path) -> None:
    """Deletes what a kill left below ``folder``."""
    for left in folder.glob(f"**/{TEMPORARY}*"):
        left.unlink()


def check_empty(out: Path) -> None:
    """ValueError where a command that overwrites nothing would find something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out {out} is not an empty folder, and nothing is overwritten: give another --out")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or ValueError naming the file where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """A header from the keys of all rows in order of appearance; missing values stay empty."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, csv_text(rows))
