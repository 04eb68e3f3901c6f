"""Builds the emulator of csrc/cuda/arch and the kernels on it, by the C++ compiler."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
EMULATOR = TESTS / "emulator"
DEVICE = TESTS.parents[1] / "csrc" / "cuda"
BUILD = TESTS.parents[1] / "build" / "cuda_emulator"
CXX = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-DERCN_EMULATED"]


def object_name(source: Path) -> str:
    return "-".join(source.with_suffix(".o").parts[-3:])


def library(name: str, sources: list[Path], flags: tuple[str, ...] = (), links: tuple[str, ...] = ()) -> Path:
    """build/cuda_emulator/NAME.so of the sources and the emulator; only files that changed are compiled."""
    if shutil.which(CXX.split()[0]) is None:
        pytest.skip(f"the emulator needs a C++ compiler; {CXX!r} was not found")
    extra = shlex.split(os.environ.get("ERCN_CXXFLAGS", ""))
    compiler = shlex.join([*shlex.split(CXX), *FLAGS, *extra, *flags, f"-I{EMULATOR}", f"-I{DEVICE}"])
    linker = shlex.join([*shlex.split(CXX), "-shared", *extra])
    folder = BUILD / "-".join([name, *(flag.strip("-").replace("=", "_") for flag in extra)])
    sources = [EMULATOR / "emulator.cpp", *sources]
    objects = {folder / object_name(source): source for source in sources}
    built = folder / f"{name}.so"
    rules = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} -o $out $in {shlex.join(links)}",
        *(f"build {to}: compile {source}" for to, source in objects.items()),
        f"build {built}: link {' '.join(map(str, objects))}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be building it
        (folder / "build.ninja").write_text("\n".join(rules) + "\n")
        ninja = [shutil.which("ninja")] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
        command = [*ninja, "-f", folder / "build.ninja"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    errors = [line for line in result.stdout.splitlines() if "error" in line or "undefined" in line]
    assert result.returncode == 0, "\n".join(errors) or result.stdout[-4000:] + result.stderr
    return built


def operators_with(name: str, sources: list[Path], flags: tuple[str, ...] = (), links: tuple[str, ...] = ()) -> Path:
    """A library of sources that need torch's headers, and the emulator."""
    root = Path(torch.__file__).parent
    flags += (f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}")
    flags += ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DERCN_SM90=1")
    links += (f"-L{root / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}")
    return library(name, sources, flags, links)


def operator_sources() -> list[Path]:
    without = ("info.cpp", "stream.cpp")  # of the runtime and of the driver
    sources = [*sorted(DEVICE.rglob("*.cu")), *(p for p in sorted(DEVICE.rglob("*.cpp")) if p.name not in without)]
    return [*sources, EMULATOR / "operators.cpp"]


def operators() -> Path:
    """csrc/cuda as torch.ops.ercn_emulated.*, for tensors on the CPU."""
    return operators_with("operators", operator_sources())


@functools.cache
def load_operators() -> None:
    torch.ops.load_library(operators())


def launches() -> dict[str, int]:
    """Launches of every emulated kernel in this process."""
    report = ctypes.CDLL(str(operators())).ercn_launches
    report.restype = ctypes.c_char_p
    lines = (line.rpartition(" ") for line in report().decode().splitlines())
    return {f"cuda {name}": int(count) for name, _, count in lines}


def caller(built: Path) -> Callable[..., str | None]:
    """call(name, *arguments) of a library's functions, which return what failed or None; tensors go as addresses."""
    loaded = ctypes.CDLL(str(built))

    def call(name: str, *args) -> str | None:
        function = getattr(loaded, name)
        function.restype = ctypes.c_char_p
        message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args))
        return None if message is None else message.decode()

    return call


def become_backend() -> None:
    """Makes this process's backend ``cuda`` take CPU tensors and run emulated."""
    from ercn.ops import _backends, cuda

    load_operators()
    cuda.NAMESPACE, cuda.unavailable, cuda._shared_bytes = "ercn_emulated", lambda: None, lambda device: 227 << 10
    rows = (dataclasses.replace(row, device="cpu") if row.name == "cuda" else row for row in _backends.TABLE)
    _backends.TABLE = tuple(rows)
