"""The affinity ops against SEAM's published code, plain torch in float64, and properties every backend must have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _affinity import by_formula, dense, dense_affinity, dense_propagate, gradients, least_lucky, off_kink
from _ops import assert_within_budget, backends_of, error, finite_parts, golden, layouts, randn, require
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ercn
from ercn.ops import affinity_propagate, relu_affinity

pytestmark = pytest.mark.parametrize("backend", backends_of("relu_affinity"))

# B, C, D, N: ones, primes, powers of two plus or minus one, the widths of the model.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 6, 64, 127), (3, 1, 192, 129), (1, 22, 192, 196)]
SHAPES += [(2, 5, 512, 33), (1, 2, 3, 257)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ["pcm_small", "pcm_seam_width", "pcm_relu_features"])
def test_matches_published_seam(backend, name):
    data = golden(name)
    require(backend, "relu_affinity", data["cam"], data["feat"])
    cam, feat = data["cam"].requires_grad_(), data["feat"].requires_grad_()
    out = affinity_propagate(cam, feat, backend=backend)
    grad_cam, grad_feat = torch.autograd.grad(out, (cam, feat), data["grad_out"])
    assert error(out, data["out"]) < 1e-12
    assert error(grad_cam, data["grad_cam"]) < 1e-12
    assert error(grad_feat, data["grad_feat"]) < 1e-10  # sums of N terms that cancel
    lower = affinity_propagate(cam.float(), feat.float(), backend=backend)
    plain = dense_propagate(cam.float().flatten(2), feat.float().flatten(2)).view_as(lower)
    assert_within_budget(lower, plain, data["out"], channels=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_within_budget(backend, shape, dtype):
    b, c, d, n = shape
    value, grad = randn(b, c, n, seed=1), randn(b, c, n, seed=2)
    feat = off_kink(b, d, n).to(dtype).double()  # exact in the dtype
    require(backend, "relu_affinity", value, feat.to(dtype))
    out = relu_affinity(value.float() if dtype != torch.float64 else value, feat.to(dtype), backend=backend)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.is_contiguous()
    wide = out.dtype
    ours = gradients(lambda v, f: relu_affinity(v, f, backend=backend), grad.to(wide), value.to(wide), feat.to(dtype))
    exact = dense_affinity(value, feat, grad)
    plain = least_lucky(value.to(dtype), feat.to(dtype), grad.to(dtype), exact)
    for mine, torchs, truth in zip((out, *ours), plain, exact):
        assert_within_budget(mine, torchs, truth, channels=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "offset", "expanded"])
def test_any_strides(backend, layout):
    value, feat, grad = (layouts(randn(2, k, 11, seed=k))[layout] for k in (3, 5, 4))
    grad = grad[:, :3]
    require(backend, "relu_affinity", value, feat)
    assert error(relu_affinity(value, feat, backend=backend), dense(value, feat)) < 1e-14
    leaves = value.requires_grad_(), feat.requires_grad_()
    ours = torch.autograd.grad(relu_affinity(*leaves, backend=backend), leaves, grad)
    exact = torch.autograd.grad(dense(*leaves), leaves, grad)
    assert all(error(a, e) < 1e-13 for a, e in zip(ours, exact))


def test_maps_and_channels_last_maps(backend):
    cam, feat = randn(2, 3, 4, 6, seed=1), randn(2, 8, 4, 6, seed=2)
    flat = affinity_propagate(cam.flatten(2), feat.flatten(2), backend=backend).view_as(cam)
    last = feat.to(memory_format=torch.channels_last)
    assert torch.equal(affinity_propagate(cam, feat, backend=backend), flat)
    assert error(affinity_propagate(cam, last, backend=backend), flat) < 1e-14


def test_upstream_gradient_may_be_expanded(backend):
    value, feat = randn(1, 2, 9, seed=1).requires_grad_(), randn(1, 3, 9, seed=2).requires_grad_()
    relu_affinity(value, feat, backend=backend).sum().backward()  # a gradient of stride 0
    exact = gradients(dense, torch.ones(1, 2, 9).double(), value, feat)
    assert error(value.grad, exact[0]) < 1e-13 and error(feat.grad, exact[1]) < 1e-13


@pytest.mark.parametrize("need", [(True, False), (False, True), (True, True)], ids=str)
def test_only_gradients_asked_for(backend, need):
    value, feat, grad = randn(2, 3, 10, seed=1), randn(2, 4, 10, seed=2), randn(2, 3, 10, seed=3)
    exact = gradients(dense, grad, value, feat)
    leaves = [x.requires_grad_(n) for x, n in zip((value, feat), need)]
    with FlopCounterMode(display=False) as flops:
        relu_affinity(*leaves, backend=backend).backward(grad)
    for leaf, n, truth in zip(leaves, need, exact):
        assert (leaf.grad is not None) == n
        assert not n or error(leaf.grad, truth) < 1e-13
    n2 = 2 * 2 * 10 * 10
    forward, only_value = n2 * (4 + 3), n2 * (4 + 3)
    with_feat = n2 * (2 * 4 + 2 * 3 + (3 if need[0] else 0))
    assert flops.get_total_flops() == forward + (with_feat if need[1] else only_value)


def test_gradcheck(backend):
    value, feat = randn(2, 3, 7, seed=1).requires_grad_(), off_kink(2, 4, 7, seed=2).requires_grad_()
    require(backend, "relu_affinity", value, feat)
    assert torch.autograd.gradcheck(lambda v, f: relu_affinity(v, f, backend=backend), (value, feat), nondet_tol=0.0)
    assert torch.autograd.gradcheck(lambda v, f: affinity_propagate(v, f, steps=2, backend=backend), (value, feat))


def test_opcheck(backend):
    value, feat, grad = randn(2, 3, 7, seed=1), randn(2, 4, 7, seed=2), randn(2, 3, 7, seed=3)
    samples = [(value, feat), (value.requires_grad_(), feat.requires_grad_()), (value[:, :, :0], feat[:, :, :0])]
    for sample in samples:
        torch.library.opcheck(torch.ops.ercn.relu_affinity.default, (*sample, backend))
    for need_value in (True, False):
        arguments = (grad, value.detach(), feat.detach(), need_value, backend)
        torch.library.opcheck(torch.ops.ercn.relu_affinity_backward.default, arguments)


def test_compile_with_dynamic_pixels_does_not_recompile(backend):
    torch._dynamo.reset()  # another backend's graph of the same code counts as a recompile

    def step(cam, feat):
        return affinity_propagate(cam, feat, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (12, 35, 64):
            cam, feat = randn(2, 3, n, seed=n).requires_grad_(), randn(2, 5, n, seed=n + 1).requires_grad_()
            ours, eager = compiled(cam, feat), step(cam, feat)
            assert error(ours, eager) < 1e-12
            for a, e in zip(*(torch.autograd.grad(x.sum(), (cam, feat)) for x in (ours, eager))):
                assert error(a, e) < 1e-12 or e.abs().max() < 1e-9


def test_export(backend):
    class Module(torch.nn.Module):
        def forward(self, cam, feat):
            return affinity_propagate(cam, feat, backend=backend)

    pixels = torch.export.Dim("pixels", min=2, max=4096)
    shapes = {"cam": {2: pixels}, "feat": {2: pixels}}
    program = torch.export.export(Module(), (randn(1, 2, 20), randn(1, 4, 20)), dynamic_shapes=shapes)
    cam, feat = randn(1, 2, 33, seed=1), randn(1, 4, 33, seed=2)
    assert torch.equal(program.module()(cam, feat), affinity_propagate(cam, feat, backend=backend))


def test_vmap(backend):
    value, feat = randn(5, 2, 3, 7, seed=1).requires_grad_(), randn(2, 4, 7, seed=2).requires_grad_()
    mapped = torch.vmap(lambda v, f: relu_affinity(v, f, backend=backend), in_dims=(0, None))(value, feat)
    looped = torch.stack([relu_affinity(v, feat, backend=backend) for v in value])
    assert error(mapped, looped) < 1e-14
    grad = randn(*mapped.shape, seed=3)
    ours = torch.autograd.grad(mapped, (value, feat), grad)
    assert all(error(a, e) < 1e-13 for a, e in zip(ours, torch.autograd.grad(looped, (value, feat), grad)))
    across = torch.vmap(lambda v, f: relu_affinity(v, f, backend=backend), in_dims=(2, 1))
    columns = across(value.movedim(0, 2).contiguous(), feat.unsqueeze(1).expand(2, 5, 4, 7))
    assert error(columns, looped) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_features_only(backend, dtype):
    cam, feat = randn(1, 3, 25, seed=1, dtype=torch.float32), randn(1, 16, 25, seed=2, dtype=torch.float32)
    require(backend, "relu_affinity", cam, feat.to(dtype))
    leaves = cam.requires_grad_(), feat.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = relu_affinity(*leaves, backend=backend)
    assert out.dtype == torch.float32
    assert torch.equal(out, relu_affinity(cam, feat.to(dtype), backend=backend))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))
    doubles = cam.double(), feat.double()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(relu_affinity(*doubles, backend=backend), relu_affinity(*doubles, backend=backend))
        assert relu_affinity(*doubles, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_constant_stays_and_range_is_kept(backend, dtype):
    feat = randn(2, 16, 61, dtype=dtype)
    require(backend, "relu_affinity", feat.float(), feat)
    constant = torch.full((2, 3, 61), 0.7)
    # The row of ones has the same rounded affinities: the error is eps / row sum <= 1e-5 and rounding.
    assert error(affinity_propagate(constant, feat, backend=backend), constant.double()) < 2e-5
    cam = torch.rand(2, 3, 61, generator=torch.Generator().manual_seed(0))
    out = affinity_propagate(cam, feat, backend=backend)
    low, high = cam.amin(-1, keepdim=True), cam.amax(-1, keepdim=True)
    assert (out >= low * (1 - 2e-5) - 1e-6).all() and (out <= high + 1e-6).all()


def test_commutes_with_pixel_permutation(backend):
    cam, feat = randn(1, 3, 50, seed=1), randn(1, 8, 50, seed=2)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    permuted = affinity_propagate(cam[..., order], feat[..., order], backend=backend)
    assert error(permuted, affinity_propagate(cam, feat, backend=backend)[..., order]) < 1e-13


def test_self_adjoint_and_linear(backend):
    a, b, feat = randn(1, 3, 40, seed=1), randn(1, 3, 40, seed=2), randn(1, 8, 40, seed=3)
    ya, yb = relu_affinity(a, feat, backend=backend), relu_affinity(b, feat, backend=backend)
    assert abs((ya * b).sum() - (a * yb).sum()) < 1e-11 * (ya * b).abs().sum()
    assert error(relu_affinity(2 * a - b, feat, backend=backend), 2 * ya - yb) < 1e-13


def test_steps_repeat_the_propagation(backend):
    cam, feat = randn(1, 2, 30, seed=1), randn(1, 8, 30, seed=2)
    once = affinity_propagate(cam, feat, backend=backend)
    twice = affinity_propagate(once, feat, backend=backend)
    assert error(affinity_propagate(cam, feat, steps=2, backend=backend), twice) < 1e-14


def test_unnormalised_features_and_output_dtype(backend):
    cam, feat = randn(1, 2, 30, seed=1, dtype=torch.float16), randn(1, 8, 30, seed=2, dtype=torch.float32)
    out = affinity_propagate(cam, feat, normalize=False, backend=backend)
    affinity = torch.relu(feat.mT @ feat)
    expected = (cam.float() @ affinity) / (affinity.sum(1, keepdim=True) + 1e-5)
    assert out.dtype == torch.float16
    assert error(out, expected.double()) < 2e-3  # float16 rounding of the result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zero_features_give_zero_and_finite_gradients(backend, dtype):
    cam = torch.ones(1, 2, 9, requires_grad=True)
    feat = torch.zeros(1, 4, 9, dtype=dtype, requires_grad=True)
    require(backend, "relu_affinity", cam, feat)
    out = affinity_propagate(cam, feat, backend=backend)
    assert torch.equal(out, torch.zeros_like(cam))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (cam, feat)))


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 3, 0), (2, 0, 3, 5)], ids=str)
def test_empty(backend, shape):
    b, c, d, n = shape
    value, feat = torch.ones(b, c, n, requires_grad=True), torch.ones(b, d, n, requires_grad=True)
    out = relu_affinity(value, feat, backend=backend)
    assert out.shape == (b, c, n)
    grads = torch.autograd.grad(out.sum(), (value, feat))
    assert grads[0].shape == value.shape and torch.equal(grads[1], torch.zeros_like(feat))


def test_no_feature_channels(backend):
    assert torch.equal(relu_affinity(torch.ones(1, 2, 5), torch.ones(1, 0, 5), backend=backend), torch.zeros(1, 2, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["value", "feat"])
def test_nan_and_inf_propagate_as_in_torch(backend, where, bad):
    value, feat, grad = randn(1, 2, 20, seed=1), randn(1, 4, 20, seed=2), randn(1, 2, 20, seed=3)
    {"value": value, "feat": feat}[where][0, 1, 7] = bad
    ours = relu_affinity(value, feat, backend=backend), *gradients(
        lambda v, f: relu_affinity(v, f, backend=backend), grad, value, feat
    )
    for a, e in zip(ours, by_formula(grad, value, feat)):
        assert torch.allclose(*finite_parts(a, e), rtol=1e-12, atol=1e-12)


def test_two_runs_are_bit_equal(backend):
    value, feat, grad = (randn(2, k, 301, seed=k, dtype=torch.float32) for k in (4, 33, 5))
    runs = [
        (relu_affinity(value, feat, backend=backend), *gradients(
            lambda v, f: relu_affinity(v, f, backend=backend), grad[:, :4], value, feat
        ))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_checkpointing_and_retained_graphs(backend):
    value, feat = randn(1, 2, 15, seed=1).requires_grad_(), randn(1, 4, 15, seed=2).requires_grad_()

    def step(v, f):
        return torch.softmax(affinity_propagate(v, f, backend=backend), dim=1)

    plain = torch.autograd.grad(step(value, feat).square().sum(), (value, feat))
    again = torch.autograd.grad(checkpoint(step, value, feat, use_reentrant=False).square().sum(), (value, feat))
    loss = step(value, feat).square().sum()
    first = torch.autograd.grad(loss, (value, feat), retain_graph=True)
    second = torch.autograd.grad(loss, (value, feat))
    for grads in (again, first, second):
        assert all(torch.equal(a, b) for a, b in zip(plain, grads))


PEAK = """
import re, sys
from pathlib import Path
import torch
from ercn.ops import relu_affinity

