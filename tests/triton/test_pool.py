"""The pool's dropout, activations, dtypes, and its scores alone, in Triton: on a GPU, or interpreted.

Bit for bit on exact inputs (``ercn.benchmarks.exact``), else against the float64 twin with the same dropout mask.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _gpu_backends import BACKENDS, DEVICE, here
from _ops import assert_within_budget, layouts, randn
from _pool import inputs, philox, twin

if "triton" not in BACKENDS:
    pytest.skip("triton cannot be used in this process", allow_module_level=True)

import triton
import triton.language as tl

from ercn.benchmarks import exact
from ercn.kernels import configs
from ercn.kernels._dropout import unit_words
from ercn.ops import reference
from ercn.ops._arguments import DIFFERENTIABLE

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])
]

SEED = torch.tensor([-0x0123456789ABCDEF])  # both halves of the key have their highest bit
BAGS = {
    "rows": {"instances": 36, "bags": 2},
    "channels_first": {"instances": 36, "bags": 2, "layout": "channels_first"},
    "ragged": {"instances": [0, 33, 1, 0, 20]},
    "masked": {"instances": 36, "bags": 2, "mask": torch.arange(36).remainder(3).gt(0).expand(2, 36)},
}
OPS = torch.ops.ercn


@triton.jit
def words_of_units(seed, out, first_row, first_unit, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr):
    r = first_row + tl.arange(0, BLOCK_M)
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    tl.store(out + at, unit_words(tl.load(seed), r, first_unit, BLOCK_M, BLOCK_L).to(tl.int64))


@pytest.mark.parametrize("block_l, first_unit", [(32, 0), (32, 32), (32, 96), (64, 64), (128, 128)])
def test_words_of_the_generator(block_l, first_unit):
    unit, row = np.meshgrid(np.arange(first_unit, first_unit + block_l), np.arange(5, 21))
    counter = np.stack([row, 0 * row, unit // 64 * 16 + unit % 16, 0 * row], -1)
    for seed in (SEED, torch.tensor([0])):
        out = here(torch.empty(16, block_l, dtype=torch.int64))
        words_of_units[(1,)](here(seed), out, 5, first_unit, BLOCK_M=16, BLOCK_L=block_l)
        words = philox(counter, np.array([int(seed) & 0xFFFFFFFF, int(seed) >> 32 & 0xFFFFFFFF]))
        expected = np.take_along_axis(words, (unit // 16 % 4)[..., None], -1)[..., 0]
        assert np.array_equal(out.cpu().numpy().astype(np.uint64), expected)


def test_published_words_of_the_generator():
    """The first block under key 0, from Random123."""
    out = here(torch.empty(16, 64, dtype=torch.int64))
    words_of_units[(1,)](here(torch.tensor([0])), out, 0, 0, BLOCK_M=16, BLOCK_L=64)
    assert out[0, ::16].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def assert_exact(found, expected):
    assert exact.differences({name: x.cpu() for name, x in found.items() if x is not None}, expected) is None


def scores_and_gradients(p, seed, dropout_p, activation):
    """attention_scores and its backward, by the names of ``expected_scores``."""
    arguments = [here(x) for x in (*p.inputs, p.mask, p.cu_seqlens, seed)] + [dropout_p, activation]
    scores = OPS.attention_scores(*arguments, "triton")
    needs = [x is not None for x in p.inputs]
    grads = OPS.gated_attention_pool_backward(None, here(p.grad_scores), *arguments, scores, needs, "triton")
    named = zip(DIFFERENTIABLE, grads, needs)
    return {"scores": scores, **{f"grad_{name}": grad if need else None for name, grad, need in named}}


def check_scores(kind, activation="tanh", dropped=True, **kinds):
    p = exact.pool(dim=40, hidden=70, heads=3, **BAGS[kind], **kinds)
    factors = None
    if dropped:
        instances = torch.arange(p.h[..., 0].numel())
        factors = reference.dropout_factors(SEED, 0.5, instances, 70, torch.float32)
    found = scores_and_gradients(p, SEED if dropped else None, 0.5 if dropped else 0.0, activation)
    expected = exact.expected_scores(p, activation, factors)
    assert_exact(found, {name: x for name, x in expected.items() if x is not None})


@pytest.mark.parametrize("kind", BAGS)
def test_scores_with_dropout(kind):
    check_scores(kind, dtype=torch.bfloat16)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scores_of_activations(activation, dtype):
    check_scores("rows", activation, dropped=dtype == torch.float32, dtype=dtype)


def test_scores_of_plain_attention_with_dropout():
    check_scores("rows", dtype=torch.float32, gated=False, bias=False)


def test_scores_with_dropout_in_several_pieces(monkeypatch):
    monkeypatch.setattr(configs, "WORKSPACE_BYTES", 1)
    check_scores("ragged", dtype=torch.float32)


@pytest.mark.parametrize("kind, dtype", [("channels_first", torch.bfloat16), ("ragged", torch.float16)], ids=str)
def test_pool_and_scores_of_wider_weights(kind, dtype):
    sizes = {"dtype": dtype, "weights_dtype": torch.float32}
    check_scores(kind, **sizes)
    p = exact.pool(dim=40, hidden=35, heads=2, **BAGS[kind], **sizes)
    plain = [here(x) for x in (*p.inputs, p.mask, p.cu_seqlens)] + [None, 0.0, "tanh"]
    pooled, scores = OPS.gated_attention_pool(*plain, "triton")
    upstream = here(p.grad_pooled), here(p.grad_scores)
    grads = OPS.gated_attention_pool_backward(*upstream, *plain, scores, [True] * 7, "triton")
    found = {"pooled": pooled, "scores": scores, **dict(zip((f"grad_{name}" for name in DIFFERENTIABLE), grads))}
    assert_exact(found, exact.expected_pool(p))


def test_pool_of_narrower_weights():
    """float32 h beside float16 weights: the products are float32."""
    p = exact.pool(dim=20, hidden=35, heads=2, dtype=torch.float32, weights_dtype=torch.float16, **BAGS["rows"])
    pooled, scores = OPS.gated_attention_pool(*(here(x) for x in p.inputs), None, None, None, 0.0, "tanh", "triton")
    expected = exact.expected_pool(p)
    assert pooled.dtype == torch.float32 and torch.equal(pooled.cpu(), expected["pooled"].float())
    assert torch.equal(scores.cpu(), expected["scores"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BAGS)
def test_pool_by_scores(kind, dtype):
    p = exact.pool(dim=40, hidden=3, heads=3, dtype=dtype, **BAGS[kind])
    scores, expected = exact.by_scores(p)
    given = [here(x) for x in (scores, p.h, p.mask, p.cu_seqlens)]
    grad = here(p.grad_pooled)
    found = {"pooled": OPS.pool_by_scores(*given, "triton")}
    found |= zip(("grad_scores", "grad_value"), OPS.pool_by_scores_backward(grad, *given, [True, True], "triton"))
    assert_exact(found, expected)
    for needs in ([True, False], [False, True]):
        alone = OPS.pool_by_scores_backward(grad, *given, needs, "triton")
        assert [x.numel() > 0 for x in alone] == needs
        assert_exact({n: x for n, x in zip(("grad_scores", "grad_value"), alone) if x.numel()}, {
            n: expected[n] for n, need in zip(("grad_scores", "grad_value"), needs) if need
        })


def test_pool_by_scores_of_any_strides_and_dtypes(finite_products):
    scores, value = randn(2, 3, 41, seed=1), randn(2, 41, 9, seed=2, dtype=torch.float32)
    plain, exactly = (torch.softmax(scores.to(x), -1) @ value.to(x) for x in (torch.float32, torch.float64))
    for kind, x in layouts(value).items():
        if kind != "expanded":
            given = here(layouts(scores.float())[kind]), here(x)
            assert_within_budget(OPS.pool_by_scores(*given, None, None, "triton").cpu(), plain, exactly)
    half = scores.bfloat16()
    pooled = OPS.pool_by_scores(here(half), here(value), None, None, "triton").cpu()
    plain, exactly = (torch.softmax(half.to(x), -1) @ value.to(x) for x in (torch.float32, torch.float64))
    assert pooled.dtype == torch.float32
    assert_within_budget(pooled, plain, exactly)


def test_pool_by_scores_of_nothing():
    one = here(torch.ones(2, 5, 4))
    none = here(torch.tensor([[False] * 5, [True] * 5]))
    scores = here(torch.full((2, 3, 5), float("nan"))).masked_fill(none[:, None], 1.0)
    pooled = OPS.pool_by_scores(scores, one, none, None, "triton")
    assert (pooled[0] == 0).all() and (pooled[1] == 1).all()
    grads = OPS.pool_by_scores_backward(torch.ones_like(pooled), scores, one, none, None, [True, True], "triton")
    assert all((grad[0] == 0).all() for grad in grads)
    for b, n, k, d in ((2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 3, 0), (2, 5, 0, 4)):
        given = here(torch.ones(b, k, n)), here(torch.ones(b, n, d)), None, None
        pooled = OPS.pool_by_scores(*given, "triton")
        assert pooled.shape == (b, k, d) and (n > 0 or (pooled == 0).all())
        grads = OPS.pool_by_scores_backward(torch.ones_like(pooled), *given, [True, True], "triton")
        assert all(torch.equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, given))


def call(*leaves, mask=None, cu_seqlens=None, activation="tanh", seed=None, dropout_p=0.0):
    return OPS.gated_attention_pool(*leaves, mask, cu_seqlens, seed, dropout_p, activation, "triton")


def run(function, arguments, **options):
    leaves = [x.detach().requires_grad_() for x in arguments]
    outputs = function(*leaves, **options)
    seeds = [randn(*x.shape, seed=9 + i).to(x) for i, x in enumerate(outputs)]
    return *outputs, *torch.autograd.grad(outputs, leaves, seeds)


@pytest.mark.parametrize("activation, p, dtype", [
    ("tanh", 0.25, torch.bfloat16), ("relu", 0.1, torch.float32), ("gelu", 0.25, torch.float32),
], ids=str)  # fmt: skip
def test_pool_with_dropout_against_the_twin(activation, p, dtype):
    arguments = [x.to(dtype) for x in inputs(2, 37, 20, 45, heads=2)]
    options = {"activation": activation, "dropout_p": p}
    ours = run(call, [here(x) for x in arguments], seed=here(SEED), **options)
    again = run(call, [here(x) for x in arguments], seed=here(SEED), **options)
    casts = ([x.to(cast) for x in arguments] for cast in (dtype, torch.float64))
    plain, exactly = (run(twin, x, seed=SEED, **options) for x in casts)
    for mine, same, torchs, truth in zip(ours, again, plain, exactly, strict=True):
        assert torch.equal(mine, same)
        assert_within_budget(mine.cpu(), torchs, truth)


def test_pool_with_extreme_dropout():
    arguments = [here(x.float()) for x in inputs(2, 37, 20, 45, heads=2)]
    never, hardly = run(call, arguments), run(call, arguments, seed=here(SEED), dropout_p=2.0**-18)
    assert all(torch.equal(a, b) for a, b in zip(never, hardly))
    _, scores, *grads = run(call, arguments, seed=here(SEED), dropout_p=1.0)
    assert torch.equal(scores, arguments[6][:, None].expand_as(scores))
    assert all((grad == 0).all() for grad in grads[1:6])


def test_pool_dropout_numbers_instances_of_all_bags():
    """Ragged rows and dense bags have the same dropout mask."""
    h, *weights = (here(x.float()) for x in inputs(2, 34, 20, 45, heads=2))
    dense = call(h, *weights, seed=here(SEED), dropout_p=0.5)
    bounds = here(torch.tensor([0, 34, 68]))
    ragged = call(h.flatten(0, 1), *weights, seed=here(SEED), dropout_p=0.5, cu_seqlens=bounds)
    assert torch.allclose(dense[0], ragged[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(dense[1], ragged[1].view(2, 2, 34).transpose(0, 1), rtol=1e-5, atol=1e-5)
