"""The machine and the software that a result file was measured with."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import torch

from ercn import _environment
from ercn._environment import package_versions
from ercn.doctor import cpu_name
from ercn.ops import backends

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_CACHE_DIR")


def environment(device: str) -> dict[str, Any]:
    """Versions, commit, CPU, threads and, for a GPU, its name, memory, driver and clocks."""
    values = _environment.environment()
    values["command"] = shlex.join(["ercn", *sys.argv[1:]])
    values["packages"] = package_versions(("triton", "nvidia-ml-py"))
    values |= {
        "device": device,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backends": {b.name: b.reason or "usable" for b in backends()},
        "variables": {n: os.environ[n] for n in sorted(os.environ) if n in VARIABLES or n.startswith("ERCN_")},
    }
    return values | (_gpu() if device == "cuda" else {})


def machine(values: dict[str, Any]) -> str:
    """One line that names the machine of an environment."""
    if values["device"] == "cuda":
        return f"{values['gpu']}, driver {values['driver']}, CUDA {values['cuda']}"
    return f"{values['cpu']}, {values['cpu_threads']} threads of {values['cpu_count']} cores"


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    values: dict[str, Any] = {
        "gpu": properties.name,
        "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": "unknown",
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        values["driver"] = pynvml.nvmlSystemGetDriverVersion()
        values["max_sm_clock_mhz"] = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        values["max_memory_clock_mhz"] = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    except Exception as error:  # noqa: BLE001 - NVML raises its own classes
        values["nvml"] = f"cannot be asked: {error}"
    return values
