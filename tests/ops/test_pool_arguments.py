"""Dropout, activations, dtypes, and scores and pooling as two ops: every backend against plain torch.

GPU backends are interpreted or emulated in separate processes, as for test_gpu_ops.py.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from _ops import assert_within_budget, error, layouts, randn
from _pool import GPU_ON_CPU, backends_for, budget, device_of, inputs, kept, least_lucky, philox, pooled_of, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ercn.ops import _backends, attention_scores, gated_attention_pool, pool_by_scores, reference
from ercn.ops._arguments import DIFFERENTIABLE, PoolArguments

X = torch.ones(1, 1, 1)
SEED = torch.tensor([0x0123456789ABCDEF])
FORWARD = torch.ops.ercn.gated_attention_pool.default


def pool_arguments(h=X, w=X[0], seed=None, dropout_p=0.0, activation="tanh"):
    return (h, w, None, None, None, w, None, None, None, seed, dropout_p, activation)


def having(op, *args):
    return pytest.mark.parametrize("backend", backends_for(op, *args))


of_dropout = having("gated_attention_pool", *pool_arguments(seed=SEED, dropout_p=0.5))
of_scores = having("attention_scores", *pool_arguments())
of_values = having("pool_by_scores", X, X, None, None)


def on(backend, *tensors):
    return [x.to(device_of(backend)) if isinstance(x, torch.Tensor) else x for x in tensors]


def takes(backend, dtype):
    """Skip with the backend's reason if it does not take the dtype."""
    h = X.to(dtype)
    if reason := _backends.named(backend, "backend").launcher.can_run("gated_attention_pool", *pool_arguments(h, h[0])):
        pytest.skip(f"{backend}: {reason}")


def gradients(outputs, leaves):
    """The gradients of the leaves for fixed upstream gradients of all outputs."""
    seeds = [randn(*x.shape, seed=9 + i).to(x) for i, x in enumerate(outputs)]
    return torch.autograd.grad(outputs, [x for x in leaves if isinstance(x, torch.Tensor)], seeds)


def results(function, arguments, cast, **kwargs):
    """(pooled, scores, gradients…), scores of masked instances as 0."""
    leaves = [None if x is None else x.detach().to(cast).requires_grad_() for x in arguments]
    pooled, scores = function(*leaves, **kwargs)
    outputs = pooled, scores.masked_fill(scores == float("-inf"), 0)
    return *outputs, *gradients(outputs, leaves)


def op(backend, seed, dropout_p, h, *weights, mask=None, cu_seqlens=None, activation="tanh"):
    """The op with a given seed."""
    one_bag = h.dim() == 2 and cu_seqlens is None
    h, mask = (x if x is None or not one_bag else x[None] for x in (h, mask))
    found = FORWARD(h, *weights, mask, cu_seqlens, seed, dropout_p, activation, backend)
    return tuple(x[0] for x in found) if one_bag else found


def assert_twin(backend, arguments, dtype, seed=None, dropout_p=0.0, **kwargs):
    arguments = [None if x is None else x.to(dtype) for x in arguments]
    here = on(backend, *arguments)
    options = dict(zip(kwargs, on(backend, *kwargs.values())))
    ours = results(functools.partial(op, backend, *on(backend, seed), dropout_p), here, dtype, **options)
    dropping = {"seed": seed, "dropout_p": dropout_p, **kwargs}
    exact = results(twin, arguments, torch.float64, **dropping)
    plain = least_lucky(lambda one: results(one, arguments, dtype, **dropping), len(arguments[1]), exact)
    budget(ours, plain, exact)


