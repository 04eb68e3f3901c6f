"""Launchers of the ``cpu`` backend: the kernels of ``csrc/cpu``, which libercn registers with torch for CPU tensors.

The instruction set is chosen at run time (``ercn doctor`` names it); ``ERCN_CPU_ISA`` = portable, avx2, avx512 or
avx512_bf16 forces a lower one, read at every call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from ercn.ops._extension import load as unavailable
from ercn.ops.reference import accumulate_dtype, transition

__all__ = ["KEY", "can_run", "unavailable"]

KEY = DispatchKeySet(DispatchKey.CPU)


def can_run(op: str, *args: Any) -> str | None:
    return None if op in globals() else f"it has no kernel for {op}"


def _native(op: str, *args: Any) -> Any:
    """The op's own kernel, in C++."""
    return getattr(torch.ops.ercn, op).default.redispatch(KEY, *args, "cpu")


relu_affinity = partial(_native, "relu_affinity")
relu_affinity_backward = partial(_native, "relu_affinity_backward")
gated_attention_pool = partial(_native, "gated_attention_pool")
gated_attention_pool_backward = partial(_native, "gated_attention_pool_backward")
attention_scores = partial(_native, "attention_scores")
pool_by_scores = partial(_native, "pool_by_scores")
pool_by_scores_backward = partial(_native, "pool_by_scores_backward")
pixel_adaptive_refinement = partial(_native, "pixel_adaptive_refinement")
pixel_adaptive_refinement_backward = partial(_native, "pixel_adaptive_refinement_backward")


def random_walk(
    map_: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, adjoint: bool = False
) -> Tensor:
    acc = accumulate_dtype(map_, affinity)
    weights = transition(affinity.to(acc), radius, beta, adjoint)
    walked: Tensor = torch.ops.ercn_native.random_walk_cpu(map_.to(acc), weights, radius, steps)
    return walked.to(map_.dtype)


random_walk_backward = partial(random_walk, adjoint=True)
