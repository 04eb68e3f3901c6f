"""Derivatives of the affinity ops beyond the first gradient, against plain torch in float64."""

from __future__ import annotations

import functools

import _affinity
import pytest
import torch
from _ops import backends_of, error, randn, require
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ercn.ops import affinity_propagate, reference, relu_affinity

pytestmark = pytest.mark.parametrize("backend", backends_of("relu_affinity"))


@pytest.fixture(autouse=True)
def float64(backend):
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    require(backend, "relu_affinity", x, x)


def pairs(backend):
    """(op, the same in plain torch)"""
    propagate, plain = (functools.partial(f, steps=2) for f in (affinity_propagate, _affinity.dense_propagate))
    return [
        (lambda v, f: relu_affinity(v, f, backend=backend), _affinity.dense),
        (lambda v, f: propagate(v, f, backend=backend), plain),
    ]


def inputs(batch=2, n=7):
    """Features whose products stay away from T = 0, which finite differences and rounding must not cross."""
    drawn = (randn(batch, 4, n, seed=seed) for seed in range(100))
    feat = next(f for f in drawn if (f.mT @ f).abs().min() > 0.04)
    return randn(batch, 3, n, seed=1), feat


def loss_of(function):
    return lambda value, feat: function(value, feat).square().sum()


def assert_equal(ours, exact, limit=1e-12):
    ours, exact = (torch.utils._pytree.tree_leaves(x) for x in (ours, exact))
    assert len(ours) == len(exact)
    for a, e in zip(ours, exact):
        assert a.shape == e.shape and error(a, e) < limit


def test_double_backward(backend):
    leaves = [x.requires_grad_() for x in inputs()]
    for ours, _ in pairs(backend):
        assert torch.autograd.gradgradcheck(ours, leaves)


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["value", "feat"])
def test_double_backward_of_one_input(backend, need):
    leaves = [x.requires_grad_(n) for x, n in zip(inputs(), need)]
    wanted = [x for x in leaves if x.requires_grad]
    for pair in pairs(backend):
        second = []
        for function in pair:
            first = torch.autograd.grad(loss_of(function)(*leaves), wanted, create_graph=True)
            second.append(torch.autograd.grad(first[0].square().sum(), wanted))
        assert_equal(*second)


@pytest.mark.parametrize("made", ["feat is cam", "feat of cam", "cam of feat"])
def test_inputs_that_depend_on_each_other(backend, made):
    """The gradient with create_graph counts each path once."""

    def loss(x):
        other = x * x + 1
        cam, feat = {"feat is cam": (x, x), "feat of cam": (x, other), "cam of feat": (other, x)}[made]
        return affinity_propagate(cam, feat, backend=backend).pow(3).sum()

    x = inputs()[1].requires_grad_()
    (plain,) = torch.autograd.grad(loss(x), x)
    (with_graph,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert_equal(with_graph, plain)
    assert torch.autograd.gradgradcheck(loss, x)


@pytest.mark.parametrize("shape", [(7,), (1, 7)])
def test_the_result_may_be_changed_in_place(backend, shape):
    value, feat = (x.unflatten(2, shape).requires_grad_() for x in inputs())
    for op in (relu_affinity, affinity_propagate):
        expected = torch.autograd.grad((2 * op(value, feat, backend=backend)).square().sum(), (value, feat))
        out = op(value, feat, backend=backend)
        out.mul_(2)
        assert_equal(torch.autograd.grad(out.square().sum(), (value, feat)), expected)


def test_forward_mode(backend):
    leaves = [x.requires_grad_() for x in inputs()]
    for ours, _ in pairs(backend):
        assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True, check_batched_grad=True)
    tangents = [randn(*x.shape, seed=9 + i) for i, x in enumerate(leaves)]
    for ours, dense in pairs(backend):
        assert_equal(*(jvp(f, tuple(x.detach() for x in leaves), tuple(tangents)) for f in (ours, dense)))
        for which in (0, 1):  # a tangent of one input only
            found = []
            for function in (ours, dense):
                with forward_ad.dual_level():
                    x = [t.detach() for t in leaves]
                    x[which] = forward_ad.make_dual(x[which], tangents[which])
                    found.append(forward_ad.unpack_dual(function(*x)).tangent)
            assert_equal(*found)


def test_gradients_by_torch_func(backend):
    value, feat = inputs()
    for ours, dense in pairs(backend):
        assert_equal(*(grad(loss_of(f), argnums=(0, 1))(value, feat) for f in (ours, dense)))
        assert_equal(*(vjp(f, value, feat)[1](value) for f in (ours, dense)))
        for jacobian in (jacrev, jacfwd):
            assert_equal(*(jacobian(f, argnums=(0, 1))(value, feat) for f in (ours, dense)))