KNOWN = [  # Random123's known answers: counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.skipif(GPU_ON_CPU, reason="tests the reference")
@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_philox_gives_the_published_answers(counter, key, output):
    counter, key, output = ([int(word, 16) for word in x.split()] for x in (counter, key, output))
    assert philox(np.array(counter), np.array(key)).tolist() == output
    words = reference.philox(*(tuple(torch.tensor([word]) for word in words) for words in (counter, key)))
    assert [int(word) for word in words] == output


@pytest.mark.skipif(GPU_ON_CPU, reason="tests the reference")
@pytest.mark.parametrize("seed", [0, 1, 0x0123456789ABCDEF, (1 << 63) - 1, -1])
def test_dropout_of_the_reference_beyond_2_to_the_32_instances(seed):
    instances = torch.tensor([0, 1, 5, (1 << 32) - 1, 1 << 32, (1 << 40) + 3])
    found = reference.dropout_factors(torch.tensor([seed]), 0.3, instances, 200, torch.float64)
    threshold = round(0.3 * 65536)
    for ours, expected in zip(found, kept(seed & (1 << 64) - 1, 0.3, instances, 200)):
        assert torch.equal(ours, expected.double() * (65536 / (65536 - threshold)))


# n, D, L, K: fewer and more than 64 and 16 units, multiples of them and not; more instances than a block.
CASES = [(7, 5, 3, 2), (131, 33, 65, 1), (20, 40, 145, 3)]


@of_dropout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dropout_equals_the_twin_with_the_same_mask(backend, case, gated, dtype):
    takes(backend, dtype)
    assert_twin(backend, inputs(2, *case, gated=gated), dtype, SEED, 0.25)


@of_dropout
@pytest.mark.parametrize("p", [1e-6, 0.9, 1.0])
@pytest.mark.parametrize("layout", ["mask", "ragged", "one bag"])
def test_dropout_of_every_layout(backend, layout, p):
    arguments = inputs(2 if layout == "mask" else None, 41, 6, 21, 2)
    kwargs = {
        "mask": {"mask": torch.rand(2, 41, generator=torch.Generator().manual_seed(0)) < 0.5},
        "ragged": {"cu_seqlens": torch.tensor([0, 3, 20, 41])},
        "one bag": {},
    }[layout]
    assert_twin(backend, arguments, torch.float32, SEED, p, **kwargs)


@having("gated_attention_pool", *pool_arguments(activation="gelu"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_activations(backend, activation, gated, dtype):
    takes(backend, dtype)
    arguments = inputs(2, 37, 12, 21, 2, gated=gated)
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(0)) < 0.5
    assert_twin(backend, arguments, dtype, activation=activation, mask=mask)
    assert_twin(backend, arguments, dtype, SEED, 0.4, activation=activation)


@having("gated_attention_pool", *pool_arguments(activation="relu"))
def test_relu_has_no_slope_at_0(backend):
    """Half of the units are exactly 0, where torch's gradient is 0."""
    h, v, _, u, _, w, _ = inputs(1, 9, 4, 8)
    v[::2] = 0
    assert_twin(backend, [h, v, None, u, None, w, None], torch.float32, activation="relu")


MIXED = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
MIXED += [(torch.bfloat16, torch.float16), (torch.float32, torch.float64)]


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair))
@pytest.mark.parametrize("layout", ["dense", "ragged"])
@having("gated_attention_pool", *pool_arguments(X.bfloat16()))
def test_weights_in_another_dtype(backend, dtypes, layout):
    """Equal to all arguments in the promoted dtype, bit-equal if that is the dtype of the sums."""
    of_h, of_weights = dtypes
    arguments = inputs(2 if layout == "dense" else None, 33, 10, 21, 2)
    arguments = on(backend, *(x.to(of_weights if i else of_h) for i, x in enumerate(arguments)))
    options = {"seed": None, "dropout_p": 0.0}
    if reason := _backends.named(backend, "backend").launcher.can_run(
        "gated_attention_pool", *arguments, None, None, None, 0.0, "tanh"
    ):
        pytest.skip(f"{backend}: {reason}")
    bounds = on(backend, torch.tensor([0, 5, 33])) if layout == "ragged" else [None]
    wide = torch.promote_types(*dtypes)
    runs = []
    for cast in (False, True):
        leaves = [(x.to(wide) if cast else x).detach().requires_grad_() for x in arguments]
        outputs = gated_attention_pool(*leaves, cu_seqlens=bounds[0], backend=backend)
        assert outputs[0].dtype == wide
        assert outputs[1].dtype == (torch.float64 if wide == torch.float64 else torch.float32)
        grads = gradients(outputs, leaves)
        assert all(g.dtype == x.dtype for g, x in zip(grads, leaves))
        runs.append((*outputs, *grads))
    plain, exact = (
        results(functools.partial(twin, **options), [x.cpu().to(wide) for x in arguments], cast, cu_seqlens=bounds[0])
        for cast in (wide, torch.float64)
    )
    for mine, again, torchs, truth in zip(*runs, plain, exact, strict=True):
        assert_within_budget(mine.cpu(), torchs.to(mine.dtype), truth)
        assert_within_budget(again.cpu(), torchs, truth)


