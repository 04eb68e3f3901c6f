"""Launchers of the ``cpu`` backend: the kernels of ``csrc/cpu``, which libercn registers with torch for CPU tensors.

The instruction set is chosen at run time (``ercn doctor`` names it); ``ERCN_CPU_ISA`` = portable, avx2, avx512 or
avx512_bf16 forces a lower one, read at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from ercn.ops._extension import load as unavailable
from ercn.ops.reference import accumulate_dtype, transition

__all__ = ["KEY", "can_run", "unavailable"]

KEY = DispatchKeySet(DispatchKey.CPU)
_OPS = (
    "attention_scores",
    "gated_attention_pool",
    "gated_attention_pool_backward",
    "pixel_adaptive_refinement",
    "pixel_adaptive_refinement_backward",
    "pool_by_scores",
    "pool_by_scores_backward",
    "random_walk",
    "random_walk_backward",
    "relu_affinity",
    "relu_affinity_backward",
)

# Adaptive weights of an image are kept from step to step up to this size. Larger ones are made again at every step,
# which takes a quarter longer at 1024² pixels and 5 channels.
STORED_BYTES = 64 << 20


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
