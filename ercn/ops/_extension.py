"""The compiled extension ercn._C: loads it once and keeps the reason where it is absent."""

from __future__ import annotations

import functools
import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import torch  # noqa: F401  (its libraries must be in the process before ours)

RECORD = Path(__file__).resolve().parent.parent / "_build.json"


@functools.cache
def load() -> str | None:
    """None once ``torch.ops.ercn_native.*`` can be called, else a sentence why it cannot."""
    if find_spec("ercn._C") is None:
        return f"ercn._C was not built: {_recorded_reason()}"
    try:
        importlib.import_module("ercn._C")
    except ImportError as error:
        return f"ercn._C failed to load: {error}"
    return None


def _recorded_reason() -> str:
    if not RECORD.exists():
        return "this is a source tree that was not installed (pip install --no-build-isolation -e .)"
    reason = json.loads(RECORD.read_text())["reason"]
    return reason or "the build succeeded, but for another Python or platform; install again"