@of_scores
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dense", "mask", "ragged", "one bag"])
def test_scores_alone_are_those_of_the_pool(backend, layout, dtype):
    takes(backend, dtype)
    batch = 2 if layout in ("dense", "mask") else None
    arguments = on(backend, *(x.to(dtype) for x in inputs(batch, 70, 9, 20, 3)))
    kwargs = {"backend": backend, "dropout_p": 0.3 if backend in DROPPING else 0.0}
    if layout == "mask":
        kwargs["mask"] = on(backend, torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.5)[0]
    if layout == "ragged":
        kwargs["cu_seqlens"] = on(backend, torch.tensor([0, 3, 20, 20, 70]))[0]
    runs = []
    for function in (attention_scores, lambda *args, **kwargs: gated_attention_pool(*args, **kwargs)[1]):
        torch.manual_seed(3)
        leaves = [x.detach().requires_grad_() for x in arguments]
        scores = function(*leaves, **kwargs)
        runs.append((scores, *gradients([scores.masked_fill(scores == float("-inf"), 0)], leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


DROPPING = backends_for("gated_attention_pool", *pool_arguments(seed=SEED, dropout_p=0.5))


def value_results(function, scores, value, cast, **kwargs):
    """(pooled, grad_scores, grad_value), the scores in the accumulation dtype."""
    leaves = [x.detach().to(c).requires_grad_() for x, c in ((scores, sums_of(cast)), (value, cast))]
    pooled = function(*leaves, **kwargs)
    return pooled, *gradients([pooled], leaves)


def sums_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def twin_of_values(scores, value, mask=None, cu_seqlens=None):
    if cu_seqlens is None:
        return pooled_of(scores.to(sums_of(value.dtype)), value.to(scores.dtype), mask).to(value.dtype)
    bounds = itertools.pairwise(cu_seqlens.tolist())
    return torch.cat([twin_of_values(scores[None, :, a:b], value[None, a:b]) for a, b in bounds])


@of_values
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last", "strided", "offset", "expanded"])
def test_pool_by_scores(backend, kind, dtype):
    takes(backend, dtype)
    scores, value = (3 * randn(2, 3, 131, seed=1)).to(sums_of(dtype)), randn(2, 131, 37, seed=2).to(dtype)
    ours = value_results(
        functools.partial(pool_by_scores, backend=backend), *on(backend, scores, layouts(value)[kind]), dtype
    )
    value = layouts(value)[kind].contiguous()
    plain, exact = (value_results(twin_of_values, scores, value, cast) for cast in (dtype, torch.float64))
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine.cpu(), torchs, truth)


@of_values
def test_pool_by_scores_where_masked_ragged_or_minus_infinity(backend):
    """Masked scores and values have no effect; a score of -inf, as of a gate or top-k, has weight 0."""
    scores, value = randn(2, 3, 40, seed=1), randn(2, 40, 11, seed=2)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    scores[:, :, 7] = float("-inf")
    mask[:, :9] = True
    dirty = scores.masked_fill(~mask[:, None], float("nan")), value.masked_fill(~mask[..., None], float("inf"))
    pool = functools.partial(pool_by_scores, backend=backend)
    bounds = torch.tensor([0, 0, 13, 40, 40])
    for tensors, clean, kwargs in (
        (dirty, (scores, value), {"mask": mask}),
        ((scores[0], value[0]), (scores[0], value[0]), {"cu_seqlens": bounds}),
    ):
        options = dict(zip(kwargs, on(backend, *kwargs.values())))
        ours = value_results(pool, *on(backend, *tensors), torch.float32, **options)
        plain, exact = (
            value_results(twin_of_values, *(x.float() for x in clean), cast, **kwargs)
            for cast in (torch.float32, torch.float64)
        )
        for mine, torchs, truth in zip(ours, plain, exact, strict=True):
            assert_within_budget(mine.cpu(), torchs.nan_to_num(0), truth.nan_to_num(0))
    one_bag = pool(*on(backend, scores[0].float(), value[0].float()))
    assert torch.equal(one_bag, pool(*on(backend, scores[:1].float(), value[:1].float()))[0])


@of_values
def test_pool_by_scores_of_nothing(backend):
    for b, n, k, d in ((2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 3, 0), (2, 5, 0, 4)):
        leaves = [x.requires_grad_() for x in on(backend, torch.ones(b, k, n), torch.ones(b, n, d))]
        pooled = pool_by_scores(*leaves, backend=backend)
        assert pooled.shape == (b, k, d) and (n > 0 or (pooled == 0).all())
        assert all((g == 0).all() for g in torch.autograd.grad(pooled.sum(), leaves))
    leaves = [x.requires_grad_() for x in on(backend, torch.ones(2, 3, 5), torch.ones(2, 5, 4))]
    mask = torch.tensor([[False] * 5, [True] * 5])
    pooled = pool_by_scores(*leaves, mask=on(backend, mask)[0], backend=backend)
    assert (pooled[0] == 0).all() and (pooled[1] == 1).all()
    assert all((g[0] == 0).all() for g in torch.autograd.grad(pooled.sum(), leaves))
    scores, value, bounds = on(backend, torch.ones(3, 0), torch.ones(0, 4), torch.tensor([0]))
    nothing = pool_by_scores(scores, value, cu_seqlens=bounds, backend=backend)
    assert nothing.shape == (0, 3, 4)


@of_dropout
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_gradcheck(backend, activation):
    takes(backend, torch.float64)
    arguments = inputs(2, 5, 4, 18, 2)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)

    def call(*leaves, **kwargs):
        pooled, scores = op(backend, SEED, 0.4, *leaves, activation=activation, **kwargs)
        return pooled, scores.masked_fill(scores == float("-inf"), 0)

    leaves = [x.requires_grad_() for x in arguments]
    assert torch.autograd.gradcheck(functools.partial(call, mask=mask), leaves, nondet_tol=0.0)
    scores = torch.ops.ercn.attention_scores.default
    assert torch.autograd.gradcheck(
        lambda *x: scores(*x, None, None, SEED, 0.4, activation, backend), leaves, nondet_tol=0.0
    )


@of_values
def test_gradcheck_of_pool_by_scores(backend):
    takes(backend, torch.float64)
    leaves = [x.requires_grad_() for x in (randn(2, 3, 5, seed=1), randn(2, 5, 4, seed=2))]
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    for kwargs in ({}, {"mask": mask}):
        assert torch.autograd.gradcheck(lambda *x, k=kwargs: pool_by_scores(*x, **k, backend=backend), leaves)
    flat = [leaves[0][0].detach().requires_grad_(), leaves[1][0].detach().requires_grad_()]
    bounds = torch.tensor([0, 3, 3, 5])
    assert torch.autograd.gradcheck(lambda *x: pool_by_scores(*x, cu_seqlens=bounds, backend=backend), flat)


def revealed(backend, p, n=512, hidden=128, **kwargs):
    """The mask of V's branch, [N, L]: every unit is tanh(20) = 1 and one head reads it."""
    h, v = torch.zeros(1, n, 1), torch.zeros(hidden, 1)
    tensors = on(backend, h, v, torch.full((hidden,), 20.0), None, None, torch.eye(hidden), None)
    return gated_attention_pool(*tensors, dropout_p=p, backend=backend, **kwargs)[1][0].mT.cpu()


@of_dropout
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_rate_and_independence_of_what_is_dropped(backend, p):
    torch.manual_seed(0)
    mask = revealed(backend, p)
    assert set(mask.unique().tolist()) == {0.0, float(np.float32(65536 / (65536 - round(p * 65536))))}
    dropped = (mask == 0).double()
    bound = 5 * (p * (1 - p)) ** 0.5  # 5 standard deviations of the mean of n trials, times sqrt(n)
    assert abs(dropped.mean() - p) < bound / mask.numel() ** 0.5
    assert (dropped.mean(0) - p).abs().max() < bound / len(mask) ** 0.5
    assert (dropped.mean(1) - p).abs().max() < bound / mask.shape[1] ** 0.5
    centred = (dropped - p) / (p * (1 - p)) ** 0.5
    for shift in ((0, 1), (1, 0), (0, 16), (0, 64)):  # neighbours, and the units of one counter
        correlation = (centred * centred.roll(shift, (0, 1))).mean()
        assert abs(correlation) < 5 / mask.numel() ** 0.5


@of_dropout
def test_seeds_are_torchs(backend):
    device = device_of(backend)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append((revealed(backend, 0.5), revealed(backend, 0.5)))
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2]))
    assert not torch.equal(runs[0][0], runs[0][1]) and not torch.equal(runs[0][0], runs[2][0])
    before = torch.get_rng_state()
    draws = [revealed(backend, 0.5, generator=torch.Generator(device).manual_seed(s)) for s in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.get_rng_state())


