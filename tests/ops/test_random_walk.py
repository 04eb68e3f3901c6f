"""The random walk and its affinities against the published code of PSA and IRN, and against the dense matrix."""

from __future__ import annotations

import pytest
import torch
from _ops import assert_within_budget, backends_of, error, golden, randn
from _refinement import drawn_walk, half_disc, transition, walked, with_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ercn.ops import edge_affinity, feature_affinity, random_walk

backends = pytest.mark.parametrize("backend", backends_of("random_walk"))

# B, C, H, W and radius: one pixel, one row, one column, primes, more maps than one group, a disc beyond the picture.
CASES = [
    ((1, 1, 1, 1), 2),
    ((2, 3, 1, 13), 3),
    ((1, 4, 11, 1), 5),
    ((2, 9, 7, 5), 5),
    ((1, 21, 6, 37), 2),
    ((1, 2, 3, 4), 9),
]


@pytest.mark.parametrize("case", ["small", "published"])
@backends
def test_matches_published_irn(backend, case):
    data = {key.removeprefix(case + "_"): x for key, x in golden("irn").items() if key.startswith(case)}
    radius, beta, steps = int(data["radius"]), int(data["beta"]), 2 ** int(data["exp_times"])
    edge = data["edge"].unsqueeze(0)

    def walk(cam):
        affinity = edge_affinity(edge.to(cam.dtype), radius)
        return random_walk(cam * (1 - edge), affinity, radius=radius, beta=beta, steps=steps, backend=backend)

    cam, grad, *truth = (data[name].unsqueeze(0) for name in ("cam", "grad_out", "out", "grad_cam"))
    assert all(error(a, e) < 1e-12 for a, e in zip(with_gradient(walk, cam, grad), truth))


@pytest.mark.parametrize("case", ["small", "published"])
@backends
def test_matches_published_psa(backend, case):
    data = golden("psa")
    affinity = feature_affinity(data["feat"].unsqueeze(0))
    assert error(affinity[0, :, :-4, 4:-4], data["pairs"]) < 1e-14
    options = {"beta": 8, "steps": 4 if case == "small" else 256, "backend": backend}
    cam, grad, *truth = (
        data[name].unsqueeze(0) for name in ("cam", "grad_out", f"{case}_out", f"{case}_grad_cam")
    )
    ours = with_gradient(lambda x: random_walk(x, affinity, **options), cam, grad)
    assert all(error(a, e) < 1e-12 for a, e in zip(ours, truth))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes, radius", CASES, ids=str)
@backends
def test_forward_and_gradient_within_budget(backend, sizes, radius, dtype):
    value, affinity, grad = drawn_walk(*sizes, radius, dtype)
    options = {"radius": radius, "beta": 3.5, "steps": 3, "backend": backend}
    pairs = affinity.to(dtype)
    ours = with_gradient(lambda x: random_walk(x, pairs, **options), value.to(dtype), grad.to(dtype))
    wide = dtype if dtype == torch.float64 else torch.float32
    plain, exact = (
        with_gradient(lambda x: walked(x, affinity.to(x.dtype), radius, 3.5, 3), value.to(kind), grad.to(kind))
        for kind in (wide, torch.float64)
    )
    for mine, torchs, truth in zip(ours, plain, exact):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert_within_budget(mine, torchs, truth)


@backends
def test_constants_stay_and_neighbours_beyond_the_border_are_not_read(backend):
    """Columns of T sum to 1; the affinities of pairs beyond the border have no effect."""
    value, affinity, grad = drawn_walk(1, 2, 6, 5, 3)
    outside = affinity.clone()
    for p, (dy, dx) in enumerate(half_disc(3)):
        outside[:, p, 6 - dy :] = float("nan")
        outside[:, p, :, : max(0, -dx)] = outside[:, p, :, 5 - max(0, dx) :] = float("inf")
    assert outside.isnan().any() and outside.isinf().any()
    walks = [
        with_gradient(lambda x, a=a: random_walk(x, a, radius=3, steps=7, backend=backend), value, grad)
        for a in (affinity, outside)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*walks))
    constant = random_walk(torch.full_like(value, 0.7), affinity, radius=3, steps=7, backend=backend)
    torch.testing.assert_close(constant, torch.full_like(value, 0.7))


