"""Deliberate faults in the source of the Triton kernels: each must fail the test named beside it, interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytest.importorskip("ercn.kernels", reason="this is a source tree that was not installed")

FORWARD, BACKWARD = "triton/test_ops.py::test_forward_plans", "triton/test_ops.py::test_backward_plans"
CORES = "triton/test_tensor_cores.py"
RAGGED = "ops/test_gpu_ops.py::test_pool_ragged[triton-torch.int32]"
DROPOUT, BY_SCORES = "triton/test_pool.py::test_scores_with_dropout", "triton/test_pool.py::test_pool_by_scores"

# file, text, replacement, the test that finds it
FAULTS = {
    "last pixel left out": (
        "affinity.py", "    mask = (n < size.N)[:, None]\n", "    mask = (n < size.N - 1)[:, None]\n",
        f"{FORWARD}[dense]",
    ),
    "last instance left out": (
        "attention_pool.py", "    real = r < end\n", "    real = r < end - 1\n", RAGGED,
    ),
    "last tile of columns lost": (
        "affinity.py", "range(low, inside, BLOCK_N)", "range(low, inside - BLOCK_N, BLOCK_N)", f"{FORWARD}[dense]",
    ),
    "last tile of the backward lost": (
        "affinity.py", "range(low, high, BLOCK_N)", "range(low, high - BLOCK_N, BLOCK_N)", f"{BACKWARD}[3-resident]",
    ),
    "mirrored sum added twice": (
        "affinity.py", "total += tl.load(mirrored", "total += 2 * tl.load(mirrored", f"{FORWARD}[triangle]",
    ),
    "earlier bands added twice": (
        "affinity.py", "mask=n < N, other=0.0)\n    stride =", "mask=n < N, other=0.0) * 2\n    stride =",
        f"{FORWARD}[triangle bands]",
    ),
    "stale slab combined": (
        "affinity.py", "direct + (p * stride", "direct + ((slabs.count - 1) * stride", f"{FORWARD}[triangle slabs]",
    ),
    "stale slot of a bag combined": (
        "attention_pool.py", "slot = (tile + bag).to(tl.int64)\n", "slot = tl.cast(tile, tl.int64)\n", RAGGED,
    ),
    "weight gradients of earlier rows lost": (
        "attention_pool.py", "ACCUMULATE=first_row > 0", "ACCUMULATE=False",
        "triton/test_ops.py::test_pool_workspace_in_several_pieces",
    ),
    "a word of the generator for its neighbours": (
        "_dropout.py", "tl.where(lower, a, c), tl.where(lower, b, d)", "tl.where(lower, a, d), tl.where(lower, b, c)",
        f"{DROPOUT}[rows]",
    ),
    "dropout forgotten in the backward": ("attention_pool.py", "        slope *= keep\n", "", f"{DROPOUT}[ragged]"),
    "instances numbered within a tile": (
        "attention_pool.py", "dropout_factor(dropout, r, i_l", "dropout_factor(dropout, r % BLOCK_M, i_l",
        f"{DROPOUT}_in_several_pieces",
    ),
    "masked values pooled": (
        "attention_pool.py", "inside = real & (r >= start) & (r < after)", "inside = (r >= start) & (r < after)",
        f"{BY_SCORES}[masked-torch.float32]",
    ),
    "TF32 factors not rounded": (
        "_tiles.py", "x = nearest(x, 13)", "x = x", f"{CORES}::test_affinity_factors_are_rounded[contiguous]",
    ),
    "features read unrounded": (
        "affinity.py", "feat = rounded(feat, precision.dot)", "feat = feat + 0",
        f"{CORES}::test_affinity_factors_are_rounded[contiguous]",
    ),
    "long sum left to the tensor cores": (
        "_tiles.py", "return total + dot_terms(a, b, tl.zeros_like(total), PRECISION)",
        "return dot_terms(a, b, total, PRECISION)", f"{CORES}::test_affinity_of_deep_features",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def exit_codes(tmp_path_factory):
    """pytest's exit codes for each fault, then for a copy without one."""
    sound = ("affinity.py", "import torch\n", "import torch\n", f"{FORWARD}[dense]")
    command = [sys.executable, Path(__file__).with_name("_triton_faults.py"), tmp_path_factory.mktemp("faults")]
    result = subprocess.run(
        command,
        input=json.dumps([*FAULTS.values(), sound]),
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(FAULTS)), ids=FAULTS)
def test_a_fault_is_found(index, exit_codes):
    assert exit_codes[index] == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow
def test_a_sound_copy_passes(exit_codes):
    assert exit_codes[len(FAULTS) :] == [pytest.ExitCode.OK]
