"""How wrong a result may be, against float64: one budget for the tests, ``ercn doctor`` and ``ercn bench``."""

from __future__ import annotations

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest error, that of each channel relative to the channel's largest exact value; inf where one is NaN.

    A channel is what lies along the last dimension: the N pixels of [B, C, N], the D inputs of a weight's row [L, D].
    """
    if exact.numel() == 0:
        return 0.0
    errors = (actual.double() - exact).abs().amax(-1) / exact.abs().amax(-1).clamp_min(1e-300)
    return errors.nan_to_num(nan=float("inf")).max().item()


def allowed(plain: float, dtype: torch.dtype) -> float:
    """The error that a result in ``dtype`` may have where plain torch, in the inputs' dtype, has the error ``plain``.

    Twice that, one rounding to the result's dtype, and 8 ulps of float32 for sums in another order (plain torch is
    exact by luck on small inputs). float64 has no better judge, only another order of summation: there it is 1e-12.
    """
    if dtype == torch.float64:
        return 1e-12
    return 2 * plain + torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