def high_water():  # of this program; ru_maxrss starts at that of the parent process
    return 1024 * int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

backend, n, backward, path = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
warm = torch.ones(1, 1, 2, requires_grad=True)
relu_affinity(warm, warm, backend=backend).sum().backward()
feat = torch.randn(1, 2, n, generator=torch.Generator().manual_seed(0)).requires_grad_(backward)
value = torch.ones(1, 1, n, requires_grad=backward)
before = high_water()
out = relu_affinity(value, feat, backend=backend)
if backward:
    out.sum().backward()
peak = high_water() - before
torch.save({"feat": feat.detach(), "out": out.detach(), "grad": feat.grad, "bytes": peak}, path)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the memory of a process")
@pytest.mark.parametrize("n, backward", [(256 * 256, False), (128 * 128, True)], ids=["forward", "backward"])
def test_many_pixels_need_no_square_buffer(backend, n, backward, tmp_path):
    """In its own process: a later peak below the highest of the process is not visible."""
    path = tmp_path / "result.pt"
    environment = os.environ | {"PYTHONPATH": str(Path(ercn.__file__).parents[1])}
    command = [sys.executable, "-c", PEAK, backend, str(n), str(backward), str(path)]
    subprocess.run(command, env=environment, check=True)
    result = torch.load(path)
    assert result["bytes"] < n * n * 4 / 4  # N×N in float32 is 17 GB and 1 GB
    probe = torch.tensor([0, 1, n // 2, n - 1])
    f = result["feat"].double()
    assert error(result["out"][..., probe], torch.relu(f.mT @ f[..., probe]).sum(1).unsqueeze(1)) < 1e-5
    if backward:  # V = G = 1: W = 2·1[T>0]
        expected = 2 * f @ (f.mT @ f[..., probe] > 0).double()
        assert error(result["grad"][..., probe], expected) < 1e-4  # T near 0 may round to either side


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_stride_property(backend, data):
    b, c, d, n = (data.draw(st.integers(low, high), label=k) for k, low, high in
                  (("B", 1, 3), ("C", 1, 9), ("D", 1, 70), ("N", 1, 140)))
    kind = data.draw(st.sampled_from(["contiguous", "channels_last", "strided", "offset"]), label="layout")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), label="dtype")
    value = layouts(randn(b, c, n, seed=1, dtype=dtype))[kind]
    feat = layouts(randn(b, d, n, seed=2, dtype=dtype))[kind]
    ours = relu_affinity(value, feat, backend=backend)
    assert_within_budget(ours, dense(value, feat), dense(value.double(), feat.double()), channels=True)


def test_errors_say_what_was_given(backend):
    ok = torch.ones(1, 2, 4)
    for value, feat, words in [
        (ok, torch.ones(1, 3, 5), r"got value \[1, 2, 4\], feat \[1, 3, 5\]"),
        (ok, torch.ones(2, 3, 4), r"\[B, C, N\]"),
        (ok, torch.ones(3, 4), r"\[B, C, N\]"),
        (ok.int(), torch.ones(1, 3, 4), "int32"),
        (ok, torch.ones(1, 3, 4, device="meta"), "meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            relu_affinity(value, feat, backend=backend)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        affinity_propagate(ok, ok, steps=0, backend=backend)
