"""Plain-torch versions of both ops, as people write them: the baselines, and the judges of correctness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ELEMENTS = 1 << 21  # affinities or activations in a block of the blockwise versions


def affinity(cam: Tensor, feat: Tensor) -> Tensor:
    """SEAM's pixel correlation after its normalisation, with its N×N buffers: [B, C, N], [B, D, N] -> [B, C, N]."""
    aff = F.relu(torch.matmul(feat.transpose(1, 2), feat), inplace=True)
    aff = aff / (torch.sum(aff, dim=1, keepdim=True) + 1e-5)
    return torch.matmul(cam, aff)


def propagate(cam: Tensor, feat: Tensor, *, eps: float = 1e-5, steps: int = 1) -> Tensor:
    """In the place of ``affinity_propagate`` in the network: [B, C, H, W], [B, D, H, W] -> [B, C, H, W]."""
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
    """In the place of ``ercn.ops.gated_attention_pool`` in the network, which pools dense maps and asks for no more."""
    scores = _scores(h, *weights)
    return torch.matmul(F.softmax(scores, dim=-1), h), scores
