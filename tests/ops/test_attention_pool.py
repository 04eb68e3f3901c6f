"""Attention pooling against the published code of AMLab and CLAM and plain torch in float64, and its properties."""

from __future__ import annotations

import functools

import pytest
import torch
from _ops import assert_within_budget, backends_of, error, finite_parts, golden, layouts, randn, require
from _pool import gradients, inputs, leaf, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ercn.ops import gated_attention_pool
from ercn.ops._arguments import DIFFERENTIABLE

pytestmark = pytest.mark.parametrize("backend", backends_of("gated_attention_pool"))



@pytest.mark.parametrize("name", ["attention_gated", "attention_plain", "attention_gated_heads"])
def test_matches_published_code(backend, name):
    keys = {
        "attention_gated": ("attention_V.0", "attention_U.0", "attention_w"),
        "attention_plain": ("attention.0", None, "attention.2"),
        "attention_gated_heads": ("attention_a.0", "attention_b.0", "attention_c"),
    }[name]
    data = golden(name)
    parameter_keys = [None if k is None else f"{k}.{kind}" for k in keys for kind in ("weight", "bias")]
    leaves = [leaf(data["h"])] + [None if k is None else leaf(data[f"param.{k}"]) for k in parameter_keys]
    require(backend, "gated_attention_pool", leaves[0])
    pooled, scores = gated_attention_pool(leaves[0].unsqueeze(0), *leaves[1:], backend=backend)
    assert error(pooled[0], data["pooled"]) < 1e-12
    assert error(scores[0], data["scores"]) < 1e-12
    if "attention" in data:
        assert error(scores[0].softmax(-1), data["attention"]) < 1e-12
    expected = [data["grad_h"]] + [data[f"grad.{k}"] for k in parameter_keys if k is not None]
    for ours, theirs in zip(gradients(pooled[0], leaves, data["grad_pooled"]), expected):
        # The bias of w shifts all scores equally: its gradient is 0 up to rounding.
        assert error(ours, theirs) < 1e-11 or (ours - theirs).abs().max() < 1e-13


