"""The ops in plain torch as published code writes them: the baselines of speed and the judges of correctness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ercn.ops.reference import half_disc

BLOCK_ELEMENTS = 1 << 21  # affinities or activations in a block of the blockwise versions


def affinity(cam: Tensor, feat: Tensor) -> Tensor:
    """SEAM's pixel correlation after its normalisation, with its N×N buffers: [B, C, N], [B, D, N] -> [B, C, N]."""
    aff = F.relu(torch.matmul(feat.transpose(1, 2), feat), inplace=True)
    aff = aff / (torch.sum(aff, dim=1, keepdim=True) + 1e-5)
    return torch.matmul(cam, aff)


def propagate(cam: Tensor, feat: Tensor, *, eps: float = 1e-5, steps: int = 1) -> Tensor:
    """Replaces ``affinity_propagate`` in the network: [B, C, H, W], [B, D, H, W] -> [B, C, H, W]."""
    feat = feat.flatten(2)
    feat = feat / (torch.norm(feat, dim=1, keepdim=True) + eps)
    out = cam.flatten(2)
    for _ in range(steps):
        out = affinity(out, feat)
    return out.view_as(cam)


def _affinity_columns(cam: Tensor, feat: Tensor, columns: Tensor) -> Tensor:
    aff = F.relu(torch.matmul(feat.transpose(1, 2), columns))  # [B, N, n]
    return torch.matmul(cam, aff) / (aff.sum(dim=1, keepdim=True) + 1e-5)


def blockwise_affinity(cam: Tensor, feat: Tensor) -> Tensor:
    """``affinity`` a block of columns at a time, each computed again in the backward: memory O(N · block)."""
    size = max(16, BLOCK_ELEMENTS // (feat.shape[0] * feat.shape[2]))
    blocks = feat.split(size, dim=2)
    return torch.cat([checkpoint(_affinity_columns, cam, feat, block, use_reentrant=False) for block in blocks], dim=2)


def _scores(h: Tensor, v: Tensor, bv: Tensor, u: Tensor, bu: Tensor, w: Tensor, bw: Tensor) -> Tensor:
    gated = torch.tanh(F.linear(h, v, bv)) * torch.sigmoid(F.linear(h, u, bu))  # [B, N, L]
    return F.linear(gated, w, bw).transpose(1, 2)  # [B, K, N]


def pool(h: Tensor, v: Tensor, bv: Tensor, u: Tensor, bu: Tensor, w: Tensor, bw: Tensor) -> Tensor:
    """AMLab's gated attention: h [B, N, D] -> pooled [B, K, D]."""
    return torch.matmul(F.softmax(_scores(h, v, bv, u, bu, w, bw), dim=-1), h)


def blockwise_pool(h: Tensor, *weights: Tensor) -> Tensor:
    """``pool`` a block of instances at a time, the activations computed again in the backward."""
    size = max(16, BLOCK_ELEMENTS // weights[0].shape[0])
    blocks = h.split(size, dim=1)
    scores = torch.cat([checkpoint(_scores, block, *weights, use_reentrant=False) for block in blocks], dim=2)
    attention = F.softmax(scores, dim=-1)
    return sum(torch.matmul(a, block) for a, block in zip(attention.split(size, dim=2), blocks))


def gated_attention_pool(h: Tensor, *weights: Tensor, **defaults: object) -> tuple[Tensor, Tensor]:
    """Replaces ``ercn.ops.gated_attention_pool`` in the network: dense maps only."""
    scores = _scores(h, *weights)
    return torch.matmul(F.softmax(scores, dim=-1), h), scores


def _shifts(x: Tensor, dilations: Sequence[int], own: bool = False) -> Tensor:
    """Copies of a map for each neighbour (and for the pixel itself), by one convolution a dilation: [B, C, P, H, W]."""
    (b, c, h, w), places = x.shape, 9
    kernel = torch.eye(places, dtype=x.dtype, device=x.device).view(places, 1, 3, 3)
    kernel = kernel if own else torch.cat([kernel[:4], kernel[5:]])
    flat = x.reshape(b * c, 1, h, w)
    copies = [F.conv2d(F.pad(flat, [d] * 4, mode="replicate"), kernel, dilation=d) for d in dilations]
    return torch.cat(copies, 1).view(b, c, -1, h, w)


def pixel_adaptive_refinement(cam: Tensor, image: Tensor, dilations: Sequence[int], steps: int) -> Tensor:
    """PAMR with the neighbours of all pixels side by side in memory, as its published code has them."""
    image = image.to(cam.dtype)
    difference = (_shifts(image, dilations) - image.unsqueeze(2)).abs()
    sigma = _shifts(image, dilations, own=True).std(2, keepdim=True)
    weights = F.softmax((-difference / (1e-8 + 0.1 * sigma)).mean(1, keepdim=True), 2)
    for _ in range(steps):
        cam = (_shifts(cam, dilations) * weights).sum(2)
    return cam


def random_walk(cam: Tensor, affinity: Tensor, radius: int, beta: float, doublings: int) -> Tensor:
    """The walk of 2 ** doublings steps by squaring the dense matrix T, as PSA and IRN do: affinity [1, P, H, W]."""
    (h, w), number = cam.shape[2:], cam.shape[2] * cam.shape[3]
    index = torch.arange(number, device=cam.device).view(h, w)
    dense = torch.eye(number, dtype=cam.dtype, device=cam.device)
    for (dy, dx), pairs in zip(half_disc(radius), affinity[0]):
        own, other = index[: max(0, h - dy)], index[dy:]
        here = slice(max(0, -dx), max(0, w - max(0, dx)))
        there = slice(max(0, dx), max(0, w - max(0, -dx)))
        i, j, a = own[:, here].flatten(), other[:, there].flatten(), pairs[: own.shape[0], here].flatten()
        dense[i, j] = a
        dense[j, i] = a
    t = dense**beta
    t = t / t.sum(0, keepdim=True)
    for _ in range(doublings):
        t = t @ t
    return (cam.flatten(2) @ t).view_as(cam)
