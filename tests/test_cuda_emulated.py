"""The correctness matrix of the operators on the CUDA kernels, emulated on the CPU in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXACT = TESTS / "test_gpu_exact.py"


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["", "generic"], ids=["best", "generic"])
def test_operators_emulated(kernels):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--durations=5"]
    files = [TESTS / "test_gpu_ops.py"]
    chosen = ["-k", "within_budget or half_precision_maps", *files] if kernels else ["--gpu-coverage", EXACT, *files]
    environment = os.environ | {"ERCN_CUDA_EMULATED": "1", "OMP_NUM_THREADS": "1", "ERCN_CUDA_KERNELS": kernels}
    result = subprocess.run(
        [*command, *chosen],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    summary = result.stdout.splitlines()[-1] if result.stdout else ""
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in summary and "skipped" not in summary, summary
