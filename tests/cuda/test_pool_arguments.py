"""Dropout, activations, scores alone and pooling by scores on the pool's CUDA kernels: on a GPU, or emulated."""

from __future__ import annotations

import itertools

import pytest
import torch
from _cuda import DEVICE, HOPPER, marks, operators, pool_with
from _ops import assert_within_budget, finite_parts, randn
from _pool import inputs, kept, leaf, pooled_of, twin

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = marks(DEVICE)
DEVICES = {"generic": DEVICE, "sm90": HOPPER}
SEED = torch.tensor([-(2**62) + 12345])


def results(function, device, arguments, dtype, mask=None, cu_seqlens=None, **kwargs):
    """Outputs and all gradients; the scores of masked instances are 0."""
    leaves = [None if x is None else leaf(x.to(device, dtype)) for x in arguments]
    where = [None if x is None else x.to(device) for x in (mask, cu_seqlens)]
    outputs = function(*leaves, mask=where[0], cu_seqlens=where[1], **kwargs)
    outputs = [outputs[0], outputs[1] if mask is None else outputs[1].masked_fill(~where[0][:, None], 0)]
    seeds = [randn(*x.shape, seed=s).to(x) for s, x in ((8, outputs[0]), (9, outputs[1]))]
    outputs += torch.autograd.grad(outputs, [x for x in leaves if x is not None], seeds)
    return [x.detach().cpu() for x in outputs]


def check(family, arguments, dtype, dropout_p=0.0, **kwargs):
    arguments = [None if x is None else x.to(dtype) for x in arguments]
    pool = pool_with(family, device=DEVICES[family])
    seed = SEED.to(DEVICES[family]) if dropout_p else None
    ours = results(pool, DEVICES[family], arguments, dtype, dropout_p=dropout_p, seed=seed, **kwargs)
    seed = SEED if dropout_p else None
    plain, exact = (
        results(twin, "cpu", arguments, cast, dropout_p=dropout_p, seed=seed, **kwargs)
        for cast in (dtype, torch.float64)
    )
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert mine.isfinite().all()
        assert_within_budget(mine, torchs, truth)


MASK = torch.arange(2 * 70).view(2, 70) % 3 > 0
BOUNDS = torch.tensor([0, 1, 66, 67, 70])
OPTIONS = [("tanh", 0.25), ("relu", 0.25), ("gelu", 0.25), ("gelu", 0.0)]


