"""The GPU backends that this process can use, and the device of their tensors.

ERCN_CUDA_EMULATED=1 emulates the CUDA backend, TRITON_INTERPRET=1 interprets the Triton backend, both on the CPU.
"""

from __future__ import annotations

import os

import torch

from ercn.ops import backends, triton

EMULATED = os.environ.get("ERCN_CUDA_EMULATED") == "1"
if EMULATED:
    import _cuda_emulator

    _cuda_emulator.become_backend()

DEVICE = "cuda" if torch.cuda.is_available() and not EMULATED and not triton.INTERPRETED else "cpu"
BACKENDS = [row.name for row in backends() if row.name in ("triton", "cuda") and row.reason is None]


def here(x: torch.Tensor | None) -> torch.Tensor | None:
    """x on the device of the kernels."""
    return None if x is None else x.to(DEVICE)
