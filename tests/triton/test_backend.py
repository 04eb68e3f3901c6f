"""Why the Triton backend cannot be used, in its own words; nothing here needs Triton or a GPU."""

from __future__ import annotations

import pytest
import torch

from ercn.ops import backends, relu_affinity, triton


@pytest.fixture
def fresh(monkeypatch):
    """The reason is kept for the life of the process: forget it before and after."""
    monkeypatch.setattr(triton, "INTERPRETED", False)
    triton.unavailable.cache_clear()
    yield monkeypatch
    triton.unavailable.cache_clear()


def missing(*names):
    return lambda name: None if name in names else object()


def test_every_obstacle_is_a_sentence(fresh):
    fresh.setattr(triton, "find_spec", missing("ercn.kernels"))
    assert triton.unavailable() == "ercn.kernels is absent: this is a source tree that was not installed"
    triton.unavailable.cache_clear()
    fresh.setattr(triton, "find_spec", missing("triton"))
    assert triton.unavailable().startswith("Triton is not installed")
    triton.unavailable.cache_clear()
    fresh.setattr(triton, "find_spec", missing())
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.unavailable() == "torch finds no GPU, or no driver for it"
    triton.unavailable.cache_clear()
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    fresh.setattr(torch.version, "hip", None)
    assert triton.unavailable() == "it needs a GPU of compute capability 8.0 or newer; this one has 7.5"
    triton.unavailable.cache_clear()
    fresh.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert triton.unavailable() is None


def test_the_table_says_the_same():
    (row,) = (row for row in backends() if row.name == "triton")
    assert row.reason == triton.unavailable() and row.device == triton.DEVICE and not row.automatic


def test_tensors_on_the_cpu_are_refused():
    if triton.INTERPRETED:
        pytest.skip("the interpreter takes CPU tensors")
    x = torch.ones(1, 1, 2)
    with pytest.raises(RuntimeError, match="it runs on cuda, the tensors are on cpu"):
        relu_affinity(x, x, backend="triton")


def test_what_it_takes():
    half, double = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)
    assert triton.can_run("relu_affinity", half, torch.ones(1)) is None
    refusal = "it takes float32, bfloat16 and float16; got torch.float64"
    assert triton.can_run("relu_affinity", half, double) == refusal
    pool = (half, half, None, None, None, half, None, None, torch.tensor([0, 1]))
    assert triton.can_run("gated_attention_pool", *pool, None, 0.0, "tanh") is None
    assert triton.can_run("another", half) == "it has no kernel for another"
