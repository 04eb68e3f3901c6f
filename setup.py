"""Builds ercn._C, the one part of ercn that needs a compiler; everything else is declared in pyproject.toml.

ERCN_BUILD=auto (default) builds it where that is possible and installs without it otherwise, ERCN_BUILD=cpu makes a
failure an error, ERCN_BUILD=none leaves it out; ERCN_CXXFLAGS is appended to the compiler's flags. ercn/_build.json
records what happened, for ``ercn doctor``.
"""

import json
import os
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension, CppExtension = build_ext, None

MODES = ("auto", "cpu", "none")
MODE = os.environ.get("ERCN_BUILD", "auto")
TARGET_TORCH = (2, 10)  # the oldest torch that the library loads in
SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
FLAGS = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", *os.environ.get("ERCN_CXXFLAGS", "").split()]


def extension() -> Extension:
    if CppExtension is None:
        return Extension("ercn._C", SOURCES)
    try:
        import pybind11

        include_dirs = [pybind11.get_include()]
    except ImportError:  # torch's own include folder has a copy
        include_dirs = []
    major, minor = TARGET_TORCH
    macros = [("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"), ("ERCN_FLAGS", ",".join(FLAGS))]
    built = CppExtension(
        "ercn._C", SOURCES, include_dirs=include_dirs, define_macros=macros, extra_compile_args={"cxx": FLAGS}
    )
    built.libraries = ["torch_cpu"]  # the stable ABI lives there; nothing of libc10 or libtorch_python is used
    return built


def obstacle() -> str | None:
    """Why the extension cannot be built here, in a sentence, or None."""
    if MODE == "none":
        return "ERCN_BUILD=none left it out"
    if CppExtension is None:
        return "torch could not be imported by the build; install torch first and use pip's --no-build-isolation"
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} was not found (on Debian: apt-get install g++; or set CXX)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"Python.h is not in {headers} (on Debian: apt-get install python3-dev)"
    return None


class Build(BuildExtension):
    def run(self) -> None:
        package = Path("ercn") if self.inplace else Path(self.build_lib, "ercn")
        for old in package.glob("_C.*"):
            old.unlink()
        reason = obstacle()
        if reason is None:
            try:
                super().run()
            except Exception as error:
                if MODE == "cpu":
                    raise
                reason = f"compiling it failed: {error}; ERCN_BUILD=cpu and pip's -v show the compiler's output"
        elif MODE == "cpu":
            raise SystemExit(f"ERCN_BUILD=cpu: {reason}")
        if reason is not None:
            print(f"ercn: installing without the compiled extension: {reason}", file=sys.stderr)
            self.extensions = []
        package.mkdir(parents=True, exist_ok=True)
        record = {"extension": reason is None, "reason": reason, "mode": MODE, "python": sys.version.split()[0]}
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")


if MODE not in MODES:
    raise SystemExit(f"ERCN_BUILD must be one of {', '.join(MODES)}; it is {MODE!r}")

setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
