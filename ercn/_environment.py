"""The machine and the software of a run."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ercn", "torch", "torchvision", "timm", "lightning", "lightly", "numpy", "pillow", "safetensors")


def version(package: str) -> str | None:
    """Version of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of the installed ones among ``PACKAGES`` and ``more``."""
    return {name: found for name in (*PACKAGES, *more) if (found := version(name)) is not None}


def environment() -> dict[str, Any]:
    """Command, versions, threads, devices and git commit, as results record them."""
    import torch

    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    folder = Path(__file__).parent

    def run(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        tracked = run("ls-files", Path(__file__).name)
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain"))} if tracked else None
    except (OSError, subprocess.CalledProcessError):
        return None
