"""Launchers of the ``cpu`` backend: C++ in ``csrc/cpu`` for float32, float64 and bfloat16; float16 becomes float32.

The instruction set is chosen at run time (``ercn doctor`` names it); ``ERCN_CPU_ISA`` = portable, avx2, avx512 or
avx512_bf16 forces a lower one, read at every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ercn.ops._extension import load as unavailable
from ercn.ops.reference import accumulate_dtype, bag_slices, transition

__all__ = [
    "can_run",
    "gated_attention_pool",
    "gated_attention_pool_backward",
    "pixel_adaptive_refinement",
    "pixel_adaptive_refinement_backward",
    "random_walk",
    "random_walk_backward",
    "relu_affinity",
    "relu_affinity_backward",
    "unavailable",
]

# Adaptive weights of an image are kept from step to step up to this size. Larger ones are made again at every step,
# which takes two fifths longer at 1024² pixels and 5 channels.
STORED_BYTES = 64 << 20


def can_run(op: str, *args) -> str | None:
    return None if op in __all__ else f"it has no kernel for {op}"


def relu_affinity(value: Tensor, feat: Tensor) -> Tensor:
    acc = accumulate_dtype(value, feat)
    return torch.ops.ercn_native.relu_affinity_cpu(value.to(acc), _accepted(feat, acc))


def relu_affinity_backward(grad_out: Tensor, value: Tensor, feat: Tensor, need_value: bool) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(value, feat)
    grad_value, grad_feat = torch.ops.ercn_native.relu_affinity_backward_cpu(
        grad_out.to(acc), value.to(acc), _accepted(feat, acc), need_value
    )
    return grad_value.to(value.dtype), grad_feat.to(feat.dtype)


def gated_attention_pool(
    h: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tensors = _pool_tensors(cu_seqlens, h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    pooled, scores = torch.ops.ercn_native.gated_attention_pool_cpu(*tensors, mask, cu_seqlens)
    return pooled.to(h.dtype), scores


def gated_attention_pool_backward(
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    h: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    pooled: Tensor,
    scores: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    tensors = _pool_tensors(cu_seqlens, *inputs)
    grads = torch.ops.ercn_native.gated_attention_pool_backward_cpu(
        None if grad_pooled is None else grad_pooled.to(tensors[0].dtype),
        None if grad_scores is None else grad_scores.to(scores.dtype),
        *tensors,
        mask,
        cu_seqlens,
        scores.contiguous(),
        sum(need << i for i, need in enumerate(needs)),
    )
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(grads, inputs))


def pixel_adaptive_refinement(cam: Tensor, image: Tensor, dilations: Sequence[int], steps: int, form: str) -> Tensor:
    acc = accumulate_dtype(cam, image)
    out = torch.ops.ercn_native.pixel_adaptive_refinement_cpu(
        cam.to(acc), image.to(acc), dilations, steps, form, STORED_BYTES
    )
    return out.to(cam.dtype)


def pixel_adaptive_refinement_backward(
    grad_out: Tensor, image: Tensor, dilations: Sequence[int], steps: int, form: str
) -> Tensor:
    acc = accumulate_dtype(grad_out, image)
    grad_cam = torch.ops.ercn_native.pixel_adaptive_refinement_backward_cpu(
        grad_out.to(acc), image.to(acc), dilations, steps, form
    )
    return grad_cam.to(grad_out.dtype)


def random_walk(value: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    return _walk(value, affinity, radius, beta, steps, adjoint=False)


def random_walk_backward(grad_out: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    return _walk(grad_out, affinity, radius, beta, steps, adjoint=True)


def _walk(map_: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, adjoint: bool) -> Tensor:
    acc = accumulate_dtype(map_, affinity)
    weights = transition(affinity.to(acc), radius, beta, adjoint)
    return torch.ops.ercn_native.random_walk_cpu(map_.to(acc), weights, radius, steps).to(map_.dtype)


def _pool_tensors(cu_seqlens: Tensor | None, h: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if cu_seqlens is not None:
        bag_slices(cu_seqlens, h.shape[0])  # raises where they do not fit
    if h.dtype != torch.float16:
        return h, *weights
    return tuple(None if x is None else x.float() for x in (h, *weights))


def _accepted(x: Tensor, acc: torch.dtype) -> Tensor:
    """x as the kernels read it: in the dtype of the sums, or bfloat16 beside float32 sums."""
    return x if x.dtype == torch.bfloat16 and acc == torch.float32 else x.to(acc)
