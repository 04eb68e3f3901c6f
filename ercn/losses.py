"""The terms of L = cls·L_cls + er·L_ER + ecr·L_ECR + consistency·H + min_pool·L_min, each a pure function.

Shapes: B pictures, F foreground classes, C = 1 + F channels with the background first, h × w elements of the map.
Half-precision maps are taken to float32 first, so the terms are the same under autocast; float64 stays float64.
Every term is deterministic, free of division by zero on flat maps, and a scalar.

Sources: SEAM (Wang et al., CVPR 2020, arXiv 2004.04581) and Chikontwe et al. (Med Image Anal 2022; 80:102482).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # SEAM's; below float16's normal range, so half precision is taken to float32 first


def full(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def max_norm(cam: Tensor, eps: float = EPS) -> Tensor:
    """Activation maps scaled to [0, 1], each channel by its own range over space (SEAM, between views).

    With p = relu(cam): relu(p - min p - eps) / (max p - min p + eps). A flat map gives 0. Differentiable.

    Args:
        cam: [B, C, h, w].

    Returns:
        [B, C, h, w].
    """
    p = full(cam).relu()
    low, high = p.amin((2, 3), keepdim=True), p.amax((2, 3), keepdim=True)
    return (p - low - eps).relu() / (high - low + eps)


def add_background(foreground: Tensor) -> Tensor:
    """Put the background channel 1 - max_k foreground_k before maps in [0, 1]: [B, F, h, w] -> [B, 1 + F, h, w]."""
    return torch.cat([1 - foreground.amax(1, keepdim=True), foreground], 1)


def _keep_largest_class(c: Tensor) -> Tensor:
    """Zero every foreground value below its element's foreground maximum; the background stays."""
    foreground = c[:, 1:]
    kept = torch.where(foreground < foreground.amax(1, keepdim=True), torch.zeros_like(foreground), foreground)
    return torch.cat([c[:, :1], kept], 1)


def normalize_cam(cam: Tensor, eps: float = EPS) -> Tensor:
    """Foreground activation maps as the class confidences that the pixel affinity propagates (SEAM, before the PCM).

    c_k = relu(relu(cam_k) - eps) / (max_hw relu(cam_k) + eps), background c_0 = 1 - max_k c_k, and at every element
    only the largest foreground channel is kept, the others become 0 (of equal maxima all are kept). A map without
    positive values gives c_k = 0, c_0 = 1.

    Args:
        cam: [B, F, h, w] class activation maps of the foreground, before ReLU.

    Returns:
        [B, 1 + F, h, w] in [0, 1]. Differentiable; SEAM itself stops the gradient here.
    """
    p = full(cam).relu()
    return _keep_largest_class(add_background((p - eps).relu() / (p.amax((2, 3), keepdim=True) + eps)))


def classification_loss(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> Tensor:
    """Multi-label soft margin: the mean over pictures and foreground classes of the binary cross entropy.

    Args:
        logits: [B, F]. target: [B, F] in [0, 1].
        weight: multiplies each entry's loss, broadcast to [B, F]: [F] by class, [B, 1] by picture. The mean still
            divides by B·F, so weights should average 1.
        pos_weight: [F], multiplies the positive part of each class.

    Source: SEAM's L_cls (``multilabel_soft_margin_loss`` on the spatial mean of the CAM).
    """
    logits = full(logits)  # torch would return the target's dtype
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight, pos_weight=pos_weight)


def equivariance_loss(cam1: Tensor, cam2: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """L_ER = mean | A(cam of x) - cam of A(x) | over foreground channels and elements (SEAM).

    With a CAM and its refinement as the two maps it is the one-view equivariance of Chikontwe et al.

    Args:
        cam1, cam2: [B, F, h, w], both in the frame of view 2, after ``max_norm`` and multiplied by the picture's label.
        valid: bool, broadcast to [B, 1, h, w]; only these elements count. None counts all.
    """
    difference = (full(cam1) - full(cam2)).abs()
    if valid is None:
        return difference.mean()
    valid = valid.expand_as(difference)
    return difference.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def _hardest_mean(x: Tensor, fraction: float, valid: Tensor | None) -> Tensor:
    """Mean over pictures of the mean of the largest ``fraction`` of a picture's C·h·w values."""
    values = x.flatten(1)
    k = max(1, int(values.shape[1] * fraction))
    if valid is None:
        return values.topk(k, sorted=False).values.mean()
    valid = valid.expand_as(x).flatten(1)
    hardest = values.masked_fill(~valid, -1).topk(k).values  # [B, k], falling; -1 is below every |difference|
    share = (valid.sum(1, keepdim=True) * fraction).floor().clamp(min=1)  # number of hardest values of each picture
    keep = (torch.arange(k, device=x.device) < share) & (hardest >= 0)
    return ((hardest * keep).sum(1) / keep.sum(1).clamp(min=1)).mean()


def equivariant_cross_loss(
    cam1: Tensor,
    refined1: Tensor,
    cam2: Tensor,
    refined2: Tensor,
    *,
    fraction: float = 0.2,
    valid: Tensor | None = None,
) -> Tensor:
    """L_ECR: each view's refined map against the other view's CAM, on the hardest values (SEAM).

    D1 = |K(cam2) - refined1| and D2 = |K(cam1) - refined2|, where the CAM gets its background channel 1 - max
    foreground, K keeps only the largest foreground value of every element, and the CAM carries no gradient. From each
    picture's C·h·w values the largest ``fraction`` are averaged; the result is the sum of both directions.

    Args:
        cam1, cam2: [B, F, h, w] foreground, as in ``equivariance_loss``.
        refined1, refined2: [B, 1 + F, h, w], background first, after ``max_norm`` and multiplied by the picture's label
            (background label 1).
        fraction: share of the values that counts, in (0, 1]; at least one value counts.
        valid: bool, broadcast to [B, 1, h, w]; only these elements count, and the share is of their number.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], the share of values to average, but is {fraction}")

    def direction(cam: Tensor, refined: Tensor) -> Tensor:
        reference = _keep_largest_class(add_background(full(cam.detach())))
        return _hardest_mean((reference - full(refined)).abs(), fraction, valid)

    return direction(cam2, refined1) + direction(cam1, refined2)


def refinement_consistency(cam: Tensor, refined: Tensor, mask: Tensor, *, eps: float = 1e-10) -> Tensor:
    """H, the cross entropy of the CAM with its refinement, weighted by the spatial mask (Chikontwe et al.).

    H = mean_b [ - Σ_{c,p} m_p · refined_{c,p} · log(cam_{c,p} + eps) / Σ_p m_p ], 0 for a picture whose mask is 0.

    Args:
        cam, refined: [B, 1 + F, h, w] in [0, 1], background first, after ``max_norm`` and multiplied by the picture's
            label.
        mask: [B, 1, h, w] in [0, 1].
    """
    cam, refined, mask = full(cam), full(refined), full(mask)
    entropy = -(mask * refined * (cam + eps).log()).sum((1, 2, 3))
    weight = mask.sum((1, 2, 3))
    return (entropy / torch.where(weight > 0, weight, torch.ones_like(weight))).mean()


def min_pooling_loss(refined: Tensor) -> Tensor:
    """L_min: mean of relu over the smallest quarter of max_k refined_k (SEAM: shifts the best background threshold).

    Args:
        refined: [B, F, h, w], foreground of the refined map multiplied by the picture's label.
    """
    largest = full(refined).amax(1).flatten(1)
    return largest.topk(max(1, largest.shape[1] // 4), largest=False, sorted=False).values.relu().mean()
