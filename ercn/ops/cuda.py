"""Launchers of the ``cuda`` backend: CUDA C++ in ``csrc/cuda`` for float32, bfloat16 and float16.

Hopper has special kernels for bfloat16 and float16; all else runs generic kernels, for GPUs of compute capability 8.0
and newer. ``ERCN_CUDA_KERNELS`` = generic, sm90 or sm90_dense forces one, read at every call; it raises if that cannot
take the tensors. float32 follows ``torch.get_float32_matmul_precision()``. ``pool_by_scores`` has one kernel for all
GPUs.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from ercn.ops import _extension
from ercn.ops._arguments import position

KERNELS = ("generic", "sm90", "sm90_dense")
NAMESPACE = "ercn_native"
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


def can_run(op: str, *args: Any) -> str | None:
    if op not in globals():
        return f"it has no kernel for {op}"
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in _DTYPES:
            return f"it takes float32, bfloat16 and float16; got {x.dtype}"
    if op in ("gated_attention_pool", "gated_attention_pool_backward", "attention_scores"):
        h, v_weight = args[position(op, "h")], args[position(op, "v_weight")]
        if h.dtype != v_weight.dtype:
            return f"it takes weights in h's dtype {h.dtype}; got {v_weight.dtype}"
    if op.startswith("pool_by_scores"):
        scores = args[position(op, "scores")]
        if scores.dtype != torch.float32:
            return f"it pools by float32 scores; got {scores.dtype}"
    if op.startswith("relu_affinity"):
        feat = args[position(op, "feat")]
        most = _call("relu_affinity_most_features", feat.itemsize, _shared_bytes(feat.device))
        if feat.dim() == 3 and feat.shape[1] > most:
            return f"it takes at most {most} features in {feat.dtype} on this GPU; got {feat.shape[1]}"
    return None


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a thread block can opt in to."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def kernels() -> str:
    """ERCN_CUDA_KERNELS, or "" for the fastest kernels that take the tensors."""
    name = os.environ.get("ERCN_CUDA_KERNELS", "")
    if name and name not in KERNELS:
        raise ValueError(f"ERCN_CUDA_KERNELS is {name!r}; kernels are {', '.join(KERNELS)}")
    return name


def _exact(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _call(name: str, *args: Any) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name)(*args)


def _affinity(op: str, *args: Any) -> Any:
    feat = args[position(op, "feat")]
    return _call(f"{op}_cuda", *args, _exact(feat.dtype), kernels())


def _pool(op: str, h: Tensor, *args: Any) -> Any:
    return _call(f"{op}_cuda", h, *args, _exact(h.dtype), kernels())


relu_affinity = functools.partial(_affinity, "relu_affinity")
relu_affinity_backward = functools.partial(_affinity, "relu_affinity_backward")
gated_attention_pool = functools.partial(_pool, "gated_attention_pool")
attention_scores = functools.partial(_pool, "attention_scores")


def gated_attention_pool_backward(
    grad_pooled: Tensor | None, grad_scores: Tensor | None, h: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *inputs, needs = args
    needed = sum(need << i for i, need in enumerate(needs))
    grads: tuple[Tensor, ...] = _call(
        "gated_attention_pool_backward_cuda", grad_pooled, grad_scores, h, *inputs, needed, _exact(h.dtype), kernels()
    )
    return grads


pool_by_scores = functools.partial(_call, "pool_by_scores_cuda")


def pool_by_scores_backward(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, needs = args
    grads: tuple[Tensor, Tensor] = _call("pool_by_scores_backward_cuda", *inputs, *needs)
    return grads
