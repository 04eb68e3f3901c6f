"""The generic affinity kernels of the CUDA backend: tile arithmetic, and sizes that test_gpu_ops.py leaves out."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from _affinity import dense, gradients, off_kink
from _cuda import DEVICE, marks, operators
from _ops import assert_within_budget, layouts, randn
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = marks(DEVICE)
ROOT = Path(__file__).resolve().parents[2]
LIMITS = [99 << 10, 163 << 10, 227 << 10]  # shared memory of sm_86 and sm_89, sm_80, sm_90


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    built = tmp_path_factory.mktemp("tiles") / "tiles.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover"]
    source = ROOT / "tests" / "cuda" / "_affinity_tiles.cpp"
    subprocess.run([*command, "-I", ROOT / "csrc" / "cuda", source, "-o", built], check=True)
    return ctypes.CDLL(str(built))


def integers(function, count, *arguments):
    out = (ctypes.c_int64 * count)()
    function(*arguments, out)
    return list(out)


def check_splits(tiles, columns, blocks, wanted):
    count, size = integers(tiles.splits_of, 2, *(ctypes.c_int64(x) for x in (columns, blocks, wanted)))
    assert 1 <= count <= columns and size >= 1
    assert (count - 1) * size < columns <= count * size, "a split is empty, or columns are left over"
    assert count == 1 or (count - 1) * blocks < wanted, "more splits than are wanted"
    # As many as are wanted, if the columns divide into them.
    assert count * blocks >= wanted or size == 1 or (columns + size - 2) // (size - 1) > -(-wanted // blocks)


def test_splits_cover_every_column_once(tiles):
    for columns in range(1, 40):
        for blocks in range(1, 12):
            for wanted in range(1, 30):
                check_splits(tiles, columns, blocks, wanted)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, (1 << 31) - 1), st.integers(1, 1 << 33), st.integers(1, 1 << 12))
def test_splits_of_any_size(tiles, columns, blocks, wanted):
    check_splits(tiles, columns, blocks, wanted)


@pytest.mark.parametrize("limit", LIMITS)
def test_shared_memory_stays_within_the_limit(tiles, limit):
    most = tiles.most_slabs(limit)
    assert tiles.backward_memory(most) <= limit < tiles.backward_memory(most + 1)
    for slabs in range(1, 200):
        resident, term_tiles, size = integers(tiles.forward_memory, 3, slabs, limit)
        assert size <= limit
        # While a tile's last slab is multiplied, two more slabs are in flight: their value tiles are apart.
        assert (term_tiles - 1) * slabs >= 2
        assert resident == (slabs * (16 << 10) + 3 * (8 << 10) + term_tiles * (8 << 10) <= limit)


def test_slabs_hold_every_feature(tiles):
    for size, depth in ((2, 64), (4, 32)):
        dims = range(1, 300)
        assert [tiles.slabs_for(ctypes.c_int64(d), size) for d in dims] == [-(-d // depth) for d in dims]


@pytest.fixture(scope="module")
def ops():
    return operators(DEVICE)


def forward(ops, value, feat, exact=False, kernels="generic"):
    return ops.relu_affinity_cuda(value.to(DEVICE), feat.to(DEVICE), exact, kernels).cpu()


def backward(ops, grad, value, feat, exact=False):
    tensors = (x.to(DEVICE) for x in (grad, value, feat))
    return tuple(x.cpu() for x in ops.relu_affinity_backward_cuda(*tensors, True, exact, "generic"))


def check(ops, b, c, d, n, dtype, exact=False):
    value, grad, feat = randn(b, c, n, seed=1), randn(b, c, n, seed=2), off_kink(b, d, n).to(dtype).double()
    ours = forward(ops, value.float(), feat.to(dtype), exact)
    assert_within_budget(ours, dense(value.to(dtype), feat.to(dtype)), dense(value, feat), channels=True)
    ours = backward(ops, grad.float(), value.float(), feat.to(dtype), exact)
    plain, truth = (gradients(dense, *(x.to(cast) for x in (grad, value, feat))) for cast in (dtype, torch.float64))
    for mine, torchs, judge in zip(ours, plain, truth):
        assert_within_budget(mine, torchs, judge, channels=True)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 65, 192, 256, 320])
def test_every_depth_of_half_precision(ops, dim):
    check(ops, 1, 7, dim, 66, torch.bfloat16)
    check(ops, 1, 7, dim, 66, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_every_depth_of_float32(ops, dim):
    check(ops, 1, 7, dim, 66, torch.float32, exact=True)


@pytest.mark.slow
def test_features_that_do_not_fit_come_again(ops):
    check(ops, 1, 3, 768, 70, torch.bfloat16)


@pytest.mark.slow
def test_blocks_of_channels_and_a_batch(ops):
    check(ops, 2, 67, 40, 131, torch.bfloat16)


@pytest.mark.slow
def test_splits_of_many_columns(ops):
    check(ops, 1, 5, 16, 700, torch.float32, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels_last", "strided", "offset", "expanded"])
def test_layouts_give_the_same_bits(ops, layout):
    value, feat, grad = (randn(2, k, 75, seed=k, dtype=torch.bfloat16).to(DEVICE) for k in (3, 70, 4))
    if layout == "expanded":
        value, feat, grad = (x[:1].expand_as(x) for x in (value, feat, grad))
    grad = grad[:, :3]
    near, far = ((value, feat, grad), tuple(layouts(x)[layout] for x in (value, feat, grad)))
    results = []
    for v, f, g in ([x.contiguous() for x in near], far):
        results.append((forward(ops, v, f), *backward(ops, g, v, f)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_is_named_and_cannot_run_says_why(ops):
    x = torch.ones(1, 2, 9)
    with pytest.raises(RuntimeError, match="the sm90 kernels cannot run relu_affinity: they "):
        forward(ops, x, x, kernels="sm90")
    with pytest.raises(RuntimeError, match="kernels are generic, sm90 and sm90_dense; got fast"):
        forward(ops, x, x, kernels="fast")
    most = 384 if DEVICE == "cpu" else r"\d+"
    with pytest.raises(RuntimeError, match=f"at most {most} features of this dtype on this device"):
        backward(ops, x, x, torch.ones(1, 400, 9))
