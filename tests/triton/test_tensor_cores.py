"""The kernels on imitated tensor cores: Triton's interpreter truncates here as NVIDIA's do.

A TF32 product reads the upper 19 bits of its factors, and every 16 products are added to a sum that is cut to float32
toward zero. Both leave a bias where rounding would leave noise, so the kernels round factors before a product and add
long sums outside.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from _affinity import dense
from _affinity import gradients as affinity_gradients
from _ops import randn
from _pool import gradients, leaf
from _pool import twin as dense_pool

from ercn.ops import gated_attention_pool, relu_affinity, triton

if not triton.INTERPRETED:
    pytest.skip("only the interpreter imitates them", allow_module_level=True)

from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ercn.kernels import _tiles, configs
from ercn.kernels import affinity as affinity_kernels

ULP = 2.0**-24  # of float32, to nearest
STEP = 16  # products that are summed at once
LONG, COLUMNS, BLOCK = 2048, 1024, 128


def toward_zero(x):
    """float64 x cut to float32."""
    near = x.astype(np.float32)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def product(self, a, b, acc, input_precision, max_num_imprecise_acc):
    a, b = a.data.astype(np.float32), b.data.astype(np.float32)
    if input_precision == INPUT_PRECISION.TF32:
        a, b = ((x.view(np.int32) & -0x2000).view(np.float32) for x in (a, b))
    total = acc.data
    for k in range(0, a.shape[1], STEP):
        part = a[:, k : k + STEP].astype(np.float64) @ b[k : k + STEP].astype(np.float64)
        total = toward_zero(total.astype(np.float64) + part)
    return TensorHandle(total, acc.dtype.scalar)


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", product)


def positive(*shape, seed):
    """float32 in [0.5, 1.5]: no sum of products cancels."""
    return (0.5 + randn(*shape, seed=seed).abs() % 1).float()


def pool_results(function, arguments, grads):
    leaves = [leaf(x) for x in arguments]
    outputs = function(*leaves)
    return *outputs, *gradients(outputs, leaves, grads)


def pool_inputs(n, d, hidden):
    """h, weights without biases and gradients, all positive; tanh and sigmoid off saturation."""
    h, v, u = positive(1, n, d, seed=1), positive(hidden, d, seed=2) / (2 * d), positive(hidden, d, seed=3) / (2 * d)
    arguments = [h, v, None, u, None, positive(1, hidden, seed=4) / hidden, None]
    return arguments, (torch.zeros(1, 1, d), positive(1, 1, n, seed=5))


def assert_long_sum(ours, exact, rest, terms=LONG):
    """Steps inside a tile lose up to 2 ulps each, additions of tiles 1, everything else ``rest``."""
    bound = (2 * BLOCK / STEP + terms / BLOCK + rest) * ULP
    worst = ((ours.double() - exact) / exact).abs().max().item()
    assert worst < bound, f"{worst / ULP:.0f} ulps, {bound / ULP:.0f} allowed"


FORWARD = configs.ForwardConfig(
    num_warps=4, num_stages=1, block_m=BLOCK, block_n=BLOCK, block_d=16, row_tiles=1, resident=True
)


@pytest.mark.parametrize("band", [0, COLUMNS], ids=["dense", "triangle"])
def test_constant_map_over_many_columns(band):
    value, feat = torch.full((1, 1, COLUMNS), 0.7), positive(1, 16, COLUMNS, seed=1) / 4
    ours = affinity_kernels.relu_affinity(value, feat, configs.ForwardPlan(FORWARD, 1, COLUMNS, band))
    assert_long_sum(ours, dense(value.double(), feat.double()), rest=4, terms=COLUMNS)


@pytest.mark.parametrize("chunks", [0, 1], ids=["resident", "streamed"])
def test_affinity_gradients_over_many_columns(chunks):
    value, grad = (positive(1, 1, COLUMNS, seed=seed) for seed in (1, 2))
    feat = positive(1, 16, COLUMNS, seed=3) / 4
    config = configs.BackwardConfig(num_warps=4, num_stages=1, block_m=BLOCK, block_n=BLOCK, block_d=16, chunks=chunks)
    plan = configs.BackwardPlan(config, 1, COLUMNS)
    ours = affinity_kernels.relu_affinity_backward(grad, value, feat, chunks == 0, plan)
    exact = affinity_gradients(dense, *(x.double() for x in (grad, value, feat)))
    assert_long_sum(ours[1], exact[1], rest=8, terms=COLUMNS)
    if chunks == 0:
        assert_long_sum(ours[0], exact[0], rest=4, terms=COLUMNS)


def test_affinity_of_deep_features():
    value, feat = positive(1, 1, 16, seed=1), positive(1, LONG, 16, seed=2) / LONG**0.5
    config = configs.ForwardConfig(16, 16, BLOCK, num_warps=4, num_stages=1, resident=False)
    ours = affinity_kernels.relu_affinity(value, feat, configs.ForwardPlan(config, 1, 16, 0))
    assert_long_sum(ours, dense(value.double(), feat.double()), rest=4)


@pytest.mark.parametrize("sizes", [(LONG, 16, 16), (16, LONG, 16), (16, 16, LONG)], ids=["rows", "features", "units"])
def test_pool_sums(sizes, monkeypatch):
    rows, gemm = configs.PoolConfig(64, BLOCK, BLOCK, 4, 1), configs.GemmConfig(16, 16, BLOCK, 4, 1)
    plan = configs.pool_plan(sizes[1], torch.float32, "interpreter")
    plan = plan._replace(forward=rows, backward=rows, row_grad=gemm, weight_grad=gemm)
    monkeypatch.setattr(configs, "pool_plan", lambda *_: plan)
    arguments, grads = pool_inputs(*sizes)
    ours = pool_results(functools.partial(gated_attention_pool, backend="triton"), arguments, grads)
    exact = pool_results(
        dense_pool, [None if x is None else x.double() for x in arguments], [g.double() for g in grads]
    )
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert_long_sum(mine, truth, rest=24)  # tanh, sigmoid and three products that follow one another


def assert_unbiased(ours, exact):
    """The mean error of thousands of factors rounded to 2⁻¹¹ is far below the bias of truncation."""
    bias = ours.double().sum().item() / exact.sum().item() - 1
    assert abs(bias) < 2.0**-15, f"a bias of {bias:.1e}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
def test_affinity_factors_are_rounded(layout, tf32):
    value, grad, feat = (positive(1, k, 100, seed=k) for k in (1, 2, 40))
    given = {
        "contiguous": feat,
        "channels_last": feat.mT.contiguous().mT,
        "gaps": torch.cat([feat, feat], 2)[..., :100],
    }
    tensors = grad[:, :1], value, given[layout]
    run = functools.partial(relu_affinity, backend="triton")
    exact = affinity_gradients(dense, *(x.double() for x in tensors))
    assert_unbiased(run(*tensors[1:]), dense(*(x.double() for x in tensors[1:])))
    for mine, truth in zip(affinity_gradients(run, *tensors), exact, strict=True):
        assert_unbiased(mine, truth)


def test_float16_weights_of_the_backward_are_rounded():
    value, grad, feat = positive(1, 1, 100, seed=1), positive(1, 1, 100, seed=2), positive(1, 40, 100, seed=3).half()
    ours = affinity_gradients(functools.partial(relu_affinity, backend="triton"), grad / 256, value, feat)
    exact = affinity_gradients(dense, *(x.double() for x in (grad / 256, value, feat)))
    for mine, truth in zip(ours, exact, strict=True):
        assert_unbiased(mine, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pool_factors_are_rounded(dtype, tf32):
    arguments, (grad_pooled, grad_scores) = pool_inputs(150, 40, 60)
    arguments = [None if x is None else x.to(dtype) for x in arguments]
    grads = grad_pooled.to(dtype), grad_scores
    ours = pool_results(functools.partial(gated_attention_pool, backend="triton"), arguments, grads)
    exact = pool_results(
        dense_pool, [None if x is None else x.double() for x in arguments], [g.double() for g in grads]
    )
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert_unbiased(mine, truth)


def test_rounding_to_tf32():
    last = 2.0**-10  # of 1
    pairs = {
        1 + last / 2: 1, 1 + last / 2 + 2.0**-23: 1 + last, 1 + 3 * last / 2: 1 + 2 * last, -1 - last / 2: -1,
        2 - 2.0**-23: 2, 3 * 2.0**-138: 2.0**-136, 0.0: 0.0, 2.0**127: 2.0**127, 3.4028235e38: float("inf"),
        float("inf"): float("inf"), float("-inf"): float("-inf"),
    }  # fmt: skip
    assert torch.equal(_tiles.rounded(torch.tensor(list(pairs)), "tf32"), torch.tensor(list(pairs.values())))
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF], dtype=torch.int32)  # with only bits that truncation cuts
    survivors = _tiles.rounded(nan.view(torch.float32), "tf32").view(torch.int32) & -0x2000
    assert survivors.view(torch.float32).isnan().all()
