"""The progress bar of all commands but training, which has Lightning's."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Iterable[T], title: str, total: int, wanted: bool) -> Iterable[T]:
    """``items``, with a progress bar if it is wanted and the output is a terminal."""
    if not (wanted and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, title, total=total, console=Console(stderr=True))
