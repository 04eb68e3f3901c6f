"""What the operator tests share: backends under test, dense definitions in plain torch, error budgets, odd layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ercn.ops
from ercn.ops import _backends

DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def backends_of(op: str) -> list[str]:
    """Backends on this machine that have the op at all."""
    usable = {b.name for b in ercn.ops.backends() if b.reason is None}
    probe = (torch.ones(1, 1, 1),)
    return [row.name for row in _backends.TABLE if row.name in usable and row.can_run(op, probe) is None]


def require(backend: str, op: str, *tensors: torch.Tensor) -> None:
    """Skip, in the backend's own words, what it does not take."""
    row = next(row for row in _backends.TABLE if row.name == backend)
    if reason := row.can_run(op, tensors):
        pytest.skip(f"{backend}: {reason}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error relative to the largest exact value."""
    if exact.numel() == 0:
        return 0.0
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()


def assert_within_budget(actual, plain, exact) -> None:
    """err(op) <= 2 · err(plain torch in the same dtype), both against float64.

    Added to it: one rounding to the output's dtype, and 8 ulps of float32 for sums in another order (plain torch is
    exact by luck on small inputs). float64 has no better judge, only another order of summation: there it is 1e-12.
    """
    if actual.dtype == torch.float64:
        assert error(actual, exact) < 1e-12
    else:
        ulps = torch.finfo(actual.dtype).eps + 8 * torch.finfo(torch.float32).eps
        assert error(actual, exact) <= 2 * error(plain, exact) + ulps


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values of a 3-D tensor in the memory layouts that callers hand over."""
    padded = torch.full((x.shape[0], x.shape[1] + 1, 2 * x.shape[2] + 1), float("nan"), dtype=x.dtype)
    strided = padded[:, 1:, 1::2]
    strided.copy_(x)
    offset = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    offset[1:] = x.reshape(-1)
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.mT.contiguous().mT,
        "strided": strided,
        "offset": offset[1:].view(x.shape),
        "expanded": x[:1].expand_as(x),
    }


def finite_parts(actual: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, with 0 for what is not finite: NaN, Inf and -Inf must stand where exact has them."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(exact)), kind.__name__
    return tuple(x.nan_to_num(0, 0, 0) for x in (actual, exact))
