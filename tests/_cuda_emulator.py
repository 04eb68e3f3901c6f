"""Builds the emulator of csrc/cuda/arch, and with it what runs on it, by the C++ compiler alone."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
EMULATOR = TESTS / "cuda_emulator"
DEVICE = TESTS.parent / "csrc" / "cuda"
CXX = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O2", "-g1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DERCN_EMULATED"]


def library(name: str, sources: list[Path], flags: list[str]) -> Path:
    """build/cuda_emulator/NAME-HASH.so of the sources and the emulator, built unless it is there."""
    if shutil.which(CXX.split()[0]) is None:
        pytest.skip(f"the emulator needs a C++ compiler; {CXX!r} was not found")
    command = [*shlex.split(CXX), *FLAGS, *shlex.split(os.environ.get("ERCN_CXXFLAGS", "")), *flags]
    command += ["-I", str(EMULATOR), "-I", str(DEVICE)]
    sources = [EMULATOR / "emulator.cpp", *sources]
    state = hashlib.sha256(repr((command, sources)).encode())
    for path in sorted(p for folder in (EMULATOR, DEVICE) for p in folder.rglob("*") if p.is_file()):
        state.update(path.read_bytes())
    folder = TESTS.parent / "build" / "cuda_emulator"
    built = folder / f"{name}-{state.hexdigest()[:16]}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}.so")
        files = [part for source in sources for part in ("-x", "c++", str(source))]
        result = subprocess.run([*command, "-o", str(unfinished), *files], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        unfinished.rename(built)
    return built


def caller(built: Path) -> Callable[..., str | None]:
    """call(name, *arguments) of a library's function that returns what failed; tensors go as their addresses."""
    loaded = ctypes.CDLL(str(built))

    def call(name: str, *args) -> str | None:
        function = getattr(loaded, name)
        function.restype = ctypes.c_char_p
        message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args))
        return None if message is None else message.decode()

    return call
