"""Files that are either whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
