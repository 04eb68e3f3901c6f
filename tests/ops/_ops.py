"""Shared by the tests of all operators: backends under test, golden files, error budgets, memory layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ercn.ops
from ercn.ops import _backends
from ercn.ops._budget import allowed, error

PLAIN = (None, None, None, None, 0.0, "tanh")  # the pool's w_bias, mask, cu_seqlens, seed, dropout_p, activation
DATA = Path(__file__).parents[1] / "data" / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def backends_of(op: str, device: str = "cpu") -> list[str]:
    """Backends on this machine that have the op."""
    usable = {b.name for b in ercn.ops.backends() if b.reason is None}
    x, map_ = torch.ones(1, 1, 1, device=device), torch.ones(1, 1, 1, 1, device=device)
    probes = {
        "relu_affinity": (x, x),
        "gated_attention_pool": (x, x[0], None, None, None, x[0], *PLAIN),
        "attention_scores": (x, x[0], None, None, None, x[0], *PLAIN),
        "pool_by_scores": (x, x, None, None),
        "pixel_adaptive_refinement": (map_, map_, [1], 1, "pamr"),
        "random_walk": (map_, map_.expand(1, 4, 1, 1), 2, 1.0, 1),
    }
    return [row.name for row in _backends.TABLE if row.name in usable and row.can_run(op, *probes[op]) is None]


def require(backend: str, op: str, *args) -> None:
    """Skip with the backend's reason if it does not take these arguments of the op (of the pool h suffices)."""
    if op == "gated_attention_pool" and len(args) == 1:
        args = (args[0], args[0], None, None, None, args[0], *PLAIN)
    if reason := _backends.named(backend, "backend").can_run(op, *args):
        pytest.skip(f"{backend}: {reason}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def assert_within_budget(actual, plain, exact, channels: bool = False) -> None:
    """The error of ``actual`` against ``exact`` (float64) is allowed, given that of plain torch in the same dtype."""
    assert error(actual, exact, channels) <= allowed(error(plain, exact, channels), actual.dtype)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of a 3-D tensor in several memory layouts."""
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
    """Both with 0 for NaN, Inf and -Inf, which must be at the same places."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(exact)), kind.__name__
    return tuple(x.nan_to_num(0, 0, 0) for x in (actual, exact))
