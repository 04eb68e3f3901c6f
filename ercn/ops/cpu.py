"""Launchers of the ``cpu`` backend: C++ in ``csrc/cpu`` for float32, float64 and bfloat16; float16 becomes float32.

The instruction set is chosen at run time (``ercn doctor`` names it); ``ERCN_CPU_ISA`` = portable, avx2, avx512 or
avx512_bf16 forces a lower one, read at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ercn.ops._extension import load as unavailable
from ercn.ops.reference import accumulate_dtype, bag_slices

__all__ = [
    "attention_scores",
    "can_run",
    "gated_attention_pool",
    "gated_attention_pool_backward",
    "pool_by_scores",
    "pool_by_scores_backward",
    "relu_affinity",
    "relu_affinity_backward",
    "unavailable",
]


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
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    tensors = _pool_tensors(cu_seqlens, h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    pooled, scores = torch.ops.ercn_native.gated_attention_pool_cpu(
        *tensors, mask, cu_seqlens, seed, dropout_p, activation
    )
    return pooled.to(torch.promote_types(h.dtype, v_weight.dtype)), scores


def attention_scores(
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
) -> Tensor:
    tensors = _pool_tensors(cu_seqlens, h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    return torch.ops.ercn_native.attention_scores_cpu(*tensors, mask, cu_seqlens, seed, dropout_p, activation)


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
        None if grad_pooled is None else grad_pooled.to(tensors[1].dtype),
        None if grad_scores is None else grad_scores.to(scores.dtype),
        *tensors,
        mask,
        cu_seqlens,
        seed,
        dropout_p,
        activation,
        scores.contiguous(),
        sum(need << i for i, need in enumerate(needs)),
    )
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(grads, inputs))


def pool_by_scores(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    scores, wide = _value_tensors(scores, value, cu_seqlens)
    return torch.ops.ercn_native.pool_by_scores_cpu(scores, wide, mask, cu_seqlens).to(value.dtype)


def pool_by_scores_backward(
    grad_pooled: Tensor,
    scores: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    wide_scores, wide = _value_tensors(scores, value, cu_seqlens)
    grad_scores, grad_value = torch.ops.ercn_native.pool_by_scores_backward_cpu(
        grad_pooled.to(wide.dtype), wide_scores, wide, mask, cu_seqlens, *needs
    )
    return grad_scores.to(scores.dtype), grad_value.to(value.dtype)


def _pool_tensors(cu_seqlens: Tensor | None, h: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """h and the weights in one dtype that has kernels, or bfloat16 h beside float32 weights."""
    if cu_seqlens is not None:
        bag_slices(cu_seqlens, h.shape[0])  # raises where they do not fit
    of_h, of_weights = h.dtype, weights[0].dtype
    if of_h == of_weights and of_h != torch.float16:
        return h, *weights
    wide = accumulate_dtype(h, weights[0])
    if of_h != torch.bfloat16 or wide == torch.float64:
        h = h.to(wide)
    return h, *(None if x is None else x.to(wide) for x in weights)


def _value_tensors(scores: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        bag_slices(cu_seqlens, value.shape[0])
    acc = accumulate_dtype(scores, value)
    return scores.to(acc).contiguous(), _accepted(value, acc)


def _accepted(x: Tensor, acc: torch.dtype) -> Tensor:
    """x as the kernels read it: in the dtype of the sums, or bfloat16 beside float32 sums."""
    return x if x.dtype == torch.bfloat16 and acc == torch.float32 else x.to(acc)
