"""--gpu-coverage: a run of the GPU tests fails if a kernel of this GPU was never launched, also with xdist."""

from __future__ import annotations

import contextlib
import os
from collections import Counter

import pytest
import torch


class GpuCoverage:
    def __init__(self):
        self.launches: dict[str, int] = {}
        self.counting = contextlib.ExitStack()
        self.triton_launches: Counter[str] = Counter()
        self.is_worker = self.failed = False

    def pytest_sessionstart(self, session):
        self.is_worker = hasattr(session.config, "workerinput")
        from ercn.ops import triton

        if not _distributes(session.config) and triton.unavailable() is None:
            from ercn import kernels

            self.triton_launches = self.counting.enter_context(kernels.counting_launches())

    def pytest_sessionfinish(self, session):
        if not _distributes(session.config):
            self.counting.close()
            self._add(_launches(self.triton_launches))
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["launches"] = self.launches
        elif self.never() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self):
        """End a worker whose GPU has a sticky error, so that xdist starts another: all later tests would fail in it."""
        if self.is_worker and self.failed and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)
        self.failed = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        self._add(getattr(node, "workeroutput", {}).get("launches", {}))

    def pytest_terminal_summary(self, terminalreporter):
        never = self.never()
        terminalreporter.section("GPU coverage")
        terminalreporter.line(f"{len(self.launches) - len(never)} of {len(self.launches)} kernels were launched")
        for name in never:
            terminalreporter.line(f"never launched: {name}")

    def never(self) -> list[str]:
        return [name for name, count in sorted(self.launches.items()) if count == 0] or (
            [] if self.launches else ["any kernel: no GPU backend can be used"]
        )

    def _add(self, launches: dict[str, int]) -> None:
        for name, count in launches.items():
            self.launches[name] = self.launches.get(name, 0) + count


def _distributes(config) -> bool:
    """Whether this process distributes the tests to xdist's workers."""
    return config.pluginmanager.hasplugin("dsession")


def _launches(triton_launches: Counter[str]) -> dict[str, int]:
    """The launches of every kernel that can run on this machine, in this process."""
    import _cuda_emulator
    from _gpu_backends import BACKENDS, EMULATED

    launches = {}
    if "triton" in BACKENDS:
        from ercn import kernels

        launches |= {f"triton {name}": triton_launches[name] for name in kernels.kernels()}
    if "cuda" in BACKENDS and EMULATED:
        launches |= _cuda_emulator.launches()
    elif "cuda" in BACKENDS:
        from ercn.benchmarks.kernels import attributes

        present = (kernel for kernel in attributes() if "absent" not in kernel or kernel["launches"] > 0)
        launches |= {f"cuda {kernel['name']}": kernel["launches"] for kernel in present}
    return launches
