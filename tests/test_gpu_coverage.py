"""--gpu-coverage in a run of its own: a kernel that no test launches makes it fail and is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_kernels_that_no_worker_launched_are_named():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--gpu-coverage"]
    result = subprocess.run(
        [*command, TESTS / "test_gpu_exact.py", "-k", "test_affinity_of_hopper_with_blocks_of_channels"],
        cwd=TESTS.parent,
        env=os.environ | {"ERCN_CUDA_EMULATED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and "4 passed" in result.stdout, result.stdout[-3000:] + result.stderr[-2000:]
    never = {line.removeprefix("never launched: cuda ercn::") for line in result.stdout.splitlines()}
    forward = "sm90::affinity::Forward<ercn::arch::{}, {}, 24>"
    assert forward.format("bf16", 192) in never and forward.format("bf16", 64) not in never
    assert forward.format("fp16", 64) not in never, "by another worker"
    assert any("pool" in name for name in never)