def test_gradients_per_sample(backend):
    value, feat = inputs(batch=6)
    stacked = value.unflatten(0, (3, 2)), feat.unflatten(0, (3, 2))
    for ours, dense in pairs(backend):
        gradients = [vmap(grad(loss_of(f), argnums=(0, 1)))(*stacked) for f in (ours, dense)]
        assert_equal(*gradients)
        shared = stacked[0], stacked[1][0]
        assert_equal(*(vmap(grad(loss_of(f), argnums=(0, 1)), in_dims=(0, None))(*shared) for f in (ours, dense)))
        assert_equal(*(vmap(lambda v, f, g=g: jvp(g, (v, f), (v, f)))(*stacked) for g in (ours, dense)))
        assert_equal(*(grad(lambda v, f, g=g: vmap(loss_of(g))(v, f).sum())(*stacked) for g in (ours, dense)))


def test_second_derivatives_by_torch_func(backend):
    value, feat = inputs(batch=1, n=4)
    for ours, dense in pairs(backend):
        assert_equal(*(hessian(loss_of(f), argnums=(0, 1))(value, feat) for f in (ours, dense)))
        assert_equal(*(jacrev(jacrev(loss_of(f), argnums=1), argnums=(0, 1))(value, feat) for f in (ours, dense)))


def test_second_derivatives_have_the_dtypes_of_the_inputs(backend):
    value, feat = inputs()
    leaves = value.float().requires_grad_(), feat.bfloat16().requires_grad_()
    require(backend, "relu_affinity", *leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for ours, dense in pairs(backend):
        seconds = []
        for function, x in ((ours, leaves), (dense, exact)):
            first = torch.autograd.grad(loss_of(function)(*x), x, create_graph=True)
            seconds.append(torch.autograd.grad(sum(g.double().square().sum() for g in first), x))
        assert [x.dtype for x in seconds[0]] == [torch.float32, torch.bfloat16]
        # Gradients of feat are rounded to bfloat16, and so are normalised features.
        assert all(error(a, e) < 4 * torch.finfo(torch.bfloat16).eps for a, e in zip(*seconds))


def test_gradients_by_torch_func_under_autocast(backend):
    """As in autograd: features are rounded once, and both directions use the rounded ones."""
    value, feat = (x.float() for x in inputs())
    require(backend, "relu_affinity", value, feat.bfloat16())
    leaves = [x.clone().requires_grad_() for x in (value, feat)]
    for ours, _ in pairs(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            functional = grad(loss_of(ours), argnums=(0, 1))(value, feat)
            loss = loss_of(ours)(*leaves)
        assert_equal(functional, torch.autograd.grad(loss, leaves), 1e-6)


def test_third_derivatives_are_refused(backend):
    value, feat = (x.requires_grad_() for x in inputs(1, 4))
    words = "relu_affinity has no third derivative: differentiate value @ relu"
    (first,) = torch.autograd.grad(loss_of(pairs(backend)[0][0])(value, feat), feat, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), feat, create_graph=True)
    with pytest.raises(NotImplementedError, match=words):
        second.sum().backward()
    with pytest.raises(NotImplementedError, match=words):
        jvp(lambda f: jvp(lambda g: relu_affinity(value, g, backend=backend), (f,), (f,))[1], (feat,), (feat,))


def test_the_formula_in_blocks(backend, monkeypatch):
    value, feat = randn(2, 3, 50, seed=1), randn(2, 4, 50, seed=2)
    whole = reference.relu_affinity_derivative(value, feat, feat, feat)
    t = feat.mT @ feat
    assert error(whole, value @ (2 * t).masked_fill(t <= 0, 0)) < 1e-13
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 50)
    assert error(reference.relu_affinity_derivative(value, feat, feat, feat), whole) < 1e-14


def test_transforms_in_a_compiled_function(backend):
    """They break the graph, in which a registered op would have no tangent; vmap does not."""
    value, feat = inputs()
    ours, _ = pairs(backend)[0]
    functions = {
        "jvp": lambda v, f: jvp(ours, (v, f), (v, f))[1],
        "vmap": lambda v, f: vmap(lambda v, f: ours(v[None], f[None]))(v, f),
    }
    for name, function in functions.items():
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=name == "vmap")
        assert_equal(compiled(value, feat), function(value, feat))
