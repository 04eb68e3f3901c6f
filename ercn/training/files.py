"""JSON and CSV files of a run folder, never half written, and what they say about the machine and the software."""

from __future__ import annotations

import csv
import io
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ercn._files import write_text

PACKAGES = ("ercn", "torch", "torchvision", "timm", "lightning", "lightly", "numpy", "pillow", "safetensors")
DISCLAIMER = "For research only. Not a medical device; not for diagnosis."


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_empty(out: Path) -> None:
    """ValueError where a command that overwrites nothing would find something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out {out} is not an empty folder, and nothing is overwritten: give another --out")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or ValueError naming the file where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error


def read_evaluations(run: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The evaluations of a run by name, test first and val last; and the files left out, of an older version."""
    paths = (run / "evaluation").glob("*.json")
    paths = sorted(paths, key=lambda path: (path.stem != "test", path.stem == "val", path))
    read = {path: read_json(path) for path in paths}
    old = [str(path.relative_to(run)) for path, evaluation in read.items() if "disclosure" not in evaluation]
    return {path.stem: evaluation for path, evaluation in read.items() if "disclosure" in evaluation}, old


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A header from the keys of all rows in order of appearance; missing values stay empty."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def package_versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Of ``PACKAGES`` and more, those that are installed."""
    versions = {}
    for name in (*PACKAGES, *more):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment() -> dict[str, Any]:
    """What a run needs to be understood later: versions, command, processor, devices, git commit."""
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
