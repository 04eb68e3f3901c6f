"""How wrong a result may be, against float64: one budget for the tests, ``ercn doctor`` and ``ercn bench``."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor, largest: float = 0.0) -> float:
    """Largest error, that of each channel relative to the channel's largest exact value; inf where one is NaN.

    A channel is what lies along the last dimension, the pixels of a map [B, C, N] or [B, C, H, W] as the inputs of a
    weight's row [L, D]. One below 1e-6 of ``largest`` is 0 in exact arithmetic, as is the gradient of b_w where only
    pooled has one: it is measured by ``largest``.
    """
    if exact.numel() == 0:
        return 0.0
    start = 2 if exact.dim() == 4 else -1
    errors, scale = (x.flatten(start).abs().amax(-1) for x in (actual.double() - exact, exact))
    scale = torch.where(scale < 1e-6 * largest, largest, scale).clamp_min(1e-300)
    return (errors / scale).nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def allowed(plain: float, dtype: torch.dtype) -> float:
    """The error that a result in ``dtype`` may have where plain torch, in the inputs' dtype, has the error ``plain``.

    Twice that, one rounding to the result's dtype, and 8 ulps of float32 for sums in another order (plain torch is
    exact by luck on small inputs). float64 has no better judge, only another order of summation: there it is 1e-12.
    """
    if dtype == torch.float64:
        return 1e-12
    return 2 * plain + torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