CASES = [(1, 1, 1, 1, 1), (2, 7, 5, 3, 2), (1, 129, 64, 31, 1), (3, 33, 100, 64, 4), (1, 257, 17, 128, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_within_budget(backend, case, gated, dtype):
    arguments = [None if x is None else x.to(dtype) for x in inputs(*case, gated=gated)]
    require(backend, "gated_attention_pool", arguments[0])
    results = []
    op = functools.partial(gated_attention_pool, backend=backend)
    for function, cast in ((op, dtype), (twin, dtype), (twin, torch.float64)):
        leaves = [None if x is None else leaf(x.to(cast)) for x in arguments]
        pooled, scores = function(*leaves)
        seeds = [randn(*t.shape, seed=s).to(t.dtype) for s, t in ((8, pooled), (9, scores))]
        results.append((pooled, scores, *gradients((pooled, scores), leaves, seeds)))
    ours, plain, exact = results
    assert ours[0].dtype == dtype
    assert ours[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, torchs, truth in zip(ours, plain, exact):
        assert_within_budget(mine, torchs, truth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "offset", "expanded"])
def test_any_strides(backend, layout):
    arguments = inputs(2, 11, 6, 5, heads=2)
    arguments[0] = layouts(arguments[0])[layout]
    arguments[1] = arguments[1].mT.contiguous().mT
    leaves = [x.requires_grad_() for x in arguments]
    pooled, scores = gated_attention_pool(*leaves, backend=backend)
    expected, expected_scores = twin(*leaves)
    assert error(pooled, expected) < 1e-13 and error(scores, expected_scores) < 1e-13
    pairs = (pooled, scores), (expected, expected_scores)
    ours, theirs = (gradients(p.sum() + s.square().sum(), leaves, None) for p, s in pairs)
    assert all(error(a, e) < 1e-12 for a, e in zip(ours, theirs))


def test_feature_map_view(backend):
    fmap = randn(2, 6, 4, 5, seed=3).requires_grad_()
    weights = inputs(2, 1, 6, 3)[1:]
    pooled, scores = gated_attention_pool(fmap.flatten(2).transpose(1, 2), *weights, backend=backend)
    assert pooled.shape == (2, 1, 6) and scores.shape == (2, 1, 20)
    expected = twin(fmap.flatten(2).mT, *weights)[0]
    assert error(pooled, expected) < 1e-13
    assert error(*(torch.autograd.grad(x.square().sum(), fmap)[0] for x in (pooled, expected))) < 1e-12


@pytest.mark.parametrize("index", range(7), ids=DIFFERENTIABLE)
def test_only_gradients_asked_for(backend, index):
    arguments = inputs(2, 9, 4, 3, heads=2)
    arguments[index] = arguments[index].requires_grad_()
    pooled, _ = gated_attention_pool(*arguments, backend=backend)
    expected = twin(*arguments)[0]
    grad = randn(2, 2, 4, seed=9)
    with FlopCounterMode(display=False) as flops:
        (ours,) = torch.autograd.grad(pooled, arguments[index], grad)
    (theirs,) = torch.autograd.grad(expected, arguments[index], grad)
    assert error(ours, theirs) < 1e-12 or (ours - theirs).abs().max() < 1e-14
    projection, narrow = 2 * 2 * 9 * 4 * 3 * 2, 2 * 2 * 9 * 2 * (3 + 4)
    assert flops.get_total_flops() == (2 if index in (0, 1, 3) else 1) * projection + 2 * narrow


@pytest.mark.parametrize("gated, forward, backward", [(True, 1368, 3600), (False, 936, 2304)], ids=["gated", "plain"])
def test_flops(backend, gated, forward, backward):
    """Projections 2·18·4·3 = 432 each, scores and pooling 2·18·2·(3 + 4) = 504. Backward: three times the
    projections (again, for the weights, for h), twice the others."""
    arguments = [x if x is None else x.requires_grad_() for x in inputs(2, 9, 4, 3, heads=2, gated=gated)]
    with FlopCounterMode(display=False) as flops:
        pooled, _ = gated_attention_pool(*arguments, backend=backend)
    assert flops.get_total_flops() == forward
    with FlopCounterMode(display=False) as flops:
        pooled.sum().backward()
    assert flops.get_total_flops() == backward


def test_gradient_through_either_output_alone(backend):
    leaves = [x.requires_grad_() for x in inputs(1, 8, 4, 3)]
    for pick in (0, 1):
        ours, theirs = (f(*leaves)[pick] for f in (lambda *a: gated_attention_pool(*a, backend=backend), twin))
        for a, e in zip(gradients(ours.square().sum(), leaves, None), gradients(theirs.square().sum(), leaves, None)):
            assert error(a, e) < 1e-12 or (a - e).abs().max() < 1e-13  # w_bias changes pooled by rounding only


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gradcheck_dense_masked_and_ragged(backend, gated):
    arguments = inputs(2, 5, 4, 3, heads=2, gated=gated)
    require(backend, "gated_attention_pool", arguments[0])
    leaves = [x.requires_grad_() for x in arguments if x is not None]
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)

    def call(**kwargs):
        def function(*tensors):
            given_ = iter(tensors)
            h, *weights = (None if x is None else next(given_) for x in arguments)
            h = h.flatten(0, 1) if "cu_seqlens" in kwargs else h
            pooled, scores = gated_attention_pool(h, *weights, **kwargs, backend=backend)
            return pooled, scores.masked_fill(scores == float("-inf"), 0)

        return function

    for kwargs in ({}, {"mask": mask}, {"cu_seqlens": torch.tensor([0, 3, 3, 10])}):
        assert torch.autograd.gradcheck(call(**kwargs), leaves, nondet_tol=0.0)


def test_opcheck(backend):
    forward = torch.ops.ercn.gated_attention_pool.default
    backward = torch.ops.ercn.gated_attention_pool_backward.default
    plain = (None, 0.0, "tanh")
    mask, bounds = torch.tensor([[True, False, True]] * 2), torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    for gated in (True, False):
        arguments = inputs(2, 3, 4, 5, heads=2, gated=gated)
        h, weights = arguments[0], arguments[1:]
        leaves = [leaf(x) for x in arguments]
        torch.library.opcheck(forward, (*leaves, None, None, *plain, backend))
        torch.library.opcheck(forward, (*leaves, mask, None, *plain, backend))
        torch.library.opcheck(forward, (h[0], *weights, None, bounds, *plain, backend))
        pooled, scores = gated_attention_pool(*arguments, mask=mask, backend=backend)
        given_ = [x is not None for x in arguments]
        for needs in (given_, [True] + [False] * 6):
            for grads in ((torch.ones_like(pooled), None), (None, torch.ones_like(scores))):
                torch.library.opcheck(
                    backward, (*grads, *arguments, mask, None, *plain, scores, needs, backend)
                )


def test_compile_with_dynamic_instances_does_not_recompile(backend):
    torch._dynamo.reset()  # another backend's graph of the same code counts as a recompile
    weights = [x.requires_grad_() for x in inputs(1, 1, 6, 4, heads=2)[1:]]

    def dense_step(h):
        return gated_attention_pool(h, *weights, backend=backend)

    def ragged_step(h, bounds):
        return gated_attention_pool(h, *weights, cu_seqlens=bounds, backend=backend)

    dense_compiled = torch.compile(dense_step, fullgraph=True, dynamic=True)
    ragged_compiled = torch.compile(ragged_step, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (12, 35, 64):
            h = randn(2, n, 6, seed=n).requires_grad_()
            bounds = torch.tensor([0, 3, n // 2, n])
            for ours, eager in (
                (dense_compiled(h), dense_step(h)),
                (ragged_compiled(h[0], bounds), ragged_step(h[0], bounds)),
            ):
                assert all(error(a, e) < 1e-13 for a, e in zip(ours, eager))
                ours, eager = (torch.autograd.grad(x[0].square().sum(), [h, *weights[:3]]) for x in (ours, eager))
                assert all(error(a, e) < 1e-12 for a, e in zip(ours, eager))


def test_export(backend):
    class Module(torch.nn.Module):
        def forward(self, h, v, w):
            return gated_attention_pool(h, v, None, None, None, w, None, backend=backend)

    h, v, *_ = inputs(2, 9, 6, 4)
    w = randn(2, 4)
    shapes = {"h": {1: torch.export.Dim("instances", min=2, max=65536)}, "v": None, "w": None}
    program = torch.export.export(Module(), (h, v, w), dynamic_shapes=shapes)
    other = randn(2, 31, 6, seed=8)
    expected = gated_attention_pool(other, v, None, None, None, w, None, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(other, v, w), expected))


@pytest.mark.parametrize("batched", ["bags", "weights"])
def test_vmap(backend, batched):
    arguments = inputs(2, 7, 4, 3)
    index = 0 if batched == "bags" else 1
    stack = torch.stack([arguments[index], 2 * arguments[index], -arguments[index]], dim=1).requires_grad_()

    def call(x):
        return gated_attention_pool(*arguments[:index], x, *arguments[index + 1 :], backend=backend)

    mapped = torch.vmap(call, in_dims=1)(stack)
    looped = [torch.stack(parts) for parts in zip(*(call(x) for x in stack.unbind(1)))]
    assert all(error(a, e) < 1e-13 for a, e in zip(mapped, looped))
    ours, theirs = (torch.autograd.grad(x[0].square().sum(), stack)[0] for x in (mapped, looped))
    assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    arguments = inputs(1, 20, 16, 8, dtype=torch.float32)
    low = [x.to(dtype) for x in arguments]
    require(backend, "gated_attention_pool", low[0])
    leaves = [leaf(x) for x in arguments]
    with torch.autocast("cpu", dtype=dtype):
        ours = gated_attention_pool(*leaves, backend=backend)
        mixed = gated_attention_pool(low[0], *leaves[1:], backend=backend)
    expected = gated_attention_pool(*low, backend=backend)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    assert all(torch.equal(a, e) and torch.equal(m, e) for a, m, e in zip(ours, mixed, expected))
    assert all(g.dtype == torch.float32 for g in gradients(ours[0].float().sum(), leaves, None))


@pytest.mark.parametrize("leak", [float("nan"), float("inf"), 1e30])
def test_masked_instances_never_leak(backend, leak):
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    arguments = inputs(2, 6, 4, 3, heads=2)
    dirty = [arguments[0].masked_fill(~mask.unsqueeze(-1), leak), *arguments[1:]]
    leaves = [leaf(x) for x in dirty]
    pooled, scores = gated_attention_pool(*leaves, mask=mask, backend=backend)
    assert (scores.masked_select(~mask[:, None].expand_as(scores)) == float("-inf")).all()
    grads = gradients(pooled.square().sum() + scores.masked_fill(~mask[:, None], 0).sum(), leaves, None)
    assert (grads[0][~mask] == 0).all()
    for b in range(2):  # equal to a bag of its real instances only
        real = [arguments[0][b : b + 1, mask[b]], *arguments[1:]]
        assert error(pooled[b : b + 1], twin(*real)[0]) < 1e-13
    clean = [leaf(x) for x in arguments]
    expected, expected_scores = gated_attention_pool(*clean, mask=mask, backend=backend)
    loss = expected.square().sum() + expected_scores.masked_fill(~mask[:, None], 0).sum()
    assert all(torch.equal(a, e) for a, e in zip(grads, gradients(loss, clean, None)))


def test_empty_and_fully_masked_bags(backend):
    arguments = [leaf(x) for x in inputs(2, 5, 4, 3, heads=2)]
    none = torch.zeros(2, 5, dtype=torch.bool)
    pooled, scores = gated_attention_pool(*arguments, mask=none, backend=backend)
    assert torch.equal(pooled, torch.zeros(2, 2, 4).double()) and (scores == float("-inf")).all()
    assert all((g == 0).all() for g in gradients(pooled.sum(), arguments, None))

    for n, bounds in ((0, None), (0, [0, 0, 0]), (3, [0, 0, 3, 3])):
        shape = (2, n, 4) if bounds is None else (n, 4)
        h = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        pooled, scores = gated_attention_pool(h, *arguments[1:], cu_seqlens=cu_seqlens, backend=backend)
        empty = [True, True] if n == 0 else [True, False, True]
        assert all((row == 0).all() for row, e in zip(pooled, empty) if e)
        assert scores.shape == ((2, 2, 0) if bounds is None else (2, n))
        assert all(g.isfinite().all() for g in gradients(pooled.sum(), [h, *arguments[1:]], None))
    empty = torch.ones(0, 4).double()
    no_bag = gated_attention_pool(empty, *arguments[1:], cu_seqlens=torch.tensor([0]), backend=backend)
    assert no_bag[0].shape == (0, 2, 4) and no_bag[1].shape == (2, 0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_ragged_equals_bag_by_bag(backend, index_dtype):
    bounds = torch.tensor([0, 1, 14, 14, 47, 60], dtype=index_dtype)
    arguments = [leaf(x) for x in inputs(None, 60, 6, 5, heads=3)]
    pooled, scores = gated_attention_pool(*arguments, cu_seqlens=bounds, backend=backend)
    bags = [slice(a, b) for a, b in zip(bounds.tolist(), bounds.tolist()[1:])]
    each = [gated_attention_pool(arguments[0][None, bag], *arguments[1:], backend=backend) for bag in bags]
    expected = torch.cat([p for p, _ in each]), torch.cat([s[0] for _, s in each], dim=-1)
    assert error(pooled, expected[0]) < 1e-13 and error(scores, expected[1]) < 1e-13
    pairs = (pooled, scores), expected
    ours, theirs = (gradients(p.square().sum() + s.square().sum(), arguments, None) for p, s in pairs)
    assert all(error(a, e) < 1e-12 for a, e in zip(ours, theirs))


def test_permutation(backend):
    arguments = inputs(2, 40, 6, 5, heads=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    pooled, scores = gated_attention_pool(*arguments, backend=backend)
    shuffled, shuffled_scores = gated_attention_pool(arguments[0][:, order], *arguments[1:], backend=backend)
    assert error(shuffled, pooled) < 1e-13 and error(shuffled_scores, scores[..., order]) < 1e-13


def test_large_scores_do_not_overflow(backend):
    arguments = inputs(1, 30, 4, 3, dtype=torch.float32)
    arguments[5] = arguments[5] * 1e4
    assert_within_budget(
        gated_attention_pool(*arguments, backend=backend)[0],
        twin(*arguments)[0],
        twin(*(x.double() for x in arguments))[0],
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate_as_in_torch(backend, bad):
    arguments = inputs(2, 6, 4, 3)
    arguments[0][1, 2, 3] = bad
    for ours, theirs in zip(gated_attention_pool(*arguments, backend=backend), twin(*arguments)):
        assert torch.allclose(*finite_parts(ours, theirs), rtol=1e-12, atol=1e-12)


def test_two_runs_are_bit_equal(backend):
    arguments = [leaf(x) for x in inputs(3, 301, 33, 17, heads=2, dtype=torch.float32)]
    runs = []
    for _ in range(2):
        outputs = gated_attention_pool(*arguments, backend=backend)
        runs.append((*outputs, *gradients(sum(x.square().sum() for x in outputs), arguments, None)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_stride_property(backend, data):
    b, n, d, hidden, heads = (
        data.draw(st.integers(1, high), label=k)
        for k, high in (("B", 3), ("N", 140), ("D", 70), ("L", 40), ("K", 5))
    )
    gated, bias = (data.draw(st.booleans(), label=k) for k in ("gated", "bias"))
    kind = data.draw(st.sampled_from(["contiguous", "channels_last", "strided", "offset"]), label="layout")
    arguments = inputs(b, n, d, hidden, heads, gated, bias, dtype=torch.float32)
    arguments[0] = layouts(arguments[0])[kind]
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(n)) < 0.7
    mask[:, 0] = True
    mask = data.draw(st.sampled_from([None, mask]), label="mask")
    exact = twin(*(None if x is None else x.double() for x in arguments), mask=mask)
    plain = twin(*arguments, mask=mask)
    ours = gated_attention_pool(*arguments, mask=mask, backend=backend)
    real = torch.ones(b, n, dtype=torch.bool) if mask is None else mask
    assert_within_budget(ours[0], plain[0], exact[0])
    assert_within_budget(*(x[1].masked_fill(~real[:, None], 0) for x in (ours, plain, exact)))


def test_shapes_without_data(backend):
    pooled, scores = gated_attention_pool(*(x.to("meta") for x in inputs(2, 5, 4, 3)), backend=backend)
    assert pooled.is_meta and pooled.shape == (2, 1, 4) and scores.shape == (2, 1, 5)


def test_errors_say_what_was_given(backend):
    h, v, bv, u, bu, w, bw = inputs(2, 5, 4, 3)

    def call(h=h, v=v, bv=bv, u=u, bu=bu, w=w, bw=bw, **kwargs):
        return gated_attention_pool(h, v, bv, u, bu, w, bw, backend=backend, **kwargs)

    for kwargs, words in [
        ({"h": h[0, 0]}, r"h must be \[B, N, D\].*got \[4\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"got \[2, 5, 4\] with cu_seqlens"),
        ({"v": v[:, :3]}, r"v_weight must be \[3, 4\].*got \[3, 3\]"),
        ({"u": u[:2]}, r"u_weight must be \[3, 4\].*got \[2, 4\]"),
        ({"w": w[:, :2]}, r"w_weight must be \[1, 3\].*got \[1, 2\]"),
        ({"w": w[0]}, r"w_weight \[K, L\]; got \[3, 4\] and \[3\]"),
        ({"bw": bv}, r"w_bias must be \[1\].*got \[3\]"),
        ({"u": None}, "u_bias must be None"),
        ({"h": h.long()}, "h and v_weight must be floating point; got torch.int64"),
        ({"u": u.float()}, "u_weight must have v_weight's dtype torch.float64 outside autocast; got torch.float32"),
        ({"mask": torch.ones(2, 4)}, r"mask must be bool or 0/1 \[2, 5\] on cpu; got torch.float32 \[2, 4\]"),
        ({"h": h[0], "mask": torch.ones(2, 5).bool(), "cu_seqlens": torch.tensor([0, 5])}, "mask is for dense bags"),
        ({"h": h[0], "cu_seqlens": torch.tensor([0.0, 5])}, "cu_seqlens must be int32 or int64"),
        ({"h": h[0], "cu_seqlens": torch.tensor([0, 3, 2, 5])}, r"got \[0, 3, 2, 5\]"),
        ({"h": h[0], "cu_seqlens": torch.tensor([0, 4])}, r"from 0 to T = 5"),
    ]:
        with pytest.raises(ValueError, match=words):
            call(**kwargs)
