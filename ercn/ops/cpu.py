"""Launchers of the ``cpu`` backend: C++ in ``csrc/cpu`` for float32, float64 and bfloat16; float16 becomes float32.

The instruction set is chosen at run time (``ercn doctor`` names it); ``ERCN_CPU_ISA`` = portable, avx2, avx512 or
avx512_bf16 forces a lower one, read at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ercn.ops._extension import load as unavailable
from ercn.ops._pool_arguments import refusal
from ercn.ops.reference import accumulate_dtype, bag_slices

__all__ = [
    "can_run",
    "gated_attention_pool",
    "gated_attention_pool_backward",
    "relu_affinity",
    "relu_affinity_backward",
    "unavailable",
]


def can_run(op: str, *args) -> str | None:
    return refusal(op, args) if op in __all__ else f"it has no kernel for {op}"


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
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
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
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
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


def _pool_tensors(cu_seqlens: Tensor | None, h: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if cu_seqlens is not None:
        bag_slices(cu_seqlens, h.shape[0])  # raises where they do not fit
    if h.dtype != torch.float16:
        return h, *weights
    return tuple(None if x is None else x.float() for x in (h, *weights))


def _accepted(x: Tensor, acc: torch.dtype) -> Tensor:
    """x as the kernels read it: in the dtype of the sums, or bfloat16 beside float32 sums."""
    return x if x.dtype == torch.bfloat16 and acc == torch.float32 else x.to(acc)
