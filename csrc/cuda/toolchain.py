"""Compiles csrc/cuda for setup.py: finds the CUDA toolkit and CUTLASS's headers, writes a ninja file for nvcc.

torch's CUDAExtension guesses the toolkit from nvcc's folder, which is wrong for a wrapper, and compiles every file for
the same architectures. Here nvcc itself names its toolkit, and files below sm90/ are compiled for Hopper only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

HERE = Path("csrc/cuda")
BUILD = Path("build/cuda")
DEFAULT_ARCHS = "8.0;9.0a"
HOPPER = "9.0a"
WARNINGS = ["-Xcompiler=-Wall", "-Xcudafe=--diag_suppress=177"]  # of unused variables in CUTLASS


def archs() -> list[str]:
    """ERCN_CUDA_ARCHS as a list; ValueError unless it lists compute capabilities from 8.0 on."""
    given = os.environ.get("ERCN_CUDA_ARCHS") or DEFAULT_ARCHS
    names = [name.strip() for name in re.split(r"[;, ]+", given) if name.strip()]
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?", name) or float(name.rstrip("af")) < 8:
            raise ValueError(
                f"ERCN_CUDA_ARCHS must be compute capabilities from 8.0 on, such as {DEFAULT_ARCHS!r}; it is {given!r}"
            )
    return names


def obstacle() -> str | None:
    """Why the CUDA kernels cannot be compiled here, in a sentence, or None."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA; install one with CUDA and build again"
    if sys.platform != "linux":
        return f"the CUDA kernels are built on Linux only; this is {sys.platform}"
    if shutil.which("nvcc") is None:
        return "no CUDA toolkit: nvcc was not found on PATH"
    try:
        version, root = toolkit()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"nvcc does not answer: {error}"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version}, torch of CUDA {torch.version.cuda}; their major versions must be equal"
    for file in ("include/cuda_runtime.h", "include/cuda.h", "lib*/libcudart.so"):
        if not list(root.glob(file)):
            return f"the CUDA toolkit at {root} is incomplete: it has no {file}"
    if cutlass() is None:
        return "CUTLASS's headers were not found (pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH)"
    if shutil.which("ninja") is None and find_spec("ninja") is None:
        return "ninja was not found (pip install ninja)"
    return None


def toolkit() -> tuple[str, Path]:
    """nvcc's version and its toolkit's folder, from its own output: nvcc on PATH may be a wrapper."""
    version_output, plan = (
        subprocess.run(["nvcc", *options], capture_output=True, text=True, check=True)
        for options in (["--version"], ["--dryrun", "-c", "-x", "cu", os.devnull])
    )
    version = re.search(r"release (\d+\.\d+)", version_output.stdout)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    if version is None or top is None:
        raise ValueError("neither its version nor its folder could be read from --version and --dryrun")
    return version[1], Path(top[1].strip()).resolve()


def cutlass() -> Path | None:
    """CUTLASS's include folder: below CUTLASS_PATH, or in the nvidia-cutlass package."""
    folders = [Path(os.environ["CUTLASS_PATH"])] if os.environ.get("CUTLASS_PATH") else []
    package = find_spec("cutlass_library")
    folders += [Path(folder, "source") for folder in package.submodule_search_locations or ()] if package else []
    return next((folder / "include" for folder in folders if (folder / "include/cute/tensor.hpp").exists()), None)


def include_dirs() -> list[str]:
    """Absolute include folders of the C++ compiler besides torch's."""
    return [str(HERE.resolve()), str(toolkit()[1] / "include"), str(cutlass())]


def libraries() -> tuple[list[str], list[str]]:
    """Folders and names of the libraries to link. torch_cuda is linked so that the process loads it."""
    root = toolkit()[1]
    folders = [str(next(root.glob("lib*/libcudart.so")).parent)]
    return folders, ["torch_cpu", "torch_cuda", "cudart"]


def sources() -> list[str]:
    """Files for the C++ compiler: registration, checks, dispatch."""
    return sorted(glob("csrc/cuda/**/*.cpp", recursive=True))


def objects(macros: list[tuple[str, str]]) -> list[str]:
    """Compile the .cu files that changed and return all object files."""
    files = sorted(glob("csrc/cuda/**/*.cu", recursive=True))
    if HOPPER not in archs():
        files = [file for file in files if "/sm90/" not in file]
    BUILD.mkdir(parents=True, exist_ok=True)
    lines, outputs = _rules(macros), []
    for file in files:
        output = str(BUILD / Path(file).relative_to(HERE).with_suffix(".o"))
        flags = "hopper" if "/sm90/" in file else "generic"
        lines += [f"build {output}: nvcc {file}", f"  archs = ${flags}"]
        outputs.append(output)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    if outputs:
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*ninja, "-f", str(BUILD / "build.ninja"), *jobs], check=True)
    return outputs


def _rules(macros: list[tuple[str, str]]) -> list[str]:
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += [*WARNINGS, *(f"-D{name}={value}" for name, value in macros)]
    flags += [f"-I{HERE}", *(f"-isystem={path}" for path in (cutlass(), *include_paths()))]
    generic = [_binary(name) for name in archs()]
    newest = max((name.rstrip("af") for name in archs()), key=float)
    generic.append(f"-gencode=arch=compute_{_digits(newest)},code=compute_{_digits(newest)}")  # for newer chips
    return [
        f"builddir = {BUILD}",
        f"flags = {' '.join(flags)}",
        f"generic = {' '.join(generic)}",
        f"hopper = {_binary(HOPPER)}",
        "rule nvcc",
        "  command = nvcc $flags $archs -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
    ]


def _digits(name: str) -> str:
    return name.replace(".", "")


def _binary(name: str) -> str:
    return f"-gencode=arch=compute_{_digits(name)},code=sm_{_digits(name)}"
