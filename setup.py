"""Builds the parts of ercn that need a compiler: ercn._C (CPU) and ercn._cuda; all else is declared in pyproject.toml.

ERCN_BUILD=auto (default) builds each where that is possible and installs without it otherwise, ERCN_BUILD=cpu builds
ercn._C alone and ERCN_BUILD=cuda both, and a failure is an error; ERCN_BUILD=none leaves both out. ERCN_CUDA_ARCHS
chooses the compute capabilities, ERCN_CXXFLAGS is appended to the C++ compiler's flags. ercn/_build.json records what
happened, for ``ercn doctor``.
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

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc/cuda"))
sys.dont_write_bytecode = True  # beside the sources
import toolchain

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    BuildExtension, CppExtension = build_ext, None

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("ERCN_BUILD", "auto")
TARGET_TORCH = (2, 10)  # the oldest torch that the libraries load in
SOURCES = {"ercn._C": ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))], "ercn._cuda": toolchain.sources()}
DEMANDED = {"auto": (), "none": (), "cpu": ("ercn._C",), "cuda": ("ercn._C", "ercn._cuda")}
FAILED = "the compiler failed on"
FLAGS = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", *os.environ.get("ERCN_CXXFLAGS", "").split()]
TARGET_MACRO = ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TARGET_TORCH))


def extension(name: str) -> Extension:
    if CppExtension is None:
        return Extension(name, SOURCES[name])
    try:
        import pybind11

        include_dirs = [pybind11.get_include()]
    except ImportError:  # torch's own include folder has a copy
        include_dirs = []
    macros = [TARGET_MACRO, ("ERCN_FLAGS", ",".join(FLAGS))]
    built = CppExtension(
        name, SOURCES[name], include_dirs=include_dirs, define_macros=macros, extra_compile_args={"cxx": FLAGS}
    )
    built.libraries = ["torch_cpu"]  # the stable ABI lives there; nothing of libc10 or libtorch_python is used
    return built


def obstacle(name: str) -> str | None:
    """Why the extension cannot be built here, in a sentence, or None."""
    if MODE == "none" or (MODE == "cpu" and name == "ercn._cuda"):
        return f"ERCN_BUILD={MODE} left it out"
    if CppExtension is None:
        return "torch could not be imported by the build; install torch first and use pip's --no-build-isolation"
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} was not found (on Debian: apt-get install g++; or set CXX)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"Python.h is not in {headers} (on Debian: apt-get install python3-dev)"
    return toolchain.obstacle() if name == "ercn._cuda" else None


def add_cuda(built: Extension) -> None:
    """Compile the kernels, and give the C++ part of the library what it needs to be linked with them."""
    macros = [("USE_CUDA", "1"), ("ERCN_SM90", str(int(toolchain.HOPPER in toolchain.archs())))]
    built.define_macros += [*macros, ("ERCN_ARCHS", ",".join(toolchain.archs()))]
    built.include_dirs += toolchain.include_dirs()
    folders, built.libraries = toolchain.libraries()
    built.library_dirs += folders
    built.extra_objects += toolchain.objects([TARGET_MACRO, *macros])


class Build(BuildExtension):
    def run(self) -> None:
        package = Path("ercn") if self.inplace else Path(self.build_lib, "ercn")
        for old in [*package.glob("_C.*"), *package.glob("_cuda.*")]:
            old.unlink()
        reasons = {built.name: obstacle(built.name) for built in self.extensions}
        for name in DEMANDED[MODE]:
            if reasons[name] is not None:
                raise SystemExit(f"ERCN_BUILD={MODE}: {reasons[name]}")
        for built in self.extensions:
            if reasons[built.name] is None:
                failed = any((reason or "").startswith(FAILED) for reason in reasons.values())
                reasons[built.name] = f"{FAILED} ercn._C" if failed else self.attempt(built)
            if reasons[built.name] is not None:
                print(f"ercn: installing without {built.name}: {reasons[built.name]}", file=sys.stderr)
        self.extensions = [built for built in self.extensions if reasons[built.name] is None]
        package.mkdir(parents=True, exist_ok=True)
        record = {"reasons": reasons, "mode": MODE, "python": sys.version.split()[0]}
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def attempt(self, built: Extension) -> str | None:
        """Build one extension: None, or the sentence why it is absent. Raises where it was demanded."""
        every, compiler = self.extensions, self.compiler  # run() replaces the compiler's name by an object
        self.extensions = [built]
        try:
            if built.name == "ercn._cuda":
                add_cuda(built)
            super().run()
        except Exception as error:
            if built.name in DEMANDED[MODE]:
                raise
            mode = "cpu" if built.name == "ercn._C" else "cuda"
            return f"{FAILED} it: {error}; ERCN_BUILD={mode} and pip's -v show the compiler's output"
        finally:
            self.extensions, self.compiler = every, compiler
        return None


if MODE not in MODES:
    raise SystemExit(f"ERCN_BUILD must be one of {', '.join(MODES)}; it is {MODE!r}")
try:
    toolchain.archs()
except ValueError as error:
    raise SystemExit(str(error)) from None

setup(ext_modules=[extension(name) for name in SOURCES], cmdclass={"build_ext": Build})
