"""build/gpu_pack: everything that the GPU machine would otherwise compile; it travels beside the tracked files.

It holds both libraries, which know no Python and run on any torch from 2.10 on, CUTLASS's headers for a build there
should they not load, the smoke cases' Triton kernels as the cache of that machine's Triton holds them, and
manifest.json with the hash of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

from ercn.benchmarks.gpu_check import ROOT, TRITON
from ercn.ops import _extension

PACK = ROOT / "build" / "gpu_pack"
ARCH = "9.0a"
LIBRARIES = ("libercn", "libercn_cuda")
DESCRIBE = "import json, torch; print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda}))"
COMPILE = "from ercn.benchmarks import gpu_smoke; gpu_smoke.compile_ahead('sm_90')"
LOAD = """
from ercn.ops import _extension
for name in ("libercn", "libercn_cuda"):
    if reason := _extension.load(name):
        raise SystemExit(reason)
print(len(_extension.cuda_kernels()), "kernels in", _extension.path("libercn_cuda"))
"""


def sources() -> str:
    """Hash of what the libraries are compiled from."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]:
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def pack(python: str) -> int:
    """Bring the libraries up to date, compile Triton's kernels with ``python``'s Triton, and write the folder."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "csrc/cuda"))
    import toolchain

    if ARCH not in toolchain.archs():
        raise SystemExit(f"ERCN_CUDA_ARCHS leaves out {ARCH}, which the Hopper kernels need")
    _build_in_place()
    process = subprocess.run([python, "-c", DESCRIBE], capture_output=True, text=True, check=True)
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir(parents=True)
    with tarfile.open(PACK / "libraries.tar.xz", "w:xz", preset=3) as archive:
        for file in (*map(_extension.path, LIBRARIES), _extension.RECORD):
            archive.add(file, file.relative_to(_extension.PACKAGE))
    compile_triton(python)
    with tarfile.open(PACK / "cutlass.tar.xz", "w:xz", preset=3) as archive:
        for name in ("cute", "cutlass"):
            archive.add(toolchain.cutlass() / name, f"include/{name}")
    described = json.loads(process.stdout) | {"machine": platform.machine(), "archs": toolchain.archs()}
    described |= {"sources": sources(), "commit": _commit()}
    (PACK / "manifest.json").write_text(json.dumps(described, indent=1) + "\n")
    for path in sorted(PACK.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def _build_in_place(**environment: str) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"ERCN_BUILD": "cuda"} | environment, check=True)


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
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return process.stdout.strip()


def manifest() -> dict[str, Any]:
    """Manifest of the pack if it is for this kind of machine, else {}."""
    path = PACK / "manifest.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    return held if held.get("machine") == platform.machine() else {}


def refusal() -> str | None:
    """Why the pack is not for this checkout, in a sentence."""
    held = manifest()
    if held and held["sources"] != sources():
        return f"{PACK} was made from other sources (commit {held['commit']}): pack again"
    return None


def unpack() -> str:
    """Put the libraries in their place; return a sentence about it."""
    held = manifest()
    if not held:
        return "there is no build/gpu_pack for this machine; the libraries are those of this checkout"
    with tarfile.open(PACK / "libraries.tar.xz") as archive:
        archive.extractall(_extension.PACKAGE, filter="data")
    unpack_triton()
    return f"unpacked the libraries of commit {held['commit']}, built with torch {held['torch']}"


def load() -> str | None:
    """None where both libraries load in a new process, else its error."""
    process = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, check=False)
    print(process.stdout + process.stderr, flush=True)
    return None if process.returncode == 0 else (process.stderr.strip() or "nothing").splitlines()[-1]


def build() -> None:
    """Compile the libraries here."""
    headers = PACK / "cutlass"
    if (PACK / "cutlass.tar.xz").exists():
        with tarfile.open(PACK / "cutlass.tar.xz") as archive:
            archive.extractall(headers, filter="data")
        os.environ["CUTLASS_PATH"] = str(headers)
    _build_in_place(ERCN_CUDA_ARCHS=ARCH)
