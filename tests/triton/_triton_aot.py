"""Compiles what the Triton launchers launch, for a GPU that is absent.

The launchers run on meta tensors; every launch is compiled through Triton's own path (argument specialisation, pass
pipeline, ptxas) for the target given, and its binary is kept instead of run.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ercn.kernels import configs

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Shared memory one block may have, in bytes (CUDA C programming guide, technical specifications per compute
# capability; AMD CDNA2, CDNA3 and CDNA4 instruction set architectures: 64, 64 and 160 KiB of LDS).
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}

# Columns of tensor memory on sm_100; Triton compiles a kernel that takes more to a trap.
TENSOR_MEMORY = 512


def target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@dataclass
class Compiled:
    """One kernel as compiled. sass is its machine code, "" for AMD."""

    name: str
    arch: str
    constants: dict
    kernel: object

    @property
    def shared(self) -> int:
        return self.kernel.metadata.shared

    def _tool(self, tool: str, tmp: Path, *options: str) -> str:
        cubin = tmp / "kernel.cubin"
        cubin.write_bytes(self.kernel.asm["cubin"])
        return subprocess.run([BINARIES / tool, *options, cubin], capture_output=True, text=True, check=True).stdout

    def resources(self, tmp: Path) -> dict[str, int]:
        """REG, STACK, LOCAL and so on, per thread, as recorded in the cubin."""
        text = self._tool("cuobjdump", tmp, "--dump-resource-usage")
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text.splitlines()[-1])}

    def spilled(self, tmp: Path) -> int:
        """Bytes of local memory per thread, which registers should do without; AMD: and vector registers spilled."""
        if self.arch.startswith("gfx"):
            fields = r"\.(?:private_segment_fixed_size|vgpr_spill_count):\s*(\d+)"
            return sum(int(value) for value in re.findall(fields, self.kernel.asm["amdgcn"]))
        resources = self.resources(tmp)
        return resources["STACK"] + resources["LOCAL"]

    def sass(self, tmp: Path) -> str:
        return self._tool("cuobjdump", tmp, "--dump-sass")


class _AbsentDriver:
    """The part of a driver that Triton uses before it compiles."""

    def __init__(self, arch: str):
        self._target = target(arch)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Compiled]]:
    """Within the block launches on meta tensors compile for ``arch``; the list receives them."""
    compiled: list[Compiled] = []
    run, arch_of = JITFunction.run, configs.arch

    def compile_only(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.__name__, arch, kwargs, kernel))
        return kernel

    triton.runtime.driver.set_active(_AbsentDriver(arch))
    JITFunction.run, configs.arch = compile_only, lambda device: arch
    try:
        yield compiled
    finally:
        JITFunction.run, configs.arch = run, arch_of
        triton.runtime.driver.set_active(None)  # the next use looks for a driver


def launches(arch: str, function: Callable[[], object]) -> list[Compiled]:
    with recording(arch) as compiled:
        function()
    return compiled
