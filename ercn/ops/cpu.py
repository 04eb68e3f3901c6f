"""Launchers of the ``cpu`` backend: the kernels of ``csrc/cpu``, which libercn registers with torch for CPU tensors.

The instruction set is chosen at run time (``ercn doctor`` names it); ``ERCN_CPU_ISA`` = portable, avx2, avx512 or
avx512_bf16 forces a lower one, read at every call.
"""

from __future__ import annotations

from functools import partial

import torch
from torch._C import DispatchKey, DispatchKeySet

from ercn.ops._extension import load as unavailable

__all__ = ["KEY", "can_run", "unavailable"]

KEY = DispatchKeySet(DispatchKey.CPU)
_OPS = (
    "attention_scores",
    "gated_attention_pool",
    "gated_attention_pool_backward",
    "pool_by_scores",
    "pool_by_scores_backward",
    "relu_affinity",
    "relu_affinity_backward",
)


def can_run(op: str, *args) -> str | None:
    return None if op in _OPS else f"it has no kernel for {op}"


def _native(op: str, *args):
    """The op's own kernel, in C++."""
    return getattr(torch.ops.ercn, op).default.redispatch(KEY, *args, "cpu")


relu_affinity = partial(_native, "relu_affinity")
relu_affinity_backward = partial(_native, "relu_affinity_backward")
gated_attention_pool = partial(_native, "gated_attention_pool")
gated_attention_pool_backward = partial(_native, "gated_attention_pool_backward")
attention_scores = partial(_native, "attention_scores")
pool_by_scores = partial(_native, "pool_by_scores")
pool_by_scores_backward = partial(_native, "pool_by_scores_backward")
