"""The operators' correctness matrix on the emulated CUDA kernels, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "ops"
EXACT = TESTS / "test_gpu_exact.py"


def summary_of(kernels: str, *chosen: str | Path) -> str:
    """pytest's last line for the chosen tests, all of which must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--durations=5"]
    environment = os.environ | {"ERCN_CUDA_EMULATED": "1", "OMP_NUM_THREADS": "1", "ERCN_CUDA_KERNELS": kernels}
    result = subprocess.run(
        [*command, *chosen],
        cwd=TESTS.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    summary = result.stdout.splitlines()[-1] if result.stdout else ""
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in summary, summary
    return summary


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["", "generic"], ids=["best", "generic"])
def test_operators_emulated(kernels):
    files = [TESTS / "test_gpu_ops.py"]
    chosen = ["-k", "within_budget or half_precision_maps", *files] if kernels else ["--gpu-coverage", EXACT, *files]
    summary = summary_of(kernels, *chosen)
    assert "skipped" not in summary, summary


@pytest.mark.slow
def test_later_arguments_of_the_pool_emulated():
    """Dispatch and launchers; cuda/test_pool_arguments.py tests the kernels. float64 is skipped."""
    words = "alone or by_scores or layout or activations or relu or checkpoint or opcheck"
    summary_of("", "-k", words, TESTS / "test_pool_arguments.py")
