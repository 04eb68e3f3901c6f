"""The CPU kernels and the reference on inputs with exact results: all outputs and gradients are bit-equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _affinity import dense
from _exact import BAGS, check_affinity, check_pool
from _pool import scores_of, twin

from ercn.benchmarks.exact import (
    affinity,
    by_scores,
    differences,
    expected_affinity,
    expected_pool,
    expected_scores,
    found_affinity,
    found_pool,
    pool,
)
from ercn.ops import _extension
from ercn.ops._arguments import DIFFERENTIABLE

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["reference"]
if _extension.load() is None:
    BACKENDS += [f"cpu {isa}" for isa in _extension.cpu_info()["isas"]]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    name, _, isa = request.param.partition(" ")
    monkeypatch.setenv("ERCN_CPU_ISA", isa)
    return name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affinity(backend, dtype):
    check_affinity(backend, 1, 22, 64, 56**2, dtype=dtype)
    check_affinity(backend, 2, 5, 192, 259, dtype=dtype)
    check_affinity(backend, 1, 3, 512, 131, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_affinity_of_half_precision_maps(backend, dtype):
    check_affinity(backend, 2, 22, 64, 259, dtype=dtype, value_dtype=dtype)


best = pytest.mark.parametrize("backend", BACKENDS[-1:], indirect=True)


@best
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_affinity_at_sizes_of_use(backend, dtype):
    check_affinity(backend, 1, 22, 64, 96**2, dtype=dtype)
    for n in (128**2, 128**2 + 3):
        check_affinity(backend, 1, 22, 64, n, dtype=dtype, gradients=False)




@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BAGS)
def test_pool(backend, kind, dtype):
    for attention in ("one_hot", "uniform"):
        check_pool(backend, dim=65, hidden=40, heads=3, dtype=dtype, attention=attention, **BAGS[kind])
        check_pool(backend, dim=32, hidden=17, heads=1, dtype=dtype, attention=attention, gated=False, **BAGS[kind])
    check_pool(backend, dim=48, hidden=9, heads=2, dtype=dtype, bias=False, **BAGS[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [56, 96])
def test_pool_at_sizes_of_use(backend, side, dtype):
    check_pool(backend, side**2, 64, 128, 1, dtype, layout="channels_first")


@best
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pool_of_many_instances(backend, dtype):
    check_pool(backend, 128**2 + 3, 256, 128, 2, dtype)
    check_pool(backend, 128**2, 256, 128, 2, dtype, attention="uniform")


def test_expected_results_are_those_of_plain_torch():
    arguments = affinity(2, 5, 20, 70, torch.float64, value_dtype=torch.float64)
    assert differences(found_affinity(dense, *arguments), expected_affinity(*arguments)) is None
    for kinds in ({"attention": "one_hot"}, {"attention": "uniform"}, {"gated": False, "bias": False}):
        p = pool(64, 33, 20, 2, torch.float64, bags=2, **kinds)
        found = found_pool(lambda *inputs, mask, cu_seqlens: twin(*inputs), p)
        assert differences(found, expected_pool(p)) is None


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_expected_scores_with_dropout_are_those_of_plain_torch(activation):
    p = pool(64, 33, 20, 2, torch.float64, bags=2)
    dropped = [2 * (torch.rand(2, 64, 20, generator=torch.Generator().manual_seed(s)) < 0.5).double() for s in (0, 1)]
    expected = expected_scores(p, activation, [x.flatten(0, 1) for x in dropped])
    leaves = [x.clone().requires_grad_() for x in p.inputs]
    scores = scores_of(*leaves, activation=activation, dropped=dropped)
    assert torch.equal(scores, expected["scores"])
    for name, grad in zip(DIFFERENTIABLE, torch.autograd.grad(scores, leaves, p.grad_scores), strict=True):
        assert torch.equal(grad, expected[f"grad_{name}"])


def test_expected_pooling_by_scores_is_that_of_plain_torch():
    p = pool(37, 33, 20, 2, torch.float64, bags=2)
    scores, expected = by_scores(p)
    leaves = scores.requires_grad_(), p.h.clone().requires_grad_()
    pooled = torch.softmax(leaves[0], -1) @ leaves[1]
    grads = torch.autograd.grad(pooled, leaves, p.grad_pooled)
    found = {"pooled": pooled.detach(), "grad_scores": grads[0], "grad_value": grads[1]}
    assert expected["grad_scores"].count_nonzero() > 0 and differences(found, expected) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_instance_leads_and_every_gradient_shows_it(dtype):
    p = pool([1000, 0, 500], 64, 48, 3, dtype)
    expected = expected_pool(p)
    for scores in expected["scores"].double().split([1000, 500], dim=1):
        first, second = scores.topk(2).values.unbind(1)
        assert (first - second >= (1024 if dtype == torch.float64 else 128)).all()
    assert all(x.isfinite().all() and (x != 0).float().mean() > 0.4 for x in expected.values())
    means = expected_pool(pool([1024], 64, 48, 3, dtype, attention="uniform"))
    for name in ("pooled", "scores", "grad_h", "grad_w_weight", "grad_w_bias"):
        assert (means[name] != 0).float().mean() > 0.3, name


def test_differences_say_what_and_where():
    right = {"out": torch.zeros(2, 3), "grad": None}
    assert differences({"out": -torch.zeros(2, 3), "grad": None}, right) is None
    wrong = torch.tensor([[0.0, 0.0, float("nan")], [0.0, 2.0, 0.0]])
    sentence = "2 of 6 elements of out differ: nan instead of 0.0 at [0, 2], 2.0 instead of 0.0 at [1, 1]"
    assert differences({"out": wrong, "grad": wrong}, right) == f"{sentence}; grad is there, and should not be"
    assert differences({"out": wrong.half(), "grad": None}, right).startswith("out is torch.float16 [2, 3], not")


def test_inputs_that_would_not_be_exact_are_refused():
    with pytest.raises(ValueError, match="does not hold every integer above 256"):
        affinity(1, 129, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="3 real instances, not a power of two"):
        pool(3, 4, 4, 1, torch.float32, attention="uniform")
    with pytest.raises(ValueError, match="one_hot or uniform"):
        pool(4, 4, 4, 1, torch.float32, attention="sparse")


def test_a_backward_from_known_outputs():
    """The script that test_gpu_hardware.py runs in its own process."""
    for backend in {name.split()[0] for name in BACKENDS}:
        command = [sys.executable, Path(__file__).with_name("first_backward.py"), backend, "cpu"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.stdout == "None\n", result.stdout + result.stderr
