"""Builds the parts of ercn that need a compiler, ercn/lib/libercn (CPU) and libercn_cuda; pyproject.toml has the rest.

They are plain shared libraries that register operators through the LibTorch stable ABI: they know no Python, so that
one build serves every version of it, and processes without it. ERCN_BUILD=auto (default) builds each where that is
possible and installs without it otherwise, ERCN_BUILD=cpu builds libercn alone and ERCN_BUILD=cuda both, and a failure
is an error; ERCN_BUILD=none leaves both out. ERCN_CUDA_ARCHS chooses the compute capabilities, ERCN_CXXFLAGS is
appended to the C++ compiler's flags. ercn/_build.json records what happened, for ``ercn doctor``.
"""

import json
import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
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
CPU_SOURCES = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/**/*.cpp", recursive=True))
SOURCES = {"libercn": CPU_SOURCES, "libercn_cuda": toolchain.sources()}
DEMANDED = {"auto": (), "none": (), "cpu": ("libercn",), "cuda": ("libercn", "libercn_cuda")}
FAILED = "the compiler failed on"
FLAGS = ["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", *os.environ.get("ERCN_CXXFLAGS", "").split()]
TARGET_MACRO = ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TARGET_TORCH))


def extension(name: str) -> Extension:
    full_name = f"ercn.lib.{name}"
    if CppExtension is None:
        return Extension(full_name, SOURCES[name])
    macros = [TARGET_MACRO, ("ERCN_FLAGS", ",".join(FLAGS))]
    built = CppExtension(full_name, SOURCES[name], define_macros=macros, extra_compile_args={"cxx": FLAGS})
    built.libraries = ["torch_cpu"]  # the stable ABI lives there; nothing of libc10 or libtorch_python is used
    return built


def obstacle(name: str) -> str | None:
    """Why the library cannot be built here, in a sentence, or None."""
    if MODE == "none" or (MODE == "cpu" and name == "libercn_cuda"):
        return f"ERCN_BUILD={MODE} left it out"
    if CppExtension is None:
        return "torch could not be imported by the build; install torch first and use pip's --no-build-isolation"
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} was not found (on Debian: apt-get install g++; or set CXX)"
    return toolchain.obstacle() if name == "libercn_cuda" else None


def add_cuda(built: Extension) -> None:
    """Compile the kernels, and give the C++ part of the library what it needs to be linked with them."""
    macros = [("USE_CUDA", "1"), ("ERCN_SM90", str(int(toolchain.HOPPER in toolchain.archs())))]
    built.define_macros += [*macros, ("ERCN_ARCHS", ",".join(toolchain.archs()))]
    built.include_dirs += toolchain.include_dirs()
    folders, built.libraries = toolchain.libraries()
    built.library_dirs += folders
    built.extra_objects += toolchain.objects([TARGET_MACRO, *macros])


class Build(BuildExtension):
    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + (".dll" if sys.platform == "win32" else ".so")

    def get_libraries(self, ext: Extension) -> list[str]:
        return ext.libraries  # without Python's own

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols  # without a Python module's entry point

    def run(self) -> None:
        package = Path("ercn") if self.inplace else Path(self.build_lib, "ercn")
        for old in [*package.glob("_C.*"), *package.glob("_cuda.*"), *package.glob("lib/*")]:
            old.unlink()
        (package / "lib").mkdir(parents=True, exist_ok=True)
        by_name = {built.name.split(".")[-1]: built for built in self.extensions}
        reasons = {name: obstacle(name) for name in by_name}
        for name in DEMANDED[MODE]:
            if reasons[name] is not None:
                raise SystemExit(f"ERCN_BUILD={MODE}: {reasons[name]}")
        for name, built in by_name.items():
            if reasons[name] is None:
                failed = any((reason or "").startswith(FAILED) for reason in reasons.values())
                reasons[name] = f"{FAILED} libercn" if failed else self.attempt(name, built)
            if reasons[name] is not None:
                print(f"ercn: installing without {name}: {reasons[name]}", file=sys.stderr)
        self.extensions = [built for name, built in by_name.items() if reasons[name] is None]
        record = {"reasons": reasons, "mode": MODE}
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def attempt(self, name: str, built: Extension) -> str | None:
        """Build one library: None, or the sentence why it is absent. Raises where it was demanded."""
        every, compiler = self.extensions, self.compiler  # run() replaces the compiler's name by an object
        self.extensions = [built]
        try:
            if name == "libercn_cuda":
                add_cuda(built)
            super().run()
        except Exception as error:
            if name in DEMANDED[MODE]:
                raise
            mode = "cpu" if name == "libercn" else "cuda"
            return f"{FAILED} it: {error}; ERCN_BUILD={mode} and pip's -v show the compiler's output"
        finally:
            self.extensions, self.compiler = every, compiler
        return None


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the libraries know no Python


if MODE not in MODES:
    raise SystemExit(f"ERCN_BUILD must be one of {', '.join(MODES)}; it is {MODE!r}")
try:
    toolchain.archs()
except ValueError as error:
    raise SystemExit(str(error)) from None

setup(ext_modules=[extension(name) for name in SOURCES], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
