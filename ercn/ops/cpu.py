"""Launchers of the ``cpu`` backend: C++ in ``csrc/cpu``, float32 and float64, half precision widened to float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ercn.ops._extension import load as unavailable
from ercn.ops.reference import accumulate_dtype

__all__ = ["can_run", "relu_affinity", "relu_affinity_backward", "unavailable"]


def can_run(op: str, tensors: tuple[Tensor, ...]) -> str | None:
    return None if op in __all__ else f"it has no kernel for {op}"


def relu_affinity(value: Tensor, feat: Tensor) -> Tensor:
    acc = accumulate_dtype(value, feat)
    return torch.ops.ercn_native.relu_affinity_cpu(value.to(acc), feat.to(acc))


def relu_affinity_backward(grad_out: Tensor, value: Tensor, feat: Tensor, need_value: bool) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(value, feat)
    wide = (x.to(acc) for x in (grad_out, value, feat))
    grad_value, grad_feat = torch.ops.ercn_native.relu_affinity_backward_cpu(*wide, need_value)
    return grad_value.to(value.dtype), grad_feat.to(feat.dtype)
