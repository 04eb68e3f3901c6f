"""build/gpu_pack: the compiled libraries for another machine's Python, to be carried beside the tracked files.

It holds both libraries (the objects of the build here linked anew, since of all files only the Python modules' depend
on Python), CUTLASS's headers for a build there should they not load, the smoke cases' Triton kernels as Triton's cache
holds them, and manifest.json, which says what it was made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from glob import glob
from pathlib import Path
from typing import Any

from ercn.benchmarks.gpu_check import ROOT, TRITON

PACK = ROOT / "build" / "gpu_pack"
ARCH = "9.0a"
MODULES = ("_C", "_cuda")
DESCRIBE = (
    "import json, sysconfig, torch; print(json.dumps({'python': sysconfig.get_python_version(), "
    "'suffix': sysconfig.get_config_var('EXT_SUFFIX'), 'torch': torch.__version__, 'cuda': torch.version.cuda}))"
)
COMPILE = "from ercn.benchmarks import gpu_smoke; gpu_smoke.compile_ahead('sm_90')"
LOAD = "import torch; from ercn import _C, _cuda; print(len(_cuda.kernels()), 'kernels in', _cuda.__file__)"


def sources() -> str:
    """Hash of what the libraries are compiled from."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]:
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def pack(python: str) -> int:
    """Bring the objects in build/cuda up to date, link them for ``python``, and write the folder."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "csrc/cuda"))
    import toolchain

    plan = toolchain.BUILD / "build.ninja"
    compiled = set(re.findall(r": nvcc (\S+)", plan.read_text())) if plan.exists() else set()
    if compiled != set(glob("csrc/cuda/**/*.cu", recursive=True)):
        raise SystemExit(f"{plan} is not of this checkout: build here first (pip install --no-build-isolation -e .)")
    if ARCH not in toolchain.archs():
        raise SystemExit(f"ERCN_CUDA_ARCHS leaves out {ARCH}, which the Hopper kernels need")
    toolchain.compile_objects()
    told = subprocess.run([python, "-c", DESCRIBE], capture_output=True, text=True, check=True)
    target = json.loads(told.stdout)
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"ERCN_BUILD": "cuda", "ERCN_CUDA_OBJECTS": str(toolchain.BUILD)}
        environment |= {"CUTLASS_PATH": str(toolchain.cutlass().parent)}
        command = [python, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", f"{folder}/temp"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        names = [f"{module}{target['suffix']}" for module in MODULES]
        with tarfile.open(PACK / "libraries.tar.xz", "w:xz", preset=3) as archive:
            for name in [*names, "_build.json"]:
                archive.add(Path(folder, "ercn", name), name)
    compile_triton(python)
    with tarfile.open(PACK / "cutlass.tar.xz", "w:xz", preset=3) as archive:
        for name in ("cute", "cutlass"):
            archive.add(toolchain.cutlass() / name, f"include/{name}")
    target |= {"machine": platform.machine(), "archs": toolchain.archs(), "sources": sources(), "commit": _commit()}
    (PACK / "manifest.json").write_text(json.dumps(target, indent=1) + "\n")
    for path in sorted(PACK.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def compile_triton(python: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": folder}
        environment |= {"TRITON_STORE_BINARY_ONLY": "1", "TRITON_INTERPRET": "0"}
        subprocess.run([python, "-c", COMPILE], cwd=ROOT, env=environment, check=True)
        with tarfile.open(PACK / "triton.tar.xz", "w:xz", preset=3) as archive:
            archive.add(folder, ".")


def unpack_triton() -> None:
    with tarfile.open(PACK / "triton.tar.xz") as archive:
        archive.extractall(TRITON, filter="data")
    for group in TRITON.glob("*/__grp__*.json"):  # of a kernel's files, by absolute paths
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.with_name(name)) for name in paths}}))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return told.stdout.strip()


def manifest() -> dict[str, Any]:
    """Of the pack where there is one for this Python, else empty."""
    path = PACK / "manifest.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    return held if held.get("suffix") == sysconfig.get_config_var("EXT_SUFFIX") else {}


def refusal() -> str | None:
    """Why the pack is not for this checkout, in a sentence."""
    held = manifest()
    if held and held["sources"] != sources():
        return f"{PACK} was made from other sources (commit {held['commit']}): pack again"
    return None


def unpack() -> str:
    """Put the libraries in their place, and say what was done."""
    held = manifest()
    if not held:
        return "there is no build/gpu_pack for this Python; the libraries are those of this checkout"
    with tarfile.open(PACK / "libraries.tar.xz") as archive:
        archive.extractall(ROOT / "ercn", filter="data")
    unpack_triton()
    return f"unpacked the libraries of commit {held['commit']}, linked with torch {held['torch']}"


def load() -> str | None:
    """None where both libraries load in a process of their own, else what it said."""
    told = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, check=False)
    print(told.stdout + told.stderr, flush=True)
    return None if told.returncode == 0 else (told.stderr.strip() or "nothing").splitlines()[-1]


def build() -> None:
    """Compile the libraries here, for this machine's Python and torch."""
    headers = PACK / "cutlass"
    if (PACK / "cutlass.tar.xz").exists():
        with tarfile.open(PACK / "cutlass.tar.xz") as archive:
            archive.extractall(headers, filter="data")
        os.environ["CUTLASS_PATH"] = str(headers)
    environment = os.environ | {"ERCN_BUILD": "cuda", "ERCN_CUDA_ARCHS": ARCH}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
