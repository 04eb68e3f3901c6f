"""The affinity and its gradients in plain torch, and features for them."""

from __future__ import annotations

import torch
from _ops import error, generator, randn


def dense(value, feat):
    return value @ torch.relu(feat.mT @ feat)


def dense_propagate(cam, feat, eps=1e-5, steps=1):
    f = feat / (torch.linalg.vector_norm(feat, dim=1, keepdim=True) + eps)
    affinity = torch.relu(f.mT @ f)
    for _ in range(steps):
        cam = cam @ (affinity / (affinity.sum(dim=1, keepdim=True) + eps))
    return cam


def gradients(function, grad, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def with_gradients(function, grad, *inputs):
    """(out, gradients…)"""
    return function(*inputs), *gradients(function, grad, *inputs)


def dense_affinity(value, feat, grad):
    """(out, grad_value, grad_feat) in plain torch."""
    return with_gradients(dense, grad, value, feat)


def least_lucky(value, feat, grad, exact) -> list[torch.Tensor]:
    """``dense_affinity``, each result with its largest error over eight orders of summation. One order may be exact by
    chance, above all where a sum cancels, and the order of a BLAS depends on the processor."""
    results = []
    for i in range(8):
        c, d, n = (torch.randperm(size, generator=generator(i)) for size in (*value.shape[1:2], *feat.shape[1:]))
        out, grad_value, grad_feat = dense_affinity(
            *(x[:, rows][:, :, n] for x, rows in ((value, c), (feat, d), (grad, c)))
        )
        back = n.argsort()
        results.append([x[:, rows.argsort()][:, :, back] for x, rows in ((out, c), (grad_value, c), (grad_feat, d))])
    return [max(each, key=lambda x: error(x, truth, channels=True)) for each, truth in zip(zip(*results), exact)]


def by_formula(grad, value, feat):
    """``dense_affinity`` with one product F·(VᵀG + GᵀV); autograd's sum of two is NaN for Inf - Inf."""
    t = feat.mT @ feat
    w = value.mT @ grad + grad.mT @ value
    return value @ t.relu(), grad @ t.relu(), feat @ w.masked_fill(t <= 0, 0)


def off_kink(batch, dim, n, seed=0):
    """Features with products of about ±1 or more: near 0, rounding would flip the ReLU."""
    sign = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0).double()
    feat = sign * (2 + 0.2 * randn(batch, dim, n, seed=seed).clamp(-3, 3)) / dim**0.5
    assert (feat.mT @ feat).abs().min() > 0.5
    return feat