@backends
def test_any_strides(backend):
    value, affinity, grad = drawn_walk(2, 3, 6, 7, 3)
    options = {"radius": 3, "steps": 2, "backend": backend}
    expected = with_gradient(lambda x: random_walk(x, affinity, **options), value, grad)
    for layout in (lambda x: x.mT.contiguous().mT, lambda x: x.to(memory_format=torch.channels_last)):
        leaf = layout(value).requires_grad_()
        out = random_walk(leaf, layout(affinity), **options)
        assert error(out, expected[0]) < 1e-14 and out.is_contiguous()  # torch's pow rounds depending on the layout
        assert error(torch.autograd.grad(out, leaf, layout(grad))[0], expected[1]) < 1e-14
    assert torch.equal(random_walk(value, affinity, radius=3, steps=0, backend=backend), value)


@backends
def test_gradients_of_gradients(backend):
    value, affinity, grad = drawn_walk(1, 2, 4, 3, 2)

    def walk(x):
        return random_walk(x, affinity, radius=2, beta=2, steps=3, backend=backend)

    assert torch.autograd.gradcheck(walk, value.requires_grad_(), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(walk, value, grad.requires_grad_(), nondet_tol=0.0)


@backends
def test_opcheck(backend):
    value, affinity, _ = drawn_walk(1, 2, 4, 3, 2)
    for op in (torch.ops.ercn.random_walk.default, torch.ops.ercn.random_walk_backward.default):
        for map_ in (value.clone().requires_grad_(), value.float().to(memory_format=torch.channels_last)):
            torch.library.opcheck(op, (map_, affinity, 2, 8.0, 3, backend))


@backends
def test_compile_export_and_vmap(backend):
    torch._dynamo.reset()

    class Module(torch.nn.Module):
        def forward(self, cam, edge):
            return random_walk(cam * (1 - edge), edge_affinity(edge, 3), radius=3, steps=4, backend=backend)

    cam, edge = randn(2, 3, 6, 7, seed=1), randn(2, 1, 6, 7, seed=2).sigmoid()
    eager = Module()(cam, edge)
    compiled = torch.compile(Module(), fullgraph=True, dynamic=True, backend="aot_eager")
    assert error(compiled(cam, edge), eager) < 1e-13
    assert error(torch.export.export(Module(), (cam, edge)).module()(cam, edge), eager) < 1e-13
    pairs = edge_affinity(edge, 3)

    def walk(value, affinity):
        return random_walk(value, affinity, radius=3, steps=4, backend=backend)

    each = torch.vmap(lambda v, a: walk(v.unsqueeze(0), a.unsqueeze(0)))(cam, pairs)
    assert torch.equal(each.squeeze(1), walk(cam, pairs))
    shared = torch.vmap(walk, in_dims=(1, None))(cam.unsqueeze(2), pairs)
    assert torch.equal(shared.squeeze(2), walk(cam, pairs).transpose(0, 1))


@backends
def test_flops_autocast_and_bits(backend):
    value, affinity, grad = (x.float() for x in drawn_walk(1, 3, 23, 29, 5))
    with FlopCounterMode(display=False) as counter:
        first = with_gradient(lambda x: random_walk(x, affinity, steps=9, backend=backend), value, grad)
    assert counter.get_total_flops() == 2 * (2 * 9 * 69 * 3 * 23 * 29)
    with torch.autocast("cpu", torch.bfloat16):
        second = with_gradient(lambda x: random_walk(x, affinity, steps=9, backend=backend), value, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@backends
def test_nan_reaches_whom_it_concerns(backend):
    value, affinity, _ = drawn_walk(1, 2, 9, 35, 3)
    value[0, 1, 8, 34] = float("nan")
    out = random_walk(value, affinity, radius=3, steps=2, backend=backend)
    reached = transition(affinity, 3, 1.0)[0, :, -1] > 0
    reached = (transition(affinity, 3, 1.0)[0][reached] > 0).any(0).view(9, 35)
    assert torch.equal(out[0, 1].isnan(), reached) and not out[0, 0].isnan().any()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
@backends
def test_any_shape_property(backend, data):
    b, c, h, w = (data.draw(st.integers(1, most), label=name) for name, most in
                  (("B", 2), ("C", 19), ("H", 9), ("W", 40)))
    radius = data.draw(st.integers(2, 6), label="radius")
    value, affinity, grad = drawn_walk(b, c, h, w, radius)
    ours = with_gradient(lambda x: random_walk(x, affinity, radius=radius, steps=2, backend=backend), value, grad)
    exact = with_gradient(lambda x: walked(x, affinity, radius, 8, 2), value, grad)
    assert all(error(a, e) < 1e-12 for a, e in zip(ours, exact))


@backends
def test_what_is_refused(backend):
    value, affinity, tangent = drawn_walk(1, 2, 4, 5, 2)
    options = {"radius": 2, "steps": 1, "backend": backend}
    for v, a, words in [
        (torch.zeros(()), affinity, r"got \[\] and"),
        (value, affinity[:, :3], r"affinity \[B, 4, H, W\] for radius 2; got \[1, 2, 4, 5\] and \[1, 3, 4, 5\]"),
        (value, affinity.mT, r"got .* and \[1, 4, 5, 4\]"),
        (value[0], affinity, r"got \[2, 4, 5\]"),
        (value[:, :0], affinity, "not empty"),
        (value.int(), affinity, "floating point; got torch.int32"),
        (value, affinity.to("meta"), "one device"),
    ]:
        with pytest.raises(ValueError, match=words):
            random_walk(v, a, **options)
    for setting, words in [({"radius": 1}, "got 1"), ({"beta": 0}, "above 0; got 0"), ({"steps": -1}, "got -1")]:
        with pytest.raises(ValueError, match=words):
            random_walk(value, affinity, **options | setting)
    with pytest.raises(NotImplementedError, match=r"no gradient of affinity.*pass affinity.detach\(\)"):
        random_walk(value, affinity.clone().requires_grad_(), **options)
    with pytest.raises(NotImplementedError, match="random_walk has no forward-mode derivative"):
        torch.func.jvp(lambda x: random_walk(x, affinity, **options), (value,), (tangent,))


def test_affinities_by_hand_and_their_gradients():
    feat = randn(1, 3, 6, 9, seed=1)
    order = torch.randperm(54, generator=torch.Generator().manual_seed(2))
    edge = (order.double() / 54).view(1, 1, 6, 9)  # all different, so that the maximum has a gradient
    pairs, lines = feature_affinity(feat, 3), edge_affinity(edge, 3)
    p = half_disc(3).index((2, -1))
    expected = torch.exp(-(feat[0, :, 1, 4] - feat[0, :, 3, 3]).abs().mean())
    torch.testing.assert_close(pairs[0, p, 1, 4], expected)
    corners = [(1, 6), (3, 4)]  # one pixel and more from the diagonal from (1, 4) to (3, 6)
    on_line = [(y, x) for y in (1, 2, 3) for x in (4, 5, 6) if (y, x) not in corners]
    for largest in range(9):
        marked = edge.clone()
        marked[0, 0, 1 + largest // 3, 4 + largest % 3] = 0.999
        value = edge_affinity(marked, 3)[0, half_disc(3).index((2, 2)), 1, 4]
        torch.testing.assert_close(value, 1 - max(marked[0, 0, y, x] for y, x in on_line))
    assert (lines[0, p, 4:] == 0).all() and (lines[0, p, :, 0] == 0).all()  # beyond the border
    assert (pairs[..., :2] == 0).all() and (pairs[..., -2:] == 0).all() and (pairs[..., -2:, :] == 0).all()
    assert torch.autograd.gradcheck(lambda x: feature_affinity(x, 2), feat.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: edge_affinity(x, 3), edge.requires_grad_())
    with pytest.raises(ValueError, match=r"H above 4 and W above 8 for radius 5; got \[1, 3, 4, 9\]"):
        feature_affinity(feat[:, :, :4], 5)
    with pytest.raises(ValueError, match=r"feat must be \[B, D, H, W\].*got \[3, 6, 9\]"):
        feature_affinity(feat[0], 2)
    for function, x in ((feature_affinity, feat), (edge_affinity, edge)):
        with pytest.raises(ValueError, match="radius must be at least 2 pixels; got 1"):
            function(x, 1)
    with pytest.raises(ValueError, match=r"edge must be \[B, 1, H, W\]; got \[1, 3, 6, 9\]"):
        edge_affinity(feat)
