"""The compiled extensions ercn._C and ercn._cuda: loads each once and keeps the reason where one is absent."""

from __future__ import annotations

import functools
import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import torch  # noqa: F401  (its libraries must be in the process before ours)

RECORD = Path(__file__).resolve().parent.parent / "_build.json"


@functools.cache
def load(name: str = "_C") -> str | None:
    """None once the operators of ``ercn.<name>`` can be called, else a sentence why they cannot."""
    module = f"ercn.{name}"
    if find_spec(module) is None:
        return f"{module} was not built: {_recorded_reason(module)}"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} failed to load: {error}"
    return None


def _recorded_reason(module: str) -> str:
    if not RECORD.exists():
        return "this is a source tree that was not installed (pip install --no-build-isolation -e .)"
    reason = json.loads(RECORD.read_text())["reasons"].get(module)
    return reason or "the build succeeded, but for another Python or platform; install again"
