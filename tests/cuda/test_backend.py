"""The CUDA backend's reasons not to run and its choice of kernels, without a GPU."""

from __future__ import annotations

import pytest
import torch

from ercn.ops import _extension, backends, cuda, relu_affinity


@pytest.fixture
def fresh(monkeypatch):
    """Clears the process's cached reason before and after."""
    cuda.unavailable.cache_clear()
    yield monkeypatch
    cuda.unavailable.cache_clear()


def test_every_obstacle_is_a_sentence(fresh):
    fresh.setattr(_extension, "load", lambda name: f"{name} was not built: no CUDA toolkit")
    assert cuda.unavailable() == "libercn_cuda was not built: no CUDA toolkit"
    fresh.setattr(_extension, "load", lambda name: None)
    for available, capability, expected in (
        (False, None, "torch finds no GPU, or no driver for it"),
        (True, (7, 5), "it needs a GPU of compute capability 8.0 or newer; this one has 7.5"),
        (True, (9, 0), None),
    ):
        cuda.unavailable.cache_clear()
        fresh.setattr(torch.cuda, "is_available", lambda available=available: available)
        fresh.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert cuda.unavailable() == expected


def test_the_table_says_the_same():
    (row,) = (row for row in backends() if row.name == "cuda")
    assert row.reason == cuda.unavailable() and row.device == "cuda" and not row.automatic


def test_tensors_on_the_cpu_are_refused():
    x = torch.ones(1, 1, 2)
    with pytest.raises(RuntimeError, match="it runs on cuda, the tensors are on cpu"):
        relu_affinity(x, x, backend="cuda")


@pytest.mark.skipif(_extension.load("libercn_cuda") is not None, reason=str(_extension.load("libercn_cuda")))
@pytest.mark.parametrize("shared, most", [(99, (256, 128)), (163, (512, 256)), (227, (768, 384))], ids=str)
def test_what_it_takes(monkeypatch, shared, most):
    monkeypatch.setattr(cuda, "_shared_bytes", lambda device: shared << 10)
    half, double = torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.ones(1, 1, 2, dtype=torch.float64)
    weight, bounds = half[0], torch.tensor([0, 1])
    assert cuda.can_run("relu_affinity", half, half) is None
    assert cuda.can_run("relu_affinity", half, double) == "it takes float32, bfloat16 and float16; got torch.float64"
    pool = (weight, weight, None, None, None, weight, None, None, bounds, None, 0.0, "tanh")
    assert cuda.can_run("gated_attention_pool", *pool) is None
    for given in ((weight, weight.float()), (half[0].float(), weight)):  # fp32 weights beside bf16 h, and the reverse
        mixed = (given[0], given[1], None, None, None, given[1], *pool[6:])
        reason = f"it takes weights in h's dtype {given[0].dtype}; got {given[1].dtype}"
        assert cuda.can_run("gated_attention_pool", *mixed) == reason
    options = (torch.tensor([1]), 0.5, "gelu")
    assert cuda.can_run("attention_scores", *pool[:9], *options) is None
    assert cuda.can_run("gated_attention_pool_backward", None, None, *pool[:9], *options, weight, [True] * 7) is None
    assert cuda.can_run("pool_by_scores", half.float(), half, None, None) is None
    assert cuda.can_run("pool_by_scores_backward", half, half.float(), half, None, None, [True] * 2) is None
    assert cuda.can_run("pool_by_scores", half, half, None, None) == "it pools by float32 scores; got torch.bfloat16"
    assert cuda.can_run("another", half) == "it has no kernel for another"
    for dtype, features in zip((torch.bfloat16, torch.float32), most):
        fits, wide = (torch.ones(1, d, 2, dtype=dtype) for d in (features, features + 1))
        assert cuda.can_run("relu_affinity", wide, fits) is None
        assert cuda.can_run("relu_affinity_backward", wide, wide, fits, True) is None
        expected = f"it takes at most {features} features in {dtype} on this GPU; got {features + 1}"
        assert cuda.can_run("relu_affinity", half, wide) == expected
        assert cuda.can_run("relu_affinity_backward", half, half, wide, False) == expected


def test_kernels_are_chosen_by_the_environment(monkeypatch):
    monkeypatch.delenv("ERCN_CUDA_KERNELS", raising=False)
    assert cuda.kernels() == ""
    monkeypatch.setenv("ERCN_CUDA_KERNELS", "generic")
    assert cuda.kernels() == "generic"
    monkeypatch.setenv("ERCN_CUDA_KERNELS", "fast")
    with pytest.raises(ValueError, match="ERCN_CUDA_KERNELS is 'fast'; kernels are generic, sm90, sm90_dense"):
        cuda.kernels()