@pytest.mark.parametrize("activation, dropout_p", OPTIONS, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_generic_within_budget(dtype, gated, activation, dropout_p):
    """D and L are multiples of no tile; bags are ragged in float32, else masked."""
    hidden = {FP32: 77, BF16: 65, FP16: 24}[dtype]
    ragged = dtype == FP32
    arguments = inputs(None if ragged else 2, 70, 25, hidden, heads=2, gated=gated)
    bags = {"cu_seqlens": BOUNDS} if ragged else {"mask": MASK}
    check("generic", arguments, dtype, dropout_p, activation=activation, **bags)


@pytest.mark.parametrize("activation, dropout_p", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype, hidden, ragged", [(BF16, 192, False), (FP16, 64, True)], ids=str)
def test_hopper_within_budget(dtype, hidden, ragged, activation, dropout_p):
    arguments = inputs(None if ragged else 2, 70, 64, hidden, heads=2)
    bags = {"cu_seqlens": BOUNDS} if ragged else {"mask": MASK}
    check("sm90", arguments, dtype, dropout_p, activation=activation, **bags)


@pytest.mark.parametrize("dropout_p", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("family, gated", [("generic", True), ("generic", False), ("sm90", True)], ids=str)
def test_bits_of_the_mask(family, gated, ragged, dropout_p):
    """Saturated branches are 1, and a head's weights are powers of two, so its scores hold the bits of 24 units."""
    hidden, heads, dim = 192, 8, 64
    h = torch.ones(70, dim) if ragged else torch.ones(2, 35, dim)
    v = torch.ones(hidden, dim)
    w = torch.zeros(heads, hidden)
    for k in range(heads):
        w[k, 24 * k : 24 * (k + 1)] = 2.0 ** torch.arange(24)
    arguments = [x if x is None else x.to(DEVICES[family], BF16) for x in (h, v, None, v if gated else None, None, w)]
    cu_seqlens = torch.tensor([0, 3, 70], device=DEVICES[family]) if ragged else None
    pool = pool_with(family, device=DEVICES[family])
    seed = SEED.to(DEVICES[family])
    scores = pool(*arguments, None, cu_seqlens=cu_seqlens, seed=seed, dropout_p=dropout_p)[1].cpu()
    of_v, of_u = kept(int(SEED), dropout_p, torch.arange(70).view(h.shape[:-1]), hidden)
    scale = 65536 / max(65536 - round(65536 * dropout_p), 1)
    expected = ((of_v & of_u if gated else of_v).double() @ w.double().mT).float()
    expected *= torch.tensor(scale * scale if gated else scale)
    assert torch.equal(scores, expected.mT)


@pytest.mark.parametrize("family", DEVICES)
def test_no_dropout(family):
    """A probability that rounds to 0 changes no bit."""
    device = DEVICES[family]
    arguments = inputs(2, 70, 64, 64, heads=2)
    pool = pool_with(family, device=device)
    runs = [
        results(pool, device, arguments, BF16, mask=MASK, **kwargs)
        for kwargs in ({}, {"dropout_p": 2**-18, "seed": SEED.to(device)})
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("family", DEVICES)
def test_everything_dropped(family):
    device = DEVICES[family]
    arguments = [x.to(device, BF16) for x in inputs(1, 70, 64, 64, heads=2)]
    pool = pool_with(family, device=device)
    leaves = [leaf(x) for x in arguments]
    pooled, scores = pool(*leaves, dropout_p=1.0, seed=SEED.to(device))
    assert torch.equal(scores, arguments[6].float()[:, None].expand(1, 2, 70))
    grads = torch.autograd.grad((pooled, scores), leaves, (torch.ones_like(pooled), torch.ones_like(scores)))
    assert all((grad == 0).all() for grad in grads[1:6]) and grads[0].isfinite().all() and (grads[6] == 70).all()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("family", DEVICES)
def test_large_activations_in_half_precision(family, activation):
    """act(v) has no bound, and it is a factor of the gradient of u, which passes through float16."""
    arguments = inputs(1, 70, 64, 64, heads=2)
    arguments[2] = 2000 + 8 * arguments[2]
    arguments[5] = arguments[5] / 256
    check(family, arguments, FP16, activation=activation)


@pytest.mark.parametrize("family", DEVICES)
def test_dropout_of_most_units_in_half_precision(family):
    """Units that stay are scaled by 400, and the gradients of the branches pass through float16."""
    check(family, inputs(1, 70, 64, 64, heads=2), FP16, 0.95)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("family", DEVICES)
def test_nan_and_inf_propagate(family, bad, activation):
    arguments = [x.to(BF16) for x in inputs(2, 70, 64, 64, 3)]
    arguments[0][1, 2, 3] = bad
    pool = pool_with(family, device=DEVICES[family])
    ours = pool(*(x.to(DEVICES[family]) for x in arguments), activation=activation)
    for mine, theirs in zip(ours, twin(*arguments, activation=activation), strict=True):
        finite_parts(mine.cpu(), theirs)


@pytest.mark.parametrize("family", DEVICES)
def test_scores_alone(family):
    """The bits of the pool's scores, masked ones too, with more channels and units than shared memory holds."""
    device = DEVICES[family]
    arguments = [x.to(device, BF16) for x in inputs(2, 70, 576, 192, heads=3)]
    options = (MASK.to(device), None, SEED.to(device), 0.25, "gelu")
    ops = operators(device)
    alone = ops.attention_scores_cuda(*arguments, *options, False, family)
    assert torch.equal(alone, ops.gated_attention_pool_cuda(*arguments, *options, False, family)[1])
    ragged = [arguments[0][0], *arguments[1:]]
    options = (None, BOUNDS.to(device), None, 0.0, "tanh")
    alone = ops.attention_scores_cuda(*ragged, *options, False, family)
    assert torch.equal(alone, ops.gated_attention_pool_cuda(*ragged, *options, False, family)[1])


def by_hand(scores, value, mask=None, cu_seqlens=None):
    if cu_seqlens is not None:
        bounds = itertools.pairwise(cu_seqlens.tolist())
        return torch.cat([by_hand(scores[None, :, a:b], value[None, a:b]) for a, b in bounds])
    return pooled_of(scores, value.to(scores.dtype), mask).to(value.dtype)


@pytest.mark.parametrize("layout", ["rows", "channels_first", "masked", "ragged"])
@pytest.mark.parametrize("heads, dim, dtype", [(1, 264, FP32), (9, 25, BF16), (2, 64, FP16)], ids=str)
def test_pool_by_scores(heads, dim, dtype, layout):
    """Given scores, -inf among them; masked instances are NaN."""
    ragged = layout == "ragged"
    shape = (70,) if ragged else (2, 72)
    value = randn(*shape, dim, seed=1).to(dtype)
    scores = randn(*((heads, *shape) if ragged else (2, heads, 72)), seed=2).float()
    scores[..., 5] = float("-inf")
    mask, cu_seqlens = None, BOUNDS if ragged else None
    if layout == "masked":
        mask = torch.arange(2 * 72).view(2, 72) % 3 > 0
        value[~mask] = float("nan")
        scores = scores.masked_fill(~mask[:, None], float("nan"))
    if layout == "channels_first":
        value = value.mT.contiguous().mT
    grad = randn(len(BOUNDS) - 1 if ragged else 2, heads, dim, seed=3).to(dtype)
    ops, where = operators(DEVICE), [None if x is None else x.to(DEVICE) for x in (mask, cu_seqlens)]
    given = (scores.to(DEVICE), value.to(DEVICE), *where)
    grads = ops.pool_by_scores_backward_cuda(grad.to(DEVICE), *given, True, True)
    for needs in ((True, False), (False, True)):
        some = ops.pool_by_scores_backward_cuda(grad.to(DEVICE), *given, *needs)
        assert all(torch.equal(a, b) if need else a.numel() == 0 for a, b, need in zip(some, grads, needs))
    both = [[x.cpu() for x in (ops.pool_by_scores_cuda(*given), *grads)]]
    for score_type, cast in ((FP32, dtype), (torch.float64, torch.float64)):
        leaves = [leaf(scores.nan_to_num(0, neginf=float("-inf")).to(score_type)), leaf(value.to(cast))]
        pooled = by_hand(*leaves, mask, cu_seqlens)
        both.append([pooled.detach(), *torch.autograd.grad(pooled, leaves, grad.to(cast))])
    for mine, torchs, truth in zip(*both, strict=True):
        assert mine.isfinite().all()
        assert_within_budget(mine, torchs, truth)


def test_pool_by_scores_of_nothing():
    ops, device = operators(DEVICE), DEVICE
    for shape, bounds in (((2, 0, 4), None), ((0, 5, 4), None), ((0, 4), [0, 0, 0])):
        value = torch.ones(shape, device=device)
        scores = torch.ones((3, shape[0]) if bounds else (shape[0], 3, shape[1]), device=device)
        bounds = None if bounds is None else torch.tensor(bounds, device=device)
        pooled = ops.pool_by_scores_cuda(scores, value, None, bounds)
        assert pooled.shape == (shape[0] if bounds is None else 2, 3, 4) and (pooled == 0).all()
        grads = ops.pool_by_scores_backward_cuda(pooled, scores, value, None, bounds, True, True)
        assert [x.shape for x in grads] == [scores.shape, value.shape]


def test_refused_arguments():
    ops = operators(DEVICE)
    arguments = [x.to(DEVICE, FP32) for x in inputs(1, 4, 8, 8)]

    def refused(words, *options):
        with pytest.raises(RuntimeError, match=words):
            ops.attention_scores_cuda(*arguments, None, None, *options, True, "generic")

    seed = SEED.to(DEVICE)
    refused("activations are tanh, relu and gelu; got swish", None, 0.0, "swish")
    refused("dropout needs a seed", None, 0.5, "tanh")
    refused("dropout needs a seed", seed.int(), 0.5, "tanh")
    refused("dropout needs a seed", seed.expand(2), 0.5, "tanh")
    refused("dropout_p must be in", seed, 1.5, "tanh")
    with pytest.raises(RuntimeError, match="scores must be float32"):
        ops.pool_by_scores_cuda(torch.ones(1, 1, 4, device=DEVICE).double(), arguments[0], None, None)
