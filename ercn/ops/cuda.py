"""Launchers of the ``cuda`` backend: CUDA C++ in ``csrc/cuda`` for float32, bfloat16 and float16.

Hopper has kernels of its own for bfloat16 and float16; all else runs kernels that any GPU from compute capability 8.0
on takes. ``ERCN_CUDA_KERNELS`` = generic, sm90 or sm90_dense forces one, read at every call; a forced one that cannot
take the tensors raises. float32 follows ``torch.get_float32_matmul_precision()``.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ercn.ops import _extension
from ercn.ops._pool_arguments import refusal

KERNELS = ("generic", "sm90", "sm90_dense")
NAMESPACE = "ercn_native"
_OPS = ("relu_affinity", "relu_affinity_backward", "gated_attention_pool", "gated_attention_pool_backward")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    if reason := _extension.load("_cuda"):
        return reason
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver for it"
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"it needs a GPU of compute capability 8.0 or newer; this one has {major}.{minor}"
    return None


def can_run(op: str, *args) -> str | None:
    if op not in _OPS:
        return f"it has no kernel for {op}"
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in _DTYPES:
            return f"it takes float32, bfloat16 and float16; got {x.dtype}"
    if reason := refusal(op, args):
        return reason
    if op.startswith("relu_affinity"):
        feat = args[1 if op == "relu_affinity" else 2]
        most = _call("relu_affinity_most_features", feat.itemsize, _shared_bytes(feat.device))
        if feat.dim() == 3 and feat.shape[1] > most:
            return f"it takes at most {most} features in {feat.dtype} on this GPU; got {feat.shape[1]}"
    return None


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one block of threads may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def kernels() -> str:
    """ERCN_CUDA_KERNELS, or "" for the best that take the tensors."""
    name = os.environ.get("ERCN_CUDA_KERNELS", "")
    if name and name not in KERNELS:
        raise ValueError(f"ERCN_CUDA_KERNELS is {name!r}; kernels are {', '.join(KERNELS)}")
    return name


def _exact(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _call(name: str, *args):
    return getattr(getattr(torch.ops, NAMESPACE), name)(*args)


def relu_affinity(value: Tensor, feat: Tensor) -> Tensor:
    return _call("relu_affinity_cuda", value, feat, _exact(feat.dtype), kernels())


def relu_affinity_backward(grad_out: Tensor, value: Tensor, feat: Tensor, need_value: bool) -> tuple[Tensor, Tensor]:
    return _call("relu_affinity_backward_cuda", grad_out, value, feat, need_value, _exact(feat.dtype), kernels())


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
    weights = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    return _call("gated_attention_pool_cuda", h, *weights, mask, cu_seqlens, _exact(h.dtype), kernels())


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
    wanted = sum(need << i for i, need in enumerate(needs))
    weights = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    bags = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    pooled = h.new_empty(bags, w_weight.shape[0], h.shape[-1])  # of the forward; only its shape is looked at
    return _call(
        "gated_attention_pool_backward_cuda",
        grad_pooled, grad_scores, h, *weights, mask, cu_seqlens, pooled, scores, wanted, _exact(h.dtype), kernels(),
    )  # fmt: skip
