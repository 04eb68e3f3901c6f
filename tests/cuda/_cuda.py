"""The CUDA backend's operators by chosen kernels, on a GPU that has them or emulated in this process."""

from __future__ import annotations

from collections.abc import Callable

import _cuda_emulator
import pytest
import torch

from ercn.ops import cuda

DEVICE = "cuda" if torch.cuda.is_available() and cuda.unavailable() is None else "cpu"
HOPPER = DEVICE if DEVICE == "cpu" or torch.cuda.get_device_capability() == (9, 0) else "cpu"  # of the sm90 kernels


def marks(device: str) -> list[pytest.MarkDecorator]:
    """Of tests with tensors on this device."""
    return [pytest.mark.gpu] if device == "cuda" else []


def operators(device: str):
    """The namespace of the operators that take this device's tensors: ercn_native, or ercn_emulated."""
    if device == "cuda":
        return torch.ops.ercn_native
    _cuda_emulator.load_operators()
    return torch.ops.ercn_emulated


def pool_with(
    kernels: str, exact: bool = True, device: str = DEVICE
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The pool by the named kernels, a function of its seven tensors and keywords. exact: to float32's accuracy."""
    ops = operators(device)

    class Pool(torch.autograd.Function):
        @staticmethod
        def forward(ctx, mask, cu_seqlens, seed, dropout_p, activation, *arguments):
            ctx.options = dropout_p, activation
            given = (*arguments, mask, cu_seqlens, seed)
            pooled, scores = ops.gated_attention_pool_cuda(*given, *ctx.options, exact, kernels)
            ctx.save_for_backward(*given, scores)
            ctx.set_materialize_grads(False)
            return pooled, scores

        @staticmethod
        def backward(ctx, grad_pooled, grad_scores):
            needs = ctx.needs_input_grad[5:]
            *given, scores = ctx.saved_tensors
            wanted = sum(need << i for i, need in enumerate(needs))
            grads = ops.gated_attention_pool_backward_cuda(
                grad_pooled, grad_scores, *given, *ctx.options, scores, wanted, exact, kernels
            )
            assert all(need or g.numel() == 0 for need, g in zip(needs, grads, strict=True))
            return *(None,) * 5, *(g if need else None for need, g in zip(needs, grads, strict=True))

    def pool(*arguments, mask=None, cu_seqlens=None, seed=None, dropout_p=0.0, activation="tanh"):
        return Pool.apply(mask, cu_seqlens, seed, dropout_p, activation, *arguments)

    return pool
