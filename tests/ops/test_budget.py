"""The error budget: what it counts, what it allows."""

from __future__ import annotations

import _ops
import pytest
import torch

from ercn.ops import _budget

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", [(2, 3, 20), (2, 3, 4, 5)], ids=str)
def test_a_small_channel_is_measured_by_itself(shape):
    exact = torch.ones(shape, dtype=torch.float64)
    exact[1, 2] = 1e-6
    actual = exact.clone()
    actual[(1, 2) + (0,) * (len(shape) - 2)] = 2e-6
    assert _budget.error(actual, exact, channels=True) == pytest.approx(1.0)
    assert _budget.error(actual, exact) == pytest.approx(1e-6)


def test_what_is_zero_in_exact_arithmetic():
    exact = torch.zeros(2, 2, dtype=torch.float64)
    assert _budget.error(exact.clone(), exact) == 0
    assert _budget.error(exact + 1e-7, exact) > 1
    assert _budget.error(exact + 1e-7, exact, largest=2.0) == pytest.approx(0.5e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_within_it(bad):
    exact = torch.ones(2, 3, dtype=torch.float64)
    actual = exact.clone()
    actual[1, 1] = bad
    assert _budget.error(actual, exact) == float("inf")


def test_nothing_has_no_error():
    assert _budget.error(torch.empty(0, 3), torch.empty(0, 3).double()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_allows_twice_plain_torch_and_roundings(dtype):
    assert _budget.allowed(1e-3, dtype) == 2e-3 + torch.finfo(dtype).eps + 8 * EPS
    exact = torch.ones(1, 4, dtype=torch.float64)
    plain = exact + 2**-6
    _ops.assert_within_budget((exact + 2**-5).to(dtype), plain, exact)
    with pytest.raises(AssertionError):
        _ops.assert_within_budget((exact + 2**-4).to(dtype), plain, exact)


def test_float64_has_no_better_judge():
    exact = torch.ones(1, 4, dtype=torch.float64)
    _ops.assert_within_budget(exact + 1e-13, exact + 1, exact)
    with pytest.raises(AssertionError):
        _ops.assert_within_budget(exact + 1e-11, exact + 1, exact)
