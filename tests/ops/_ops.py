"""What the operator tests share: backends under test, dense definitions in plain torch, error budgets, odd layouts."""

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
    """Backends on this machine that have the op at all."""
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
    """Skip, in the backend's own words, where it does not take these arguments of the op (of the pool, h alone)."""
    if op == "gated_attention_pool" and len(args) == 1:
        args = (args[0], args[0], None, None, None, args[0], *PLAIN)
    if reason := _backends.named(backend, "backend").can_run(op, *args):
        pytest.skip(f"{backend}: {reason}")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def assert_within_budget(actual, plain, exact, channels: bool = False) -> None:
    """actual is as near to exact (float64) as plain torch in the same dtype, as the budget counts it."""
    assert error(actual, exact, channels) <= allowed(error(plain, exact, channels), actual.dtype)


def dense_affinity(value, feat, grad) -> list[torch.Tensor]:
    """[out, grad_value, grad_feat] of the affinity in plain torch."""
    leaves = [x.detach().clone().requires_grad_() for x in (value, feat)]
    out = leaves[0] @ torch.relu(leaves[1].mT @ leaves[1])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def least_lucky(value, feat, grad, exact) -> list[torch.Tensor]:
    """``dense_affinity``, each result with its largest error of eight orders of the sums over C, D and N: a single
    order may be near by chance, most of all where a sum cancels, and which one a BLAS takes is the processor's."""
    results = []
    for i in range(8):
        c, d, n = (torch.randperm(size, generator=generator(i)) for size in (*value.shape[1:2], *feat.shape[1:]))
        out, grad_value, grad_feat = dense_affinity(
            *(x[:, rows][:, :, n] for x, rows in ((value, c), (feat, d), (grad, c)))
        )
        back = n.argsort()
        results.append([x[:, rows.argsort()][:, :, back] for x, rows in ((out, c), (grad_value, c), (grad_feat, d))])
    return [max(each, key=lambda x: error(x, truth, channels=True)) for each, truth in zip(zip(*results), exact)]


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
