"""The correctness tests of the Triton kernels in Triton's interpreter, in a process that turns it on at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Together these launch every kernel.
COVERING = ("ops/test_gpu_ops", "ops/test_gpu_exact", "ops/test_gpu_refinement", "triton/test_ops", "triton/test_pool")


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-m", "not gpu"]
    command += [TESTS / "triton/test_launches.py", TESTS / "triton/test_tensor_cores.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--gpu-coverage", *(TESTS / f"{name}.py" for name in COVERING)],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    summary = result.stdout.splitlines()[-1] if result.stdout else ""
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in summary and "skipped" not in summary, summary
