"""Loads the compiled libraries libercn and libercn_cuda once, and keeps the reason if one is absent."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any, cast

import torch

PACKAGE = Path(__file__).resolve().parent.parent
RECORD = PACKAGE / "_build.json"


def path(name: str = "libercn") -> Path:
    """The file of the library: a shared library without Python symbols, which any process with torch can load."""
    return PACKAGE / "lib" / (name + (".dll" if sys.platform == "win32" else ".so"))


@functools.cache
def load(name: str = "libercn") -> str | None:
    """Load the library: None if its operators can be called, else a sentence why not."""
    file = path(name)
    if not file.exists():
        return f"{name} was not built: {_recorded_reason(name)}"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"{name} failed to load: {error.__cause__ or error}"  # torch's own message only names the file
    return None


def _recorded_reason(name: str) -> str:
    if not RECORD.exists():
        return "this is a source tree that was not installed (pip install --no-build-isolation -e .)"
    reason = json.loads(RECORD.read_text())["reasons"].get(name)
    return reason or "the build succeeded, but for another platform; install again"


@functools.cache
def cpu_info() -> dict[str, Any]:
    """About libercn: ``build`` (compiler, C++ standard, flags, the oldest torch it runs on), ``features`` (instruction
    sets of this machine) and ``isas`` (the values of ERCN_CPU_ISA that have kernels here, the best last).
    """
    return cast(dict[str, Any], json.loads(torch.ops.ercn_native.cpu_info()))


@functools.cache
def cuda_info() -> dict[str, str]:
    """CUDA runtime, compute capabilities and flags of the build of libercn_cuda."""
    return cast(dict[str, str], json.loads(torch.ops.ercn_native.cuda_info()))


def cuda_kernels(attributes: bool = False) -> list[dict[str, Any]]:
    """Every kernel of libercn_cuda: name, launches so far, and threads and shared memory of the last launch.

    attributes: also registers, local memory and occupancy on the current device, or why the kernel is absent there;
    RuntimeError without a device.
    """
    return cast(list[dict[str, Any]], json.loads(torch.ops.ercn_native.cuda_kernels(attributes)))

