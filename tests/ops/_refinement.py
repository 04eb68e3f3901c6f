"""The refinements in plain torch: neighbours are gathered by index, weights follow the formulas."""

from __future__ import annotations

import torch
from _ops import randn


def ring(dilations):
    return [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def places(offsets, h, w):
    """The index of the pixel at each offset from each pixel, with the edge repeated: [P, N]."""
    y, x = torch.arange(h), torch.arange(w)
    rows = [((y + dy).clamp(0, h - 1)[:, None] * w + (x + dx).clamp(0, w - 1)).flatten() for dy, dx in offsets]
    return torch.stack(rows)


def adaptive_weights(image, dilations, form):
    """[B, P, N]."""
    at = places(ring(dilations), *image.shape[2:]).to(image.device)
    flat = image.flatten(2)
    around = flat[:, :, at]  # [B, K, P, N]
    if form == "pamr":
        own = flat.unsqueeze(2).expand(-1, -1, len(dilations), -1)
        sigma = torch.cat([around, own], 2).std(2, keepdim=True)
        exponent = -(around - flat.unsqueeze(2)).abs() / (1e-8 + 0.1 * sigma)
        return exponent.mean(1).softmax(1)
    exponent = -((around - flat.unsqueeze(2)).abs() / (around.std(2, keepdim=True) + 1e-8) / 0.3) ** 2
    r = torch.tensor([(dy * dy + dx * dx) ** 0.5 for dy, dx in ring(dilations)], dtype=torch.float64)
    position = (-((r / (r.std() + 1e-8) / 0.3) ** 2)).softmax(0).to(image)
    return exponent.mean(1).softmax(1) + 0.01 * position[:, None]


def refined(cam, image, dilations, steps, form="pamr"):
    """Differentiable; a pixel that is not finite only affects the pixels that have it as a neighbour."""
    at = places(ring(dilations), *image.shape[2:]).to(image.device)
    weights, m = adaptive_weights(image, dilations, form).unsqueeze(1), cam.flatten(2)
    for _ in range(steps):
        m = (weights * m[:, :, at]).sum(2)
    return m.view_as(cam)


def half_disc(radius):
    """(dy, dx) of the neighbours to the right and below, in the order of an affinity."""
    square = [(dy, dx) for dy in range(radius) for dx in range(1 - radius, radius) if dy or dx > 0]
    return [(dy, dx) for dy, dx in square if dy * dy + dx * dx < radius * radius]


def transition(affinity, radius, beta):
    """T of the random walk as a dense matrix [B, N, N], as in the published code."""
    batch, _, h, w = affinity.shape
    matrix = torch.eye(h * w).to(affinity).repeat(batch, 1, 1)
    number = torch.arange(h * w).view(h, w)
    for p, (dy, dx) in enumerate(half_disc(radius)):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        there = (y + dy < h) & (x + dx >= 0) & (x + dx < w)
        i, j = number[there], (number + dy * w + dx)[there]
        matrix[:, i, j] = matrix[:, j, i] = affinity[:, p][:, there]
    powers = matrix**beta
    return powers / powers.sum(1, keepdim=True)


def walked(value, affinity, radius, beta, steps):
    t = transition(affinity, radius, beta)
    flat = value.flatten(2)
    for _ in range(steps):
        flat = flat @ t
    return flat.view_as(value)


def drawn(b, c, k, h, w, dtype=torch.float64):
    """Map, picture and upstream gradient, exact in the dtype."""
    return tuple(randn(b, n, h, w, seed=seed).to(dtype).double() for seed, n in ((1, c), (2, k), (3, c)))


def with_gradient(function, cam, grad):
    leaf = cam.detach().clone().requires_grad_()
    out = function(leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, grad)


def drawn_walk(b, c, h, w, radius, dtype=torch.float64):
    """Maps, affinities and upstream gradient, exact in the dtype."""
    value, grad = (randn(b, c, h, w, seed=seed).to(dtype).double() for seed in (1, 2))
    generator = torch.Generator().manual_seed(3)
    affinity = torch.rand(b, len(half_disc(radius)), h, w, generator=generator, dtype=torch.float64)
    return value, affinity.to(dtype).double(), grad
