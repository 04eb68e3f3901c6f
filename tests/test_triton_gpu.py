"""What only a GPU can show of the Triton kernels: streams, graphs, devices, repeats, maps beyond 2³¹ affinities."""

from __future__ import annotations

import pytest
import torch
from _ops import assert_within_budget, randn
from test_affinity import off_kink

from ercn.ops import affinity_propagate, gated_attention_pool, relu_affinity, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(triton.DEVICE != "cuda", reason="the interpreter has replaced the GPU in this process"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    out = relu_affinity(*leaves, backend="triton")
    return out, *torch.autograd.grad(out, leaves, torch.cos(value))


def pool_run(*arguments):
    leaves = [x.detach().requires_grad_() for x in arguments]
    pooled, scores = gated_attention_pool(*leaves, backend="triton")
    return pooled, scores, *torch.autograd.grad((pooled, scores), leaves, (torch.cos(pooled), torch.cos(scores)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, dim", [(4099, 192), (16384, 192), (16385, 64), (3136, 512)], ids=str)
def test_affinity_at_real_sizes_within_budget(n, dim, dtype):
    value, feat = affinity_inputs(n, dim, dtype=dtype)
    plain = value.to(dtype) @ torch.relu(feat.mT @ feat)
    exact = torch.cat([value.double() @ torch.relu(feat.double().mT @ x.double()) for x in feat.split(2048, -1)], -1)
    assert_within_budget(relu_affinity(value, feat, backend="triton").cpu(), plain.cpu(), exact.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 192, 300])
def test_affinity_gradients_at_real_sizes_within_budget(dim, dtype):
    value, grad = (randn(1, 22, 3137, seed=s).cuda() for s in (1, 2))
    feat = off_kink(1, dim, 3137).to(dtype).cuda()
    results = []
    for cast, function in (
        (dtype, lambda v, f: relu_affinity(v.float(), f, backend="triton")),
        (dtype, lambda v, f: v @ torch.relu(f.mT @ f)),
        (torch.float64, lambda v, f: v @ torch.relu(f.mT @ f)),
    ):
        leaves = [x.to(cast).requires_grad_() for x in (value, feat)]
        out = function(*leaves)
        results.append(torch.autograd.grad(out, leaves, grad.to(out.dtype)))
    for ours, plain, exact in zip(*results):
        assert_within_budget(ours.cpu(), plain.cpu(), exact.cpu())


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
    """No length is read on the host, so other bags of the same total replay."""
    h, *weights = pool_inputs()
    bounds = torch.tensor([0, 10, 2000, 5003], device="cuda")

    def step():
        return gated_attention_pool(h[0], *weights, cu_seqlens=bounds, backend="triton")

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
    value, feat = affinity_inputs(n=1024)
    cam = value.view(1, 22, 32, 32)
    compiled = torch.compile(
        lambda c, f: affinity_propagate(c, f, backend="triton"), fullgraph=True, mode="reduce-overhead"
    )
    eager = affinity_propagate(cam, feat.view(1, -1, 32, 32), backend="triton")
    for _ in range(3):
        assert torch.allclose(compiled(cam, feat.view(1, -1, 32, 32)), eager, rtol=1e-2, atol=1e-4)


def test_more_than_2_31_affinities():
    """256² pixels, a batch of two: 2³³ affinities. Columns are checked against float64; memory is bounded."""
    n = 256**2
    generator = torch.Generator("cuda").manual_seed(0)
    feat = torch.randn(2, 192, n, device="cuda", generator=generator)
    feat = (feat / feat.norm(dim=1, keepdim=True)).bfloat16().requires_grad_()
    value = torch.rand(2, 22, n, device="cuda", generator=generator).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = relu_affinity(value, feat, backend="triton")
    grad_value, grad_feat = torch.autograd.grad(out.sum(), (value, feat))
    assert torch.cuda.max_memory_allocated() - before < 800e6  # 400 MB a picture
    at = torch.tensor([0, 1, n // 2, n - 1], device="cuda")
    with torch.no_grad():
        f, v = feat.double(), value.double()
        affinity = torch.relu(f.mT @ f[..., at])
        exact = v @ affinity
        assert ((out[..., at] - exact).abs() <= 2e-3 * exact.abs().max()).all()
        exact = affinity.sum(1, keepdim=True).expand_as(exact)
        assert ((grad_value[..., at] - exact).abs() <= 2e-3 * exact.abs().max()).all()
        totals = v.sum(1)
        w = (affinity > 0) * (totals[:, :, None] + totals[:, None, at])
        exact = f @ w
        assert ((grad_feat[..., at] - exact).abs() <= 1e-2 * exact.abs().max()).all()


def test_tool_measures_candidates():
    from ercn.kernels import configs, tune
    from ercn.kernels.table import TABLE

    arch = configs.family(configs.arch(torch.device("cuda", 0)))
    before = dict(TABLE[arch]["forward"]["half"])
    rows = [before[64], (4, 2, 64, 32, 32, 1, True)]
    assert tune.fastest(arch, "forward", "half", 64, rows) in rows
    assert TABLE[arch]["forward"]["half"] == before
