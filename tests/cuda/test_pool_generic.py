"""The pool's generic CUDA kernels, on a GPU or emulated: layouts, sizes and precisions that test_gpu_ops.py lacks."""

from __future__ import annotations

import itertools

import pytest
import torch
from _cuda import DEVICE, marks, pool_with
from _ops import assert_within_budget, error, randn
from _pool import gradients, inputs, leaf
from _pool import twin as dense

pytestmark = marks(DEVICE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(function, arguments, dtype, mask=None):
    """Outputs and all gradients of a pool whose operands are cast to dtype."""
    leaves = [None if x is None else leaf(x.to(DEVICE, dtype)) for x in arguments]
    mask = mask if mask is None else mask.to(DEVICE)
    pooled, scores = function(*leaves, mask=mask)
    finite = scores if mask is None else scores.masked_fill(~mask[:, None], 0)
    seeds = [randn(*t.shape, seed=s).to(t.dtype) for s, t in ((8, pooled), (9, scores))]
    outputs = (pooled, finite, *gradients((pooled, finite), leaves, [s.to(DEVICE) for s in seeds]))
    return [x.detach().cpu() for x in outputs]


def check(arguments, dtype, mask=None):
    arguments = [None if x is None else x.to(dtype) for x in arguments]
    ours = results(pool_with("generic"), arguments, dtype, mask)
    plain, exact = (results(dense, arguments, t, mask) for t in (dtype, torch.float64))
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("n", [64, 80, 77], ids=["segments", "vectors", "unaligned"])
def test_channels_first(n, masked, dtype):
    """Reads along instances are of 16 bytes where N allows it, else of one element; the mask fits neither."""
    arguments = inputs(2, n, 40, 24, heads=2)
    arguments[0] = arguments[0].mT.contiguous().to(dtype).mT
    mask = (torch.arange(2 * n).view(2, n) % 3 > 0) if masked else None
    if masked:
        mask[1] = torch.arange(n) < 5
    check(arguments, dtype, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(
    "b, n, d, hidden, heads",
    [(1, 65, 264, 65, 1), (1, 3, 8, 129, 9), (2, 1, 520, 8, 5), (1, 200, 16, 64, 1)],
    ids=["two groups of units", "more heads than a block", "wide", "chunks of segments"],
)  # fmt: skip
def test_sizes(b, n, d, hidden, heads, gated, dtype):
    check(inputs(b, n, d, hidden, heads=heads, gated=gated), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_activations_keep_their_digits(dtype):
    """tanh v ≈ v is small: its error is relative to itself, not to 1."""
    arguments = inputs(1, 20, 16, 8, bias=False)
    arguments[1] = arguments[1] * 1e-4
    check(arguments, dtype)


def test_tf32():
    """Operands rounded to TF32 by 2^-11 at most: products err by 2^-10 of the sum of their magnitudes."""
    arguments = [x.float() for x in inputs(2, 70, 96, 40, heads=2)]
    ours = results(pool_with("generic", exact=False), arguments, torch.float32)
    exact = results(dense, arguments, torch.float64)
    errors = [error(mine, truth) for mine, truth in zip(ours, exact, strict=True)]
    h, v = arguments[0].double(), arguments[1].double()
    magnitude = (h.abs() @ v.abs().mT).max() / (h @ v.mT).abs().max()
    assert max(errors) < 2**-10 * magnitude * arguments[5].abs().sum(1).max() / exact[1].abs().max() * 2
    assert errors[1] > 1e-6, "scores this exact are not TF32's"


def test_ragged_bags_of_every_length_around_a_segment():
    lengths = [0, 1, 63, 64, 65, 0, 127, 130, 2]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    arguments = [None if x is None else x.float() for x in inputs(None, int(bounds[-1]), 24, 12, heads=2)]
    both = []
    for dtype, function in ((torch.float32, pool_with("generic")), (torch.float32, by_bag), (torch.float64, by_bag)):
        leaves = [leaf(x.to(DEVICE, dtype)) for x in arguments]
        outputs = function(*leaves, cu_seqlens=bounds.to(DEVICE))
        seeds = [randn(*x.shape, seed=s).float().to(x) for s, x in enumerate(outputs)]
        both.append([x.detach().cpu() for x in (*outputs, *gradients(outputs, leaves, seeds))])
    for mine, torchs, truth in zip(*both, strict=True):
        assert_within_budget(mine, torchs, truth)


def by_bag(h, *weights, cu_seqlens):
    bags = [dense(h[None, a:b], *weights) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    return torch.cat([pooled for pooled, _ in bags]), torch.cat([scores[0] for _, scores in bags], -1)
