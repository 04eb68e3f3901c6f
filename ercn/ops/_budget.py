"""The error budget of a result against float64, for the tests, ``ercn doctor`` and ``ercn bench``."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor, channels: bool = False, largest: float = 0.0) -> float:
    """Largest error relative to the largest exact value; inf if any value is NaN.

    channels: relate each channel of maps [B, C, N] or [B, C, H, W] to its own largest value. For the affinity, which
    does not mix channels; the pool does, and a row of its gradient is small where sums cancel.
    largest: the largest value of all results of a call. A tensor below 1e-6 of it is 0 in exact arithmetic, such as
    the gradient of b_w if only pooled has a gradient, and its error is relative to ``largest``.
    """
    if exact.numel() == 0:
        return 0.0
    start = 2 if channels else 0
    errors, scale = (x.flatten(start).abs().amax(-1) for x in (actual.double() - exact, exact))
    scale = torch.where(scale < 1e-6 * largest, largest, scale).clamp_min(1e-300)
    return (errors / scale).nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def allowed(plain: float, dtype: torch.dtype) -> float:
    """The allowed error of a result in ``dtype`` if plain torch in the dtype of the inputs has the error ``plain``.

    It is twice ``plain``, plus one rounding to ``dtype`` and 8 ulps of float32 for another order of summation (plain
    torch may be exact by chance on small inputs). For float64 there is no more exact reference, and it is 1e-12.
    """
    if dtype == torch.float64:
        return 1e-12
    return 2 * plain + torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
