"""Tensor cores cut 13 bits off fp32 words for TF32: the CUDA backend rounds its factors to nearest before.

All numbers are positive, and factors lie 7/8 of a TF32 unit above a TF32 number. Rounded, they rise by an eighth; a
product of cut words is at least 2^-11 too small on average over a tensor, where 2^-14 is allowed.
"""

from __future__ import annotations

import pytest
import torch
from _cuda import DEVICE, marks, operators, pool_with

pytestmark = marks(DEVICE)
ALLOWED = 2.0**-14


def above(*shape, seed):
    return (torch.randint(1024, 2048, shape, generator=torch.Generator().manual_seed(seed)) + 0.875) / 1024


def rounded(x):
    """To TF32, nearest and ties away from zero, as float64."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def bias(ours, exact):
    return ((ours.double().cpu() - exact) / exact).mean().abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_affinity(dtype):
    ops = operators(DEVICE)
    feat, value, grad = above(1, 64, 70, seed=1).to(dtype), above(1, 5, 70, seed=2), above(1, 5, 70, seed=3)
    tensors = [x.to(DEVICE) for x in (grad, value, feat)]
    f, v, g = (rounded(x) for x in (feat, value, grad))
    a = f.mT @ f
    assert bias(ops.relu_affinity_cuda(*tensors[1:], False, "generic"), value.double() @ a) <= ALLOWED
    grad_value, grad_feat = ops.relu_affinity_backward_cuda(*tensors, True, False, "generic")
    assert bias(grad_value, g @ a) <= ALLOWED
    assert bias(grad_feat, f @ (v.mT @ g + g.mT @ v)) <= ALLOWED


@pytest.mark.parametrize("channels_first", [False, True], ids=["rows", "channels"])
def test_pool(channels_first):
    """Hidden units stay where tanh is all but linear, so that it passes on what their sums lost."""
    h, weight, head = above(1, 80, 32, seed=1), above(16, 32, seed=2) / 4096, above(1, 16, seed=3)
    inputs = h.mT.contiguous().mT if channels_first else h, weight, None, None, None, head, None
    leaves = [None if x is None else x.to(DEVICE).requires_grad_() for x in inputs]
    _, scores = pool_with("generic", exact=False)(*leaves)
    grads = torch.autograd.grad(scores.sum(), (leaves[0], leaves[1]))
    h, weight = rounded(h), rounded(weight)
    t = torch.tanh(h[0] @ weight.mT)
    branch = rounded(head[0] * (1 - t * t))  # of the gradients of both
    assert bias(scores.detach()[0, 0], t @ head[0].double()) <= ALLOWED
    assert bias(grads[0], branch @ weight) <= ALLOWED and bias(grads[1], branch.mT @ h[0]) <= ALLOWED
