"""Attention pooling of whole bags as published code writes it, and its inputs; ``_pool`` has every argument."""

from __future__ import annotations

import torch
from _gpu_backends import here
from _ops import assert_within_budget, randn
from torch.nn.functional import linear

from ercn.ops import gated_attention_pool


def inputs(b, n, d, hidden, heads=1, gated=True, bias=True, dtype=torch.float64):
    """h [B, N, D] (b=None: [N, D]) and the weights, scaled so that tanh and sigmoid are off saturation."""
    h = randn(*(() if b is None else (b,)), n, d, seed=1, dtype=dtype)
    v, u = (randn(hidden, d, seed=s, dtype=dtype) / max(d, 1) ** 0.5 for s in (2, 3))
    bv, bu, bw = (randn(k, seed=s, dtype=dtype) if bias else None for s, k in ((4, hidden), (5, hidden), (6, heads)))
    w = randn(heads, hidden, seed=7, dtype=dtype)
    return [h, v, bv, u if gated else None, bu if gated else None, w, bw]


def dense(h, v, bv, u, bu, w, bw, mask=None):
    """What AMLab and CLAM write, for [B, N, D]."""
    gate = torch.tanh(linear(h, v, bv))
    if u is not None:
        gate = gate * torch.sigmoid(linear(h, u, bu))
    scores = linear(gate, w, bw).mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return torch.softmax(scores, -1) @ h, scores


def gradients(outputs, leaves, grads):
    return torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads)


def leaf(x):
    return None if x is None else x.detach().clone().requires_grad_()


def budget(ours, plain, exact, channels=False):
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine.cpu(), torchs.cpu(), truth.cpu(), channels)


def pool_results(function, arguments, cast, mask=None, **kwargs):
    """(pooled, scores, gradients…), scores of masked instances as 0."""
    leaves = [None if x is None else leaf(x.to(cast)) for x in arguments]
    pooled, scores = function(*leaves, mask=mask, **kwargs)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], 0)
    seeds = [here(randn(*t.shape, seed=s)).to(t.dtype) for s, t in ((8, pooled), (9, scores))]
    return pooled, scores, *gradients((pooled, scores), leaves, seeds)


def assert_pool(arguments, mask=None, dtype=None):
    arguments = [here(x) for x in arguments]
    mask, dtype = here(mask), dtype or arguments[0].dtype
    ours = pool_results(gated_attention_pool, arguments, dtype, mask)
    plain = pool_results(dense, arguments, dtype, mask)
    exact = pool_results(dense, arguments, torch.float64, mask)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    budget(ours, plain, exact)
