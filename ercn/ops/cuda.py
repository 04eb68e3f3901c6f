"""Launchers of the ``cuda`` backend: CUDA C++ in ``csrc/cuda`` for float32, bfloat16 and float16.

Hopper has kernels of its own for bfloat16 and float16; all else runs kernels that any GPU from compute capability 8.0
on takes. ``ERCN_CUDA_KERNELS`` = generic, sm90 or sm90_dense forces one, read at every call; a forced one that cannot
take the tensors raises. float32 follows ``torch.get_float32_matmul_precision()``. ``pool_by_scores`` has one kernel of
its own kind for every GPU, whatever is forced.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ercn.ops import _extension

KERNELS = ("generic", "sm90", "sm90_dense")
NAMESPACE = "ercn_native"
_OPS = (
    "relu_affinity", "relu_affinity_backward", "gated_attention_pool", "gated_attention_pool_backward",
    "attention_scores", "pool_by_scores", "pool_by_scores_backward",
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    if reason := _extension.load("libercn_cuda"):
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
    if op in ("gated_attention_pool", "gated_attention_pool_backward", "attention_scores"):
        h, v_weight = args[2:4] if op == "gated_attention_pool_backward" else args[:2]
        if h.dtype != v_weight.dtype:
            return f"it takes weights in h's dtype {h.dtype}; got {v_weight.dtype}"
    if op.startswith("pool_by_scores"):
        scores = args[0 if op == "pool_by_scores" else 1]
        if scores.dtype != torch.float32:
            return f"it pools by float32 scores; got {scores.dtype}"
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


def _pool(op: str, h: Tensor, *args):
    return _call(op, h, *args, _exact(h.dtype), kernels())


gated_attention_pool = functools.partial(_pool, "gated_attention_pool_cuda")
attention_scores = functools.partial(_pool, "attention_scores_cuda")


def gated_attention_pool_backward(
    grad_pooled: Tensor | None, grad_scores: Tensor | None, h: Tensor, *args
) -> tuple[Tensor, ...]:
    *inputs, needs = args
    wanted = sum(need << i for i, need in enumerate(needs))
    return _call(
        "gated_attention_pool_backward_cuda", grad_pooled, grad_scores, h, *inputs, wanted, _exact(h.dtype), kernels()
    )


def pool_by_scores(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return _call("pool_by_scores_cuda", scores, value, mask, cu_seqlens)


def pool_by_scores_backward(
    grad_pooled: Tensor,
    scores: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    return _call("pool_by_scores_backward_cuda", grad_pooled, scores, value, mask, cu_seqlens, *needs)
