"""Launchers of the ``triton`` backend: kernels in ``ercn.kernels``, float32, bfloat16 and float16 on GPUs.

Triton is imported when an op runs. With ``TRITON_INTERPRET=1`` in the environment from the start, the kernels run on
CPU tensors instead, slowly, for tests.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    if find_spec("ercn.kernels") is None:
        return "ercn.kernels is absent: this is a source tree that was not installed"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton; there are wheels for Linux)"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver for it"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"it needs a GPU of compute capability 8.0 or newer; this one has {major}.{minor}"
    return None


def can_run(op: str, *args: Any) -> str | None:
    if op not in globals():
        return f"it has no kernel for {op}"
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in _DTYPES:
            return f"it takes float32, bfloat16 and float16; got {x.dtype}"
    return None


@functools.cache
def _launcher(module: str, op: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] = getattr(import_module(f"ercn.kernels.{module}"), op)
    return launcher


def _launch(module: str, op: str, *args: Any) -> Any:
    device = next(x for x in args if isinstance(x, Tensor)).device
    if device.type != "cuda":
        return _launcher(module, op)(*args)
    with torch.cuda.device(device):
        return _launcher(module, op)(*args)


relu_affinity = functools.partial(_launch, "affinity", "relu_affinity")
relu_affinity_backward = functools.partial(_launch, "affinity", "relu_affinity_backward")
gated_attention_pool = functools.partial(_launch, "attention_pool", "gated_attention_pool")
gated_attention_pool_backward = functools.partial(_launch, "attention_pool", "gated_attention_pool_backward")
attention_scores = functools.partial(_launch, "attention_pool", "attention_scores")
pool_by_scores = functools.partial(_launch, "attention_pool", "pool_by_scores")
pool_by_scores_backward = functools.partial(_launch, "attention_pool", "pool_by_scores_backward")
pixel_adaptive_refinement = functools.partial(_launch, "refinement", "pixel_adaptive_refinement")
pixel_adaptive_refinement_backward = functools.partial(_launch, "refinement", "pixel_adaptive_refinement_backward")
random_walk = functools.partial(_launch, "refinement", "random_walk")
random_walk_backward = functools.partial(_launch, "refinement", "random_walk_backward")
