"""--gpu-coverage in a separate run: it fails if no test launches a kernel, and names the kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import _coverage
import _gpu_backends
import pytest
import torch

from ercn.ops import _extension

TESTS = Path(__file__).parent


def gpu_coverage(*arguments, **environment):
    """A run with two workers: (exit code, output)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--gpu-coverage", *arguments]
    result = subprocess.run(
        command,
        cwd=TESTS.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr[-2000:]


@pytest.mark.slow
def test_kernels_that_no_worker_launched_are_named():
    hopper = "test_affinity_of_hopper_with_blocks_of_channels"
    code, text = gpu_coverage(TESTS / "test_gpu_exact.py", "-k", hopper, ERCN_CUDA_EMULATED="1")
    assert code == 1 and "4 passed" in text, text[-5000:]
    never = {line.removeprefix("never launched: cuda ercn::") for line in text.splitlines()}
    forward = "sm90::affinity::Forward<ercn::arch::{}, {}, 24>"
    assert forward.format("bf16", 192) in never and forward.format("bf16", 64) not in never
    assert forward.format("fp16", 64) not in never, "by another worker"
    assert any("pool" in name for name in never)


@pytest.mark.slow
def test_workers_that_are_out_of_time_tell_their_launches():
    pytest.importorskip("triton")
    pytest.importorskip("xdist")
    code, text = gpu_coverage(TESTS / "test_gpu_exact.py", "--until", "0", "-k", "test_affinity", TRITON_INTERPRET="1")
    assert code == pytest.ExitCode.INTERRUPTED and "out of time" in text, text[-5000:]
    assert re.search(r"\n[12] passed", text) and re.search(r"\n[1-9]\d* of \d+ kernels were launched", text), text[
        -5000:
    ]


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_a_worker_whose_gpu_keeps_an_error_ends(monkeypatch, outcome, broken):
    def synchronize():
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    exits = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", exits.append)
    plugin = _coverage.GpuCoverage()
    plugin.is_worker = True
    for result in ("passed", outcome, "passed"):  # of setup, call and teardown
        plugin.pytest_runtest_logreport(SimpleNamespace(failed=result == "failed"))
    plugin.pytest_runtest_logfinish()
    assert exits == ([1] if broken and outcome == "failed" else [])
    plugin.pytest_runtest_logfinish()
    assert len(exits) <= 1


def test_launches_are_known_where_the_gpu_keeps_an_error(monkeypatch):
    def told(attributes=False):
        if attributes:
            raise RuntimeError("an illegal memory access was encountered")
        return [{"name": "Forward", "launches": 2}, {"name": "Backward", "launches": 0}]

    monkeypatch.setattr(_extension, "cuda_kernels", told)
    monkeypatch.setattr(_gpu_backends, "BACKENDS", ["cuda"])
    monkeypatch.setattr(_gpu_backends, "EMULATED", False)
    assert _coverage._launches(Counter()) == {"cuda Forward": 2}
