"""The affinity in plain torch, and features for its gradients."""

from __future__ import annotations

import torch
from _ops import randn


def dense(value, feat):
    return value @ torch.relu(feat.mT @ feat)


def dense_propagate(cam, feat, eps=1e-5):
    f = feat / (feat.norm(dim=1, keepdim=True) + eps)
    affinity = torch.relu(f.mT @ f)
    return cam @ (affinity / (affinity.sum(dim=1, keepdim=True) + eps))


def gradients(function, grad, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def by_formula(grad, value, feat):
    """(out, grad_value, grad_feat). Autograd's sum of F·VᵀG and F·GᵀV is NaN for Inf - Inf."""
    t = feat.mT @ feat
    w = value.mT @ grad + grad.mT @ value
    return value @ t.relu(), grad @ t.relu(), feat @ w.masked_fill(t <= 0, 0)


def off_kink(batch, dim, n, seed=0):
    """Features whose products stay away from 0, where rounding alone would flip the ReLU: T is about ±1 or more."""
    sign = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0).double()
    feat = sign * (2 + 0.2 * randn(batch, dim, n, seed=seed).clamp(-3, 3)) / dim**0.5
    assert (feat.mT @ feat).abs().min() > 0.5
    return feat
