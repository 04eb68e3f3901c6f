"""Tests of the backends that need a GPU: streams, graphs, devices, repeats, more than 2³¹ affinities."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _affinity import dense, off_kink
from _gpu_backends import BACKENDS, DEVICE
from _ops import assert_within_budget, randn, require

from ercn.benchmarks.exact import affinity, differences, expected_affinity, found_affinity
from ercn.ops import affinity_propagate, gated_attention_pool, relu_affinity, use_backend

if DEVICE != "cuda":
    pytest.skip("torch finds no GPU, or it is emulated in this process", allow_module_level=True)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# On Hopper also the kernels of other GPUs.
VARIANTS = [*BACKENDS]
if "cuda" in BACKENDS and torch.cuda.get_device_capability() == (9, 0):
    VARIANTS.append("cuda generic")


@pytest.fixture(autouse=True, params=VARIANTS)
def backend(request, monkeypatch):
    name, _, kernels = request.param.partition(" ")
    monkeypatch.setenv("ERCN_CUDA_KERNELS", kernels)
    with use_backend(name):
        yield name


def affinity_inputs(n=4099, dim=192, channels=22, dtype=torch.bfloat16, device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    feat = torch.randn(1, dim, n, device=device, generator=generator)
    value = torch.rand(1, channels, n, device=device, generator=generator)
    return value, (feat / feat.norm(dim=1, keepdim=True)).to(dtype)


def pool_inputs(n=5003, dim=256, hidden=128, heads=2, dtype=torch.bfloat16, device="cuda"):
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(3, n, dim), (hidden, dim), (hidden,), (hidden, dim), (hidden,), (heads, hidden), (heads,)]
    return [(torch.randn(shape, device=device, generator=generator) / shape[-1] ** 0.25).to(dtype) for shape in shapes]


def affinity_run(value, feat):
    """(out, grad_value, grad_feat)."""
    leaves = [x.detach().requires_grad_() for x in (value, feat)]
    out = relu_affinity(*leaves)
    return out, *torch.autograd.grad(out, leaves, torch.cos(value))


def pool_run(*arguments):
    leaves = [x.detach().requires_grad_() for x in arguments]
    pooled, scores = gated_attention_pool(*leaves)
    return pooled, scores, *torch.autograd.grad((pooled, scores), leaves, (torch.cos(pooled), torch.cos(scores)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, dim", [(4099, 192), (16384, 192), (16385, 64), (3136, 512)], ids=str)
def test_affinity_at_real_sizes_within_budget(backend, n, dim, dtype):
    value, feat = affinity_inputs(n, dim, dtype=dtype)
    require(backend, "relu_affinity", value, feat)
    plain = dense(value.to(dtype), feat)
    exact = torch.cat([value.double() @ torch.relu(feat.double().mT @ x.double()) for x in feat.split(2048, -1)], -1)
    assert_within_budget(relu_affinity(value, feat).cpu(), plain.cpu(), exact.cpu(), channels=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 192, 300])
def test_affinity_gradients_at_real_sizes_within_budget(dim, dtype):
    value, grad = (randn(1, 22, 3137, seed=s).cuda() for s in (1, 2))
    feat = off_kink(1, dim, 3137).to(dtype).cuda()
    results = []
    for cast, function in (
        (dtype, lambda v, f: relu_affinity(v.float(), f)),
        (dtype, dense),
        (torch.float64, dense),
    ):
        leaves = [x.to(cast).requires_grad_() for x in (value, feat)]
        out = function(*leaves)
        results.append(torch.autograd.grad(out, leaves, grad.to(out.dtype)))
    for ours, plain, exact in zip(*results):
        assert_within_budget(ours.cpu(), plain.cpu(), exact.cpu(), channels=True)


both_operators = pytest.mark.parametrize(
    "run, inputs", [(affinity_run, affinity_inputs), (pool_run, pool_inputs)], ids=["affinity", "pool"]
)


@both_operators
def test_250_repeats_are_bit_equal(run, inputs):
    arguments = inputs()
    first = run(*arguments)
    for _ in range(249):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*arguments)))


@both_operators
def test_two_streams_do_not_disturb_each_other(run, inputs):
    arguments = inputs()
    expected = run(*arguments)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(*arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for result in results for a, b in zip(expected, result))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@both_operators
def test_a_device_that_is_not_the_current_one(run, inputs):
    assert torch.cuda.current_device() == 0
    arguments = inputs(device="cuda:1")
    ours = run(*arguments)
    assert all(x.device == torch.device("cuda:1") for x in ours)
    with torch.cuda.device(1):
        assert all(torch.equal(a, b) for a, b in zip(ours, run(*arguments)))


def test_forward_and_backward_in_a_graph():
    value, feat = affinity_inputs()
    arguments = pool_inputs()

    def step():
        return *affinity_run(value, feat), *pool_run(*arguments)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    value.mul_(0.5)
    arguments[0].mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_ragged_bags_in_a_graph():
    """The host reads no length, so the graph replays with other bags of the same total."""
    h, *weights = pool_inputs()
    bounds = torch.tensor([0, 10, 2000, 5003], device="cuda")

    def step():
        return gated_attention_pool(h[0], *weights, cu_seqlens=bounds)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    bounds.copy_(torch.tensor([0, 0, 4999, 5003]))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_compiled_with_reduced_overhead():
    """The sums are exact; only the division may round differently."""
    cam, feat, _ = affinity(1, 22, 192, 32**2, torch.bfloat16, "cuda")
    compiled = torch.compile(
        lambda c, f: affinity_propagate(c, f, normalize=False), fullgraph=True, mode="reduce-overhead"
    )
    eager = affinity_propagate(cam, feat, normalize=False)
    for _ in range(3):
        assert torch.allclose(compiled(cam, feat), eager, rtol=1e-6, atol=1e-7)


def test_more_than_2_31_affinities():
    """256² pixels, a batch of two: 2³³ affinities, every output and gradient; memory is bounded."""
    value, feat, grad = affinity(2, 22, 192, 256**2, torch.bfloat16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = found_affinity(relu_affinity, value, feat, grad)
    assert torch.cuda.max_memory_allocated() - before < 800e6  # 400 MB a picture
    assert differences(found, expected_affinity(value, feat, grad)) is None


def test_first_call_of_a_process_is_a_backward(backend):
    command = [sys.executable, Path(__file__).with_name("first_backward.py"), backend, "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "None\n", result.stdout + result.stderr