@of_dropout
def test_two_runs_of_one_seed_are_bit_equal(backend):
    """``cpu`` with any number of threads; the sums of the reference are those of torch's products."""
    arguments = on(backend, *(x.float() for x in inputs(3, 301, 33, 70, 2)))
    run = functools.partial(op, backend, *on(backend, SEED), 0.3)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 1) if backend == "cpu" else (1, 1):
            torch.set_num_threads(count)
            runs.append(results(run, arguments, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@of_dropout
def test_checkpoint_computes_the_same_mask_again(backend):
    from torch.utils.checkpoint import checkpoint

    leaves = [x.float().requires_grad_() for x in on(backend, *inputs(2, 20, 5, 30))]
    runs = []
    for run in (lambda f, *x: f(*x), functools.partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(5)
        outputs = run(functools.partial(gated_attention_pool, dropout_p=0.5, backend=backend), *leaves)
        runs.append((*outputs, *gradients(outputs, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def drawn_by(step, *tensors):
    """Outputs and gradients of two calls with the same seed."""
    torch.manual_seed(0)
    return [(*outputs, *gradients(outputs, tensors)) for outputs in (step(*tensors), step(*tensors))]


@of_dropout
def test_compiled_calls_draw_a_new_mask_each(backend):
    torch._dynamo.reset()
    leaves = [x.float().requires_grad_() for x in on(backend, *inputs(2, 20, 5, 30))]
    mask = on(backend, torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.7)[0]
    step = functools.partial(gated_attention_pool, mask=mask, dropout_p=0.5, masked_score=-1.0, backend=backend)
    eager, compiled = (drawn_by(x, *leaves) for x in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    assert all(torch.equal(a, b) for ours, theirs in zip(compiled, eager) for a, b in zip(ours, theirs))
    assert not torch.equal(compiled[0][1], compiled[1][1])


@pytest.mark.slow
@of_dropout
def test_inductor_draws_a_new_mask_each_call(backend):
    """With a generator in the graph; the backward has the mask of the forward, visible with h = 0."""
    torch._dynamo.reset()
    h, v, u = torch.zeros(1, 20, 1), torch.zeros(30, 1), torch.full((30,), 20.0)
    h, v, bv, w = on(backend, h, v, u, torch.eye(30))
    bv.requires_grad_()

    @functools.partial(torch.compile, fullgraph=True)
    def step(bv):
        return gated_attention_pool(h, v, bv, None, None, w, None, activation="relu", dropout_p=0.5, backend=backend)

    masks = []
    for _ in range(2):
        scores = step(bv)[1]
        (grad,) = torch.autograd.grad(scores.sum(), bv)
        assert torch.equal(grad, (scores[0] / 20).sum(1))
        masks.append(scores)
    assert not torch.equal(*masks)


@of_dropout
def test_opcheck(backend):
    arguments = on(backend, *(x.float() for x in inputs(2, 3, 4, 5, 2)))
    h, *weights = arguments
    mask, bounds, seed = on(backend, torch.tensor([[True, False, True]] * 2), torch.tensor([0, 1, 1, 3]), SEED)
    rest = (seed, 0.5, "gelu") if backend in ("cpu", "reference") else (seed, 0.5, "tanh")
    leaves = [x.detach().requires_grad_() for x in arguments]
    scores = torch.ops.ercn.attention_scores.default
    backward = torch.ops.ercn.gated_attention_pool_backward.default
    torch.library.opcheck(FORWARD, (*leaves, mask, None, *rest, backend))
    if backend in backends_for("attention_scores", *pool_arguments()):
        torch.library.opcheck(scores, (*leaves, mask, None, *rest, backend))
        torch.library.opcheck(scores, (h[0], *weights, None, bounds, *rest, backend))
    pooled, found = FORWARD(*arguments, mask, None, *rest, backend)
    grads = torch.ones_like(pooled), torch.ones_like(found)
    torch.library.opcheck(backward, (*grads, *arguments, mask, None, *rest, found, [True] * 7, backend))
    if backend in ("cpu", "reference"):  # fp32 weights beside bf16 features
        leaves[0] = h.bfloat16().requires_grad_()
        torch.library.opcheck(FORWARD, (*leaves, mask, None, *rest, backend))


@of_values
def test_opcheck_of_pool_by_scores(backend):
    scores, value = on(backend, torch.ones(2, 3, 5), torch.ones(2, 5, 4))
    mask, bounds = on(backend, torch.rand(2, 5) < 0.5, torch.tensor([0, 1, 1, 5], dtype=torch.int32))
    forward, backward = torch.ops.ercn.pool_by_scores.default, torch.ops.ercn.pool_by_scores_backward.default
    leaves = [x.clone().requires_grad_() for x in (scores, value)]
    torch.library.opcheck(forward, (*leaves, mask, None, backend))
    torch.library.opcheck(forward, (scores[0], value[0], None, bounds, backend))
    for needs in ([True, True], [True, False], [False, True]):
        grad = on(backend, torch.ones(2, 3, 4))[0]
        torch.library.opcheck(backward, (grad, scores, value, mask, None, needs, backend))


@of_dropout
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_layout_mask_and_option_property(backend, data):
    n, d, hidden, heads = (
        data.draw(st.integers(1, high), label=k) for k, high in (("N", 120), ("D", 50), ("L", 140), ("K", 4))
    )
    gated, bias = (data.draw(st.booleans(), label=k) for k in ("gated", "bias"))
    arguments = inputs(2, n, d, hidden, heads, gated, bias)
    kind = data.draw(st.sampled_from(["contiguous", "channels_last", "strided", "offset"]), label="layout")
    arguments[0] = layouts(arguments[0].float())[kind]
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.7
    kwargs = {"mask": data.draw(st.sampled_from([None, mask]), label="mask")}
    p = data.draw(st.sampled_from([0.0, 0.25, 0.5]), label="p")
    seed = torch.tensor([data.draw(st.integers(0, (1 << 63) - 1), label="seed")]) if p else None
    if backend in backends_for("gated_attention_pool", *pool_arguments(activation="gelu")):
        kwargs["activation"] = data.draw(st.sampled_from(["tanh", "relu", "gelu"]), label="activation")
    assert_twin(backend, arguments, torch.float32, seed, p, **kwargs)


def small(backend):
    return on(backend, *(x.float() for x in inputs(2, 5, 4, 3)))


@of_scores
def test_masks_of_either_polarity_and_any_dtype(backend):
    arguments = small(backend)
    (mask,) = on(backend, torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1]]).bool())
    expected = gated_attention_pool(*arguments, mask=mask, backend=backend)
    for dtype in (torch.float32, torch.uint8, torch.int64, torch.bfloat16):
        for kwargs in ({"mask": mask.to(dtype)}, {"key_padding_mask": (~mask).to(dtype)}):
            ours = gated_attention_pool(*arguments, **kwargs, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    pooled = pool_by_scores(expected[1], arguments[0], key_padding_mask=~mask, backend=backend)
    assert torch.equal(pooled, pool_by_scores(expected[1].nan_to_num(0), arguments[0], mask=mask, backend=backend))
    one_bag = gated_attention_pool(arguments[0][0], *arguments[1:], mask=mask[0], backend=backend)
    assert all(torch.equal(a, b[0]) for a, b in zip(one_bag, expected))
    first = {"mask": mask[0], "backend": backend}
    assert torch.equal(attention_scores(arguments[0][0], *arguments[1:], **first), expected[1][0])
    assert torch.equal(pool_by_scores(expected[1][0], arguments[0][0], **first), pooled[0])


@of_scores
def test_masked_scores_are_finite_where_asked_for(backend):
    """In a loss of each instance 0 times such a score is 0, and its gradient is 0."""
    arguments = [x.requires_grad_() for x in small(backend)]
    (mask,) = on(backend, torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1]]).bool())
    kwargs = {"mask": mask, "backend": backend}
    pooled, scores = gated_attention_pool(*arguments, masked_score=-7.0, **kwargs)
    expected, infinite = gated_attention_pool(*arguments, **kwargs)
    assert torch.equal(pooled, expected)
    assert torch.equal(scores, infinite.masked_fill(~mask[:, None], -7.0))
    assert torch.equal(attention_scores(*arguments, masked_score=-7.0, **kwargs), scores)
    grads = torch.autograd.grad((scores * mask[:, None]).square().sum(), arguments)
    theirs = torch.autograd.grad(infinite.masked_fill(~mask[:, None], 0).square().sum(), arguments)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(grads, theirs))


@of_scores
@pytest.mark.parametrize("leak", [float("nan"), float("inf")])
def test_masked_instances_are_never_read_by_the_scores(backend, leak):
    arguments = small(backend)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1]]).bool()
    (real,) = on(backend, mask)
    runs = []
    for dirty in (False, True):
        h = arguments[0].masked_fill(~real[..., None], leak) if dirty else arguments[0]
        leaves = [x.detach().clone().requires_grad_() for x in (h, *arguments[1:])]
        scores = attention_scores(*leaves, mask=real, masked_score=0.0, backend=backend)
        runs.append((scores, *gradients([scores], leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert (runs[0][1][~real] == 0).all()


before_backends = pytest.mark.skipif(GPU_ON_CPU, reason="checked before a backend is chosen")


@before_backends
def test_public_functions_take_the_arguments_in_the_order_of_the_ops():
    for function in (gated_attention_pool, attention_scores):
        parameters = inspect.signature(function).parameters
        assert tuple(parameters)[: len(DIFFERENTIABLE)] == DIFFERENTIABLE
        assert {"mask", "cu_seqlens", "dropout_p", "activation"} == parameters.keys() & set(PoolArguments._fields[7:])
    assert [argument.name for argument in FORWARD._schema.arguments] == [*PoolArguments._fields, "backend"]


@before_backends
def test_a_mask_that_leaves_nothing_warns_once_for_each_line():
    arguments, mask = small("cpu"), torch.zeros(2, 5)

    def call():
        return gated_attention_pool(*arguments, mask=mask, backend="reference")

    words = "mask masks all 10 instances: pooled is 0.*real, key_padding_mask.*padding"
    with pytest.warns(UserWarning, match=words) as warned:
        (pooled, scores), *_ = [call() for _ in range(3)]
    assert len(warned) == 1 and warned[0].filename == __file__
    assert (pooled == 0).all() and (scores == float("-inf")).all()
    with pytest.warns(UserWarning, match="key_padding_mask masks all 10 instances.*padding, mask where it is real"):
        attention_scores(*arguments, key_padding_mask=~mask.bool())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
        attention_scores(*arguments, mask=torch.tensor([[1.0] * 5, [0.0] * 5]))  # one bag of two is empty
        attention_scores(torch.ones(2, 0, 4), *arguments[1:], mask=torch.zeros(2, 0))
        torch.compile(lambda m: attention_scores(*arguments, mask=m), fullgraph=True, backend="eager")(mask)
        torch.vmap(lambda m: attention_scores(*arguments, mask=m))(mask[None])


@before_backends
def test_errors_say_what_was_given():
    mask = torch.ones(2, 5)
    additive = mask.masked_fill(torch.rand(2, 5) < 2, 0.0)
    additive[1, 2] = float("-inf")
    for kwargs, words in [
        ({"mask": 2 * mask}, r"mask must hold 0 and 1 alone; got 2\.0.*mask is True where the instance is real"),
        ({"key_padding_mask": additive}, "key_padding_mask must hold 0 and 1 alone; got -inf, as one that is added"),
        ({"mask": additive.nan_to_num(0, neginf=float("nan"))}, "must hold 0 and 1 alone; got nan"),
        ({"mask": mask, "key_padding_mask": mask}, "mask or key_padding_mask, not both: mask is True where .* real"),
        ({"key_padding_mask": mask[:, :4]}, r"key_padding_mask must be bool or 0/1 \[2, 5\] on cpu; got .* \[2, 4\]"),
        ({"activation": "silu"}, "activation must be one of tanh, relu, gelu; got 'silu'"),
        ({"dropout_p": 1.5}, "dropout_p must be from 0 to 1; got 1.5"),
        ({"dropout_p": -0.1}, "dropout_p must be from 0 to 1; got -0.1"),
        ({"dropout_p": float("nan")}, "dropout_p must be from 0 to 1; got nan"),
        ({"generator": torch.Generator()}, "generator was given, but dropout_p is 0"),
        ({"masked_score": float("nan")}, "masked_score must be finite or -inf; got nan"),
        ({"masked_score": float("inf")}, "masked_score must be finite or -inf; got inf"),
    ]:
        for function in (gated_attention_pool, attention_scores):
            with pytest.raises(ValueError, match=words):
                function(*small("cpu"), **kwargs)
    with pytest.raises(ValueError, match="generator must be on h's device meta; it is on cpu"):
        meta = [x.to("meta") for x in small("cpu")]
        gated_attention_pool(*meta, dropout_p=0.5, generator=torch.Generator())
    h, v, bv, u, bu, w, bw = small("cpu")
    with pytest.raises(ValueError, match="w_bias must have v_weight's dtype torch.float32 .*; got torch.float64"):
        attention_scores(h, v, bv, u, bu, w, bw.double())
    ragged = {"cu_seqlens": torch.tensor([0, 3, 2, 5])}
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to T = 5 without falling; got \[0, 3, 2, 5\]"):
        attention_scores(h[0], v, bv, u, bu, w, bw, **ragged)
    s, x = torch.ones(2, 1, 5), torch.ones(2, 5, 4)
    for arguments, kwargs, words in [
        ((s, x[:, :4]), {}, r"must be \[B, K, N\] with value \[B, N, D\].*got scores \[2, 1, 5\], value \[2, 4, 4\]"),
        ((s[:1], x), {}, r"got scores \[1, 1, 5\], value \[2, 5, 4\]"),
        ((s, x[0]), {}, r"got scores \[2, 1, 5\], value \[5, 4\]"),
        ((s, x), {"cu_seqlens": torch.tensor([0, 5])}, "and cu_seqlens"),
        ((s[0], x[0]), ragged, r"got \[0, 3, 2, 5\]"),
        ((s[0], x[0]), {"cu_seqlens": torch.tensor([0.0, 5])}, "cu_seqlens must be int32 or int64"),
        ((s[0], x[0]), {"cu_seqlens": torch.tensor([0, 5]), "mask": mask[0]}, "mask is for dense bags"),
        ((s.long(), x), {}, "scores and value must be floating point; got torch.int64 and torch.float32"),
        ((s, x.to("meta")), {}, "scores and value must be on one device; got cpu and meta"),
        ((s, x), {"mask": mask[:, :3]}, r"mask must be bool or 0/1 \[2, 5\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            pool_by_scores(*arguments, **kwargs)


@before_backends
def test_an_error_draws_nothing():
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="mask must be bool or 0/1"):
        gated_attention_pool(*small("cpu"), dropout_p=0.5, mask=torch.ones(1, 1))
    assert torch.equal(state, torch.get_rng_state())


@before_backends
def test_weights_that_autocast_leaves_apart_are_refused():
    h, v, bv, u, bu, w, bw = small("cpu")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="u_weight must have v_weight's dtype"):
        gated_attention_pool(h, v, bv, u.double(), bu, w, bw)


on_the_host = pytest.mark.parametrize("backend", [
    name for name in backends_for("attention_scores", *pool_arguments()) if name in ("cpu", "reference")
])


@before_backends
@on_the_host
@pytest.mark.parametrize("bounds", [[0, 3], [0], [1, 5], [0, 4, 3, 5], [0, 6]])
def test_bounds_that_do_not_fit_raise_where_python_reads_nothing(backend, bounds):
    """In compiled graphs and direct calls the kernels check the bounds."""
    h, *weights = small("cpu")
    with pytest.raises((RuntimeError, ValueError), match="cu_seqlens must rise from 0 to T = 5 without falling"):
        torch.ops.ercn.gated_attention_pool(
            h[0], *weights, None, torch.tensor(bounds), None, 0.0, "tanh", backend
        )


@before_backends
@on_the_host
def test_an_operator_without_a_seed_drops_nothing_in_silence(backend):
    with pytest.raises((RuntimeError, ValueError), match="dropout needs a seed"):
        torch.ops.ercn.attention_scores(*small("cpu"), None, None, None, 0.5, "tanh", backend)


@of_scores
def test_autocast(backend):
    h, *weights = small(backend)
    value, scores = torch.ones_like(h), attention_scores(h, *weights, backend=backend)
    with torch.autocast(h.device.type, dtype=torch.bfloat16):
        low = attention_scores(h, *weights, backend=backend)
        pooled = pool_by_scores(scores, value, backend=backend)
    assert low.dtype == torch.float32 and pooled.dtype == torch.bfloat16
    assert torch.equal(low, attention_scores(*(x.bfloat16() for x in (h, *weights)), backend=backend))
    assert torch.equal(pooled, pool_by_scores(scores, value.bfloat16(), backend=backend))


@of_dropout
def test_vmap_draws_by_its_randomness(backend):
    h, *weights = small(backend)
    stack = torch.stack([h, h])

    def call(x):
        return gated_attention_pool(x, *weights, dropout_p=0.5, backend=backend)

    same = torch.vmap(call, randomness="same")(stack)
    assert all(torch.equal(x[0], x[1]) for x in same)
    torch.manual_seed(0)
    different = torch.vmap(call, randomness="different")(stack)
    assert not torch.equal(different[1][0], different[1][1])
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(call)(stack)


@of_values
def test_vmap_of_scores_and_values(backend):
    scores, value = on(backend, randn(3, 2, 2, 7, seed=1).float(), randn(3, 2, 7, 4, seed=2).float())
    bounds = on(backend, torch.tensor([0, 3, 7]))[0]
    for call, tensors in (
        (lambda s, x: pool_by_scores(s, x, backend=backend), (scores, value)),
        (lambda s, x: pool_by_scores(s, x, cu_seqlens=bounds, backend=backend), (scores[:, 0], value[:, 0])),
    ):
        leaves = [x.detach().requires_grad_() for x in tensors]
        mapped = torch.vmap(call)(*leaves)
        looped = torch.stack([call(*x) for x in zip(*leaves)])
        ours, theirs = ((x, *torch.autograd.grad(x.square().sum(), leaves)) for x in (mapped, looped))
        assert all(error(a, b) < 1e-6 for a, b in zip(ours, theirs))


@of_values
def test_flops(backend):
    """18 instances, D 4, L 3, K 2: two projections of 432, narrow products 216 (L) and 288 (D)."""
    leaves = [x.float().requires_grad_() for x in on(backend, *inputs(2, 9, 4, 3, 2))]
    with FlopCounterMode(display=False) as flops:
        scores = attention_scores(*leaves, backend=backend)
    assert flops.get_total_flops() == 2 * 432 + 216
    with FlopCounterMode(display=False) as flops:
        scores.sum().backward()
    assert flops.get_total_flops() == 3 * 2 * 432 + 2 * 216
    scores, value = scores.detach().requires_grad_(), leaves[0].detach().requires_grad_()
    with FlopCounterMode(display=False) as flops:
        pooled = pool_by_scores(scores, value, backend=backend)
    assert flops.get_total_flops() == 288
    with FlopCounterMode(display=False) as flops:
        pooled.sum().backward()
    assert flops.get_total_flops() == 2 * 288


@before_backends
def test_shapes_without_data():
    arguments = [x.to("meta") for x in small("cpu")]
    pooled, scores = gated_attention_pool(*arguments, dropout_p=0.5, mask=torch.ones(2, 5, device="meta"))
    assert pooled.shape == (2, 1, 4) and scores.shape == (2, 1, 5)
    assert gated_attention_pool(arguments[0].bfloat16(), *arguments[1:])[0].dtype == torch.float32
    assert pool_by_scores(scores[0], arguments[0][0].half()).shape == (1, 4)
