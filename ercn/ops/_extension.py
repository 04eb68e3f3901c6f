"""The compiled libraries libercn and libercn_cuda: loads each once and keeps the reason where one is absent."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
RECORD = PACKAGE / "_build.json"


def path(name: str = "libercn") -> Path:
    """Where the library lies: a shared library without Python symbols, which any process with torch can load."""
    return PACKAGE / "lib" / (name + (".dll" if sys.platform == "win32" else ".so"))


@functools.cache
def load(name: str = "libercn") -> str | None:
    """None once the operators of the library can be called, else a sentence why they cannot."""
    file = path(name)
    if not file.exists():
        return f"{name} was not built: {_recorded_reason(name)}"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return f"{name} failed to load: {error.__cause__ or error}"  # torch's own says which file, no more
    return None


def _recorded_reason(name: str) -> str:
    if not RECORD.exists():
        return "this is a source tree that was not installed (pip install --no-build-isolation -e .)"
    reason = json.loads(RECORD.read_text())["reasons"].get(name)
    return reason or "the build succeeded, but for another platform; install again"


@functools.cache
def cpu_info() -> dict[str, Any]:
    """Of libercn: ``build`` (compiler, C++ standard, flags, the oldest torch it runs on), ``features`` (instruction
    sets usable on this machine) and ``isas`` (values of ERCN_CPU_ISA that it has kernels for here, the best last).
    """
    return json.loads(torch.ops.ercn_native.cpu_info())


@functools.cache
def cuda_info() -> dict[str, str]:
    """CUDA runtime, compute capabilities and flags that libercn_cuda was built with."""
    return json.loads(torch.ops.ercn_native.cuda_info())


def cuda_kernels(attributes: bool = False) -> list[dict[str, Any]]:
    """Every kernel of libercn_cuda: name, launches so far, and threads and shared memory of the last launch.

    attributes: also registers, local memory and occupancy on the current device, or why the kernel is absent there;
    RuntimeError without a device.
    """
    return json.loads(torch.ops.ercn_native.cuda_kernels(attributes))

