"""Derivatives of the pooling ops beyond the first gradient, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from _ops import backends_of, error, randn, require
from _pool import inputs, pooled_of, twin
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from ercn.nn import GatedAttentionPool
from ercn.ops import attention_scores, gated_attention_pool, pool_by_scores

pytestmark = pytest.mark.parametrize("backend", backends_of("gated_attention_pool"))

MASK = torch.tensor([[True, True, False, True, True], [True, False, False, True, False]])
LAYOUTS = {
    "dense": {},
    "masked": {"mask": MASK},
    "ragged": {"cu_seqlens": torch.tensor([0, 3, 4, 10])},
}
layouts = pytest.mark.parametrize("kwargs", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(autouse=True)
def float64(backend):
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    require(backend, "gated_attention_pool", x, x[0], None, None, None, x[0], None, None, None, None, 0.0, "tanh")


def arguments(kwargs, **options):
    h, *weights = inputs(2, 5, 4, 3, heads=2, **options)
    return [h.flatten(0, 1) if "cu_seqlens" in kwargs else h, *weights]


def finite(outputs):
    """Scores of masked instances as 0."""
    pooled, scores = outputs
    return pooled, scores.masked_fill(scores == float("-inf"), 0)


def pair(backend, given, **kwargs):
    """The op and its twin as functions of the arguments that are not None."""

    def function_of(op):
        def function(*tensors):
            tensors = iter(tensors)
            return finite(op(*(next(tensors) if x is not None else None for x in given)))

        return function

    ours = function_of(lambda *args: gated_attention_pool(*args, backend=backend, **kwargs))
    return ours, function_of(lambda *args: twin(*args, **kwargs))


def loss_of(function):
    return lambda *args: sum(x.square().sum() for x in function(*args))


def assert_equal(ours, exact, limit=1e-11):
    ours, exact = (torch.utils._pytree.tree_leaves(x) for x in (ours, exact))
    assert len(ours) == len(exact)
    largest = max(e.abs().max().item() for e in exact)  # some are exactly 0, such as that of b_w through pooled
    for a, e in zip(ours, exact):
        assert a.shape == e.shape and error(a, e, largest=largest) < limit


def present(given):
    return [x for x in given if x is not None]


@layouts
def test_double_backward(backend, kwargs):
    given = arguments(kwargs)
    leaves = [x.requires_grad_() for x in present(given)]
    ours, _ = pair(backend, given, **kwargs)
    assert torch.autograd.gradgradcheck(ours, leaves)
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("options", [{"gated": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["pooled", "scores"])
def test_second_derivatives_of_one_output(backend, options, which):
    """Only some inputs and one output have gradients."""
    given = arguments({}, **options)
    leaves = [x.requires_grad_(i != 1) for i, x in enumerate(present(given))]
    wanted = [x for x in leaves if x.requires_grad]
    found = []
    for function in pair(backend, given):
        loss = function(*leaves)[which].square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in first if g is not None)
        found.append(torch.autograd.grad(total, wanted, materialize_grads=True))
    assert_equal(*found)


@layouts
def test_forward_mode(backend, kwargs):
    given = arguments(kwargs)
    primals = tuple(present(given))
    tangents = tuple(randn(*x.shape, seed=20 + i) for i, x in enumerate(primals))
    functions = pair(backend, given, **kwargs)
    assert_equal(*(jvp(f, primals, tangents) for f in functions))
    found = []
    for function in functions:  # a tangent of one input only
        with forward_ad.dual_level():
            outputs = function(*primals[:1], forward_ad.make_dual(primals[1], tangents[1]), *primals[2:])
            found.append([forward_ad.unpack_dual(x).tangent for x in outputs])
    assert_equal(*found)


def test_gradients_by_torch_func(backend):
    given = arguments({})
    leaves = present(given)
    every = tuple(range(len(leaves)))
    ours, plain = pair(backend, given)
    assert_equal(*(grad(loss_of(f), argnums=every)(*leaves) for f in (ours, plain)))
    for jacobian in (jacrev, jacfwd):
        assert_equal(*(jacobian(lambda *x, f=f: f(*x)[0], argnums=(0, 1))(*leaves) for f in (ours, plain)))
    assert_equal(*(hessian(loss_of(f), argnums=(1, 5))(*leaves) for f in (ours, plain)))
    assert_equal(*(grad(lambda x, f=f: grad(loss_of(f), argnums=1)(x, *leaves[1:]).square().sum())(leaves[0])
                   for f in (ours, plain)))  # fmt: skip


@pytest.mark.parametrize("mask", [None, MASK], ids=["dense", "masked"])
def test_gradients_per_bag(backend, mask):
    """Per-sample gradients: vmap over bags with shared weights."""
    h, *weights = arguments({})

    def loss(function):
        def of_one(weights, bag, real):
            pooled, scores = function(bag[None], *weights, mask=real[None])
            return pooled.square().sum() + scores.masked_fill(scores == float("-inf"), 0).sum()

        return of_one

    real = torch.ones_like(MASK) if mask is None else mask
    ours = loss(lambda *args, **kwargs: gated_attention_pool(*args, backend=backend, **kwargs))
    per_bag = vmap(grad(ours), in_dims=(None, 0, 0))(weights, h, real)
    each = [grad(loss(twin))(weights, bag, r) for bag, r in zip(h, real)]
    assert_equal(per_bag, [torch.stack(parts) for parts in zip(*each)])


@pytest.mark.parametrize("kwargs", [{}, {"mask": MASK}], ids=["dense", "masked"])
def test_scores_and_values_apart(backend, kwargs):
    h, *weights = inputs(2, 5, 4, 3, heads=2)
    scores, value = randn(2, 2, 5, seed=1), randn(2, 5, 3, seed=2)
    mask = kwargs.get("mask")

    def ours(h, scores, value):
        alone = attention_scores(h, *weights, backend=backend)
        return pool_by_scores(scores + alone, value, backend=backend, **kwargs)

    def plain(h, scores, value):
        return pooled_of(scores + twin(h, *weights)[1], value, mask)

    args = h, scores, value
    assert torch.autograd.gradgradcheck(ours, [x.clone().requires_grad_() for x in args])
    for jacobian in (jacrev, jacfwd):
        assert_equal(*(jacobian(f, argnums=(0, 1, 2))(*args) for f in (ours, plain)))
    assert_equal(*(jvp(grad(loss_of(lambda *x, f=f: (f(*x),)), argnums=(0, 1, 2)), args, args) for f in (ours, plain)))


def test_dropout_is_the_same_in_every_derivative(backend):
    """The seed fixes the mask, so the second derivatives are those of the function that the forward computed."""
    h, *weights = (x.requires_grad_() for x in inputs(1, 3, 2, 17))

    def step(*args):
        generator = torch.Generator().manual_seed(3)
        return gated_attention_pool(*args, dropout_p=0.4, generator=generator, backend=backend)

    assert torch.autograd.gradgradcheck(step, (h, *weights))


def test_an_empty_bag_has_finite_second_derivatives(backend):
    h, *weights = (x.requires_grad_() for x in inputs(2, 5, 4, 3))
    mask = torch.tensor([[True] * 5, [False] * 5])
    pooled, _ = gated_attention_pool(h, *weights, mask=mask, backend=backend)
    first = torch.autograd.grad(pooled.square().sum(), (h, *weights), create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), (h, *weights), allow_unused=True)
    assert all(x.isfinite().all() for x in second if x is not None) and not second[0][1].any()


def test_the_layer_under_functional_call(backend):
    layer = GatedAttentionPool(4, hidden=3).double()
    h = randn(2, 5, 4, seed=1)
    parameters = {name: x.detach() for name, x in layer.named_parameters()}

    def loss(parameters, bag):
        return functional_call(layer, parameters, (bag[None],))[0].square().sum()

    per_bag = vmap(grad(loss), in_dims=(None, 0))(parameters, h)
    for i, bag in enumerate(h):
        assert_equal({name: x[i] for name, x in per_bag.items()}, grad(loss)(parameters, bag))
