"""The operators on every GPU backend against plain torch in float64.

On a GPU, or on the CPU in separate processes: Triton interpreted (tests/triton/test_interpreter.py), CUDA C++ emulated
(tests/cuda/test_emulated.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from _affinity import by_formula, dense, dense_propagate, off_kink, with_gradients
from _gpu_backends import BACKENDS, DEVICE, here
from _ops import assert_within_budget, error, finite_parts, golden, layouts, randn
from _pool import assert_pool, budget, gradients, inputs, leaf, pool_results, twin
from hypothesis import given, settings
from hypothesis import strategies as st

from ercn.benchmarks.settings import precision
from ercn.ops import affinity_propagate, gated_attention_pool, relu_affinity, use_backend

if not BACKENDS:
    pytest.skip("no GPU backend can be used in this process", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, C, D, N: ones, primes, tile sizes plus or minus one, more channels than a block, many and few features.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 22, 64, 63), (1, 6, 33, 65), (3, 1, 8, 31), (1, 70, 16, 33), (2, 4, 100, 34)]
SHAPES += [(1, 5, 20, 131), (1, 2, 150, 121)]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def affinity_results(value, feat, grad, dtype, value_dtype=torch.float32):
    """(out, grad_value, grad_feat) of the kernels, of plain torch in the dtype, and in float64."""
    tensors = (here(grad.float()), here(value.to(value_dtype)), here(feat.to(dtype)))
    ours = with_gradients(relu_affinity, *tensors)
    plain = with_gradients(dense, *(here(x.to(dtype)) for x in (grad, value, feat)))
    exact = with_gradients(dense, grad, value.to(value_dtype).double(), feat.to(dtype).double())
    return ours, plain, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affinity_within_budget(shape, dtype):
    b, c, d, n = shape
    ours, plain, exact = affinity_results(
        randn(b, c, n, seed=1), off_kink(b, d, n).to(dtype).double(), randn(b, c, n, seed=2), dtype
    )
    assert ours[0].dtype == torch.float32 and ours[0].is_contiguous()
    assert ours[1].dtype == torch.float32 and ours[2].dtype == dtype
    budget(ours, plain, exact, channels=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_affinity_of_half_precision_maps(dtype):
    value, feat, grad = randn(1, 3, 45, seed=1), off_kink(1, 20, 45), randn(1, 3, 45, seed=2)
    budget(*affinity_results(value, feat, grad, dtype, dtype), channels=True)


def tf32(x):
    """float32 x rounded to the 10 fraction bits of TF32."""
    return ((x.float().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def test_affinity_in_tf32():
    value, feat, grad = (randn(1, 6, 65, seed=1), off_kink(1, 40, 65).float().double(), randn(1, 6, 65, seed=2))
    with precision("tf32"):
        ours, _, exact = affinity_results(value, feat, grad, torch.float32)
    budget(ours, with_gradients(dense, *(tf32(x) for x in (grad, value, feat))), exact, channels=True)


@pytest.mark.parametrize("name", ["pcm_small", "pcm_seam_width", "pcm_relu_features"])
def test_affinity_matches_published_seam(name):
    data = golden(name)
    cam, feat = here(data["cam"].float()).requires_grad_(), here(data["feat"].float()).requires_grad_()
    out = affinity_propagate(cam, feat)
    (grad_cam,) = torch.autograd.grad(out, cam, here(data["grad_out"].float()))
    flat = [x.flatten(2).detach().requires_grad_() for x in (cam, feat)]
    plain = dense_propagate(*flat)
    (plain_grad,) = torch.autograd.grad(plain, flat[0], here(data["grad_out"].float()).flatten(2))
    pairs = [x.view_as(out) for x in (plain, plain_grad)]
    budget((out, grad_cam), pairs, (data["out"], data["grad_cam"]), channels=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "offset", "expanded"])
def test_affinity_of_any_strides(layout, finite_products):
    value, feat, grad = (here(layouts(randn(2, k, 35, seed=k, dtype=torch.float32))[layout]) for k in (3, 5, 4))
    grad = grad[:, :3]
    ours = with_gradients(relu_affinity, grad, value, feat)
    plain = with_gradients(dense, grad, value, feat)
    exact = with_gradients(dense, *(x.double() for x in (grad, value, feat)))
    budget(ours, plain, exact, channels=True)


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=str)
def test_affinity_gradients_asked_for(need):
    value, feat = here(randn(2, 3, 40, seed=1).float()), here(off_kink(2, 6, 40).float())
    grad = here(randn(2, 3, 40, seed=3).float())
    leaves = [x.detach().requires_grad_(n) for x, n in zip((value, feat), need)]
    relu_affinity(*leaves).backward(grad)
    (_, *plain), (_, *exact) = (
        with_gradients(dense, *(x.to(cast) for x in (grad, value, feat))) for cast in (torch.float32, torch.float64)
    )
    for mine, n, torchs, truth in zip(leaves, need, plain, exact):
        assert (mine.grad is not None) == n
        if n:
            budget([mine.grad], [torchs], [truth], channels=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affinity_keeps_constants_and_range(dtype):
    feat = here(randn(2, 16, 61, dtype=dtype))
    constant = here(torch.full((2, 3, 61), 0.7))
    assert error(affinity_propagate(constant, feat), constant.double()) < 2e-5
    cam = here(torch.rand(2, 3, 61, generator=torch.Generator().manual_seed(0)))
    out = affinity_propagate(cam, feat)
    low, high = cam.amin(-1, keepdim=True), cam.amax(-1, keepdim=True)
    assert (out >= low * (1 - 2e-5) - 1e-6).all() and (out <= high + 1e-6).all()


def test_affinity_commutes_with_pixel_permutation():
    cam, feat = here(randn(1, 3, 50, seed=1).float()), here(randn(1, 8, 50, seed=2).float())
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(cam.device)
    permuted = affinity_propagate(cam[..., order], feat[..., order])
    exact = dense_propagate(cam.double(), feat.double())[..., order]
    assert_within_budget(permuted.cpu(), dense_propagate(cam, feat)[..., order].cpu(), exact.cpu(), channels=True)


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 3, 0), (2, 0, 3, 5), (1, 2, 0, 5)], ids=str)
def test_affinity_empty(shape):
    b, c, d, n = shape
    value, feat = (here(torch.ones(b, k, n)).requires_grad_() for k in (c, d))
    out = relu_affinity(value, feat)
    assert out.shape == (b, c, n) and (out == 0).all()
    grads = torch.autograd.grad(out.sum(), (value, feat))
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(grads, (value, feat)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["value", "feat"])
@pytest.mark.parametrize("n", [20, 130], ids=["dense", "triangle"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_affinity_propagates_nan_and_inf(where, bad, n):
    value, feat, grad = (randn(1, k, n, seed=k) for k in (2, 12, 3))
    grad = grad[:, :2]
    {"value": value, "feat": feat}[where][0, 1, 7] = bad
    single = [here(x.float()) for x in (grad, value, feat)]
    ours = with_gradients(relu_affinity, *single)
    for a, e in zip(ours, by_formula(grad, value, feat)):
        a = a.cpu().double()
        assert torch.allclose(*finite_parts(a, e), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_affinity_runs_are_bit_equal(dtype):
    value, feat, grad = (here(randn(2, k, 123, seed=k, dtype=torch.float32)) for k in (4, 33, 4))
    runs = [
        with_gradients(
            relu_affinity, grad, value, feat.to(dtype)
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_affinity_of_any_shape_property(data):
    b, c, d, n = (
        data.draw(st.integers(1, high), label=k) for k, high in (("B", 3), ("C", 40), ("D", 70), ("N", 140))
    )
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    kind = data.draw(st.sampled_from(["contiguous", "channels_last", "strided", "offset"]), label="layout")
    value, feat = randn(b, c, n, seed=n), randn(b, d, n, seed=d).to(dtype)
    out = relu_affinity(here(value.float()), here(layouts(feat)[kind]))
    plain = dense(here(value.to(dtype)), here(feat))
    budget([out], [plain], [dense(value.float().double(), feat.double())], channels=True)


def test_affinity_opcheck(backend):
    value, feat, grad = (here(randn(2, k, 7, seed=k).float()) for k in (3, 4, 3))
    torch.library.opcheck(torch.ops.ercn.relu_affinity.default, (value, feat, backend))
    torch.library.opcheck(torch.ops.ercn.relu_affinity_backward.default, (grad, value, feat, True, backend))


pool = gated_attention_pool

# Ours, plain torch, and plain torch in float64.
RUNS = [(pool, torch.float32), (twin, torch.float32), (twin, torch.float64)]


# B, N, D, L, K
CASES = [(1, 1, 1, 1, 1), (2, 7, 5, 3, 2), (1, 65, 40, 31, 1), (3, 33, 50, 64, 4), (1, 97, 17, 33, 18)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pool_within_budget(case, gated, dtype):
    arguments = [None if x is None else x.to(dtype) for x in inputs(*case, gated=gated)]
    assert_pool(arguments)


@pytest.mark.parametrize("name", ["attention_gated", "attention_plain", "attention_gated_heads"])
def test_pool_matches_published_code(name):
    keys = {
        "attention_gated": ("attention_V.0", "attention_U.0", "attention_w"),
        "attention_plain": ("attention.0", None, "attention.2"),
        "attention_gated_heads": ("attention_a.0", "attention_b.0", "attention_c"),
    }[name]
    data = golden(name)
    parameters = [None if k is None else data[f"param.{k}.{kind}"] for k in keys for kind in ("weight", "bias")]
    arguments = [None if x is None else here(x.float()) for x in (data["h"].unsqueeze(0), *parameters)]
    leaves = [leaf(x) for x in arguments]
    pooled, scores = pool(*leaves)
    plain_leaves = [leaf(x) for x in arguments]
    plain = twin(*plain_leaves)
    budget((pooled[0], scores[0]), [x[0] for x in plain], (data["pooled"], data["scores"]))
    grad = here(data["grad_pooled"].float())
    ours, theirs = (gradients(p[0], x, grad) for p, x in ((pooled, leaves), (plain[0], plain_leaves)))
    names = [f"grad.{k}.{kind}" for k in keys if k is not None for kind in ("weight", "bias")]
    exact = [data["grad_h"].unsqueeze(0)] + [data[k] for k in names]
    # The last one, the bias of w, shifts all scores equally: its gradient is 0 up to rounding.
    budget(ours[:-1], theirs[:-1], exact[:-1])
    assert ours[-1].abs().max() < 1e-6 * max(g.abs().max() for g in exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "offset", "expanded"])
def test_pool_of_any_strides(layout, finite_products):
    arguments = inputs(2, 35, 6, 5, heads=2, dtype=torch.float32)
    arguments[0] = layouts(arguments[0])[layout]
    arguments[1] = arguments[1].mT.contiguous().mT
    assert_pool(arguments)


def test_pool_of_a_feature_map_view():
    fmap = here(randn(2, 20, 4, 5, seed=3).float()).requires_grad_()
    weights = [here(x) for x in inputs(2, 1, 20, 3, dtype=torch.float32)[1:]]
    pooled, scores = pool(fmap.flatten(2).transpose(1, 2), *weights)
    assert pooled.shape == (2, 1, 20) and scores.shape == (2, 1, 20)
    (ours,) = torch.autograd.grad(pooled.square().sum(), fmap)
    exact, double = fmap.detach().double().requires_grad_(), [x.double() for x in weights]
    (truth,) = torch.autograd.grad(twin(exact.flatten(2).mT, *double)[0].square().sum(), exact)
    assert error(ours, truth) < 1e-5


@pytest.mark.parametrize("index", range(7))
def test_pool_gradients_asked_for(index):
    arguments = [here(x) for x in inputs(2, 40, 4, 3, heads=2, dtype=torch.float32)]
    grad = here(randn(2, 2, 40, seed=9).float())
    results = []
    for function, cast in RUNS:
        leaves = [x.to(cast) for x in arguments]
        leaves[index] = leaves[index].detach().requires_grad_()
        pooled, scores = function(*leaves)
        results.append(torch.autograd.grad((pooled, scores), leaves[index], (torch.ones_like(pooled), grad.to(cast))))
    budget(*results)


@pytest.mark.parametrize("pick", [0, 1], ids=["pooled", "scores"])
def test_pool_gradient_through_one_output(pick):
    arguments = [here(x) for x in inputs(1, 40, 4, 3, dtype=torch.float32)]
    results = []
    for function, cast in RUNS:
        leaves = [leaf(x.to(cast)) for x in arguments]
        results.append(gradients(function(*leaves)[pick].square().sum(), leaves, None))
    for index, (ours, plain, exact) in enumerate(zip(*results)):
        if index == 6 and pick == 0:  # w_bias changes pooled by rounding only
            assert ours.abs().max() < 1e-6
        else:
            budget([ours], [plain], [exact])


@pytest.mark.parametrize("leak", [float("nan"), float("inf"), 1e30])
def test_pool_masked_instances_never_leak(leak, finite_products):
    mask = torch.rand(3, 41, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False
    mask[2] = False
    mask[2, 40] = True
    mask = here(mask)
    arguments = [here(x) for x in inputs(3, 41, 20, 17, heads=2, dtype=torch.float32)]
    dirty = [arguments[0].masked_fill(~mask.unsqueeze(-1), leak), *arguments[1:]]
    ours, clean = (
        pool_results(pool, x, torch.float32, mask) for x in (dirty, arguments)
    )
    assert all(torch.equal(a, e) for a, e in zip(ours, clean))
    assert (ours[2][~mask] == 0).all() and (ours[0][1] == 0).all()
    _, scores = pool(*dirty, mask=mask)
    assert (scores.masked_select(~mask[:, None].expand_as(scores)) == float("-inf")).all()
    for bag in (0, 2):  # equal to a bag of its real instances only
        real = [arguments[0][bag : bag + 1, mask[bag]], *arguments[1:]]
        exact = twin(*(x.double() for x in real))[0]
        budget([ours[0][bag : bag + 1]], [twin(*real)[0]], [exact])


def test_pool_empty_and_fully_masked_bags():
    arguments = [leaf(here(x)) for x in inputs(2, 5, 4, 3, heads=2, dtype=torch.float32)]
    none = here(torch.zeros(2, 5, dtype=torch.bool))
    pooled, scores = pool(*arguments, mask=none)
    assert (pooled == 0).all() and (scores == float("-inf")).all()
    assert all((g == 0).all() for g in gradients(pooled.sum(), arguments, None))
    for n, bounds in ((0, None), (0, [0, 0, 0]), (3, [0, 0, 3, 3])):
        h = here(torch.ones((2, n, 4) if bounds is None else (n, 4))).requires_grad_()
        cu_seqlens = None if bounds is None else here(torch.tensor(bounds))
        pooled, scores = pool(h, *arguments[1:], cu_seqlens=cu_seqlens)
        assert all((row == 0).all() for row, e in zip(pooled, [True] * 2 if n == 0 else [True, False, True]) if e)
        assert scores.shape == ((2, 2, 0) if bounds is None else (2, n))
        assert all(g.isfinite().all() for g in gradients(pooled.sum(), [h, *arguments[1:]], None))
    no_bag = here(torch.ones(0, 4)), here(torch.tensor([0]))
    pooled, scores = pool(no_bag[0], *arguments[1:], cu_seqlens=no_bag[1])
    assert pooled.shape == (0, 2, 4) and scores.shape == (2, 0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_pool_ragged(index_dtype, finite_products):
    bounds = [0, 0, 1, 14, 14, 47, 48, 49, 160, 160]
    arguments = [here(x) for x in inputs(None, 160, 20, 5, heads=3, dtype=torch.float32)]
    cu_seqlens = here(torch.tensor(bounds, dtype=index_dtype))

    def by_bag(h, *weights, mask=None):
        each = [twin(h[None, a:b], *weights) for a, b in itertools.pairwise(bounds)]
        return torch.cat([p.nan_to_num(0) for p, _ in each]), torch.cat([s[0] for _, s in each], dim=-1)

    ours = pool_results(pool, arguments, torch.float32, cu_seqlens=cu_seqlens)
    budget(ours, *(pool_results(by_bag, arguments, cast) for cast in (torch.float32, torch.float64)))


def test_pool_permutation(backend):
    arguments = [here(x) for x in inputs(2, 40, 6, 5, heads=2, dtype=torch.float32)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(arguments[0].device)
    pooled, scores = pool(*arguments)
    shuffled = pool(arguments[0][:, order], *arguments[1:])
    assert error(shuffled[0], pooled.double()) < 1e-6
    if backend == "triton" and DEVICE == "cpu":  # the rounding of NumPy's products depends on the position of a row
        assert error(shuffled[1], scores[..., order].double()) < 1e-6
    else:
        assert torch.equal(shuffled[1], scores[..., order])


def test_pool_large_scores_do_not_overflow():
    arguments = inputs(1, 70, 4, 3, dtype=torch.float32)
    arguments[5] = arguments[5] * 1e4
    ours = pool(*(here(x) for x in arguments))[0]
    budget([ours], [twin(*arguments)[0]], [twin(*(x.double() for x in arguments))[0]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_pool_propagates_nan_and_inf(bad):
    arguments = inputs(2, 40, 4, 3, dtype=torch.float32)
    arguments[0][1, 2, 3] = bad
    arguments = [here(x) for x in arguments]
    ours = pool(*arguments)
    for mine, theirs in zip(ours, twin(*arguments)):
        assert torch.allclose(*finite_parts(mine, theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pool_runs_are_bit_equal(dtype):
    arguments = [here(x) for x in inputs(2, 50, 20, 17, heads=2, dtype=dtype)]
    runs = [pool_results(pool, arguments, dtype) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_pool_of_any_shape_property(data):
    b, n, d, hidden, heads = (
        data.draw(st.integers(1, high), label=k)
        for k, high in (("B", 3), ("N", 100), ("D", 70), ("L", 40), ("K", 5))
    )
    gated, bias = (data.draw(st.booleans(), label=k) for k in ("gated", "bias"))
    kind = data.draw(st.sampled_from(["contiguous", "channels_last", "strided", "offset"]), label="layout")
    arguments = inputs(b, n, d, hidden, heads, gated, bias, dtype=data.draw(st.sampled_from(DTYPES), label="dtype"))
    arguments[0] = layouts(arguments[0])[kind]
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(n)) < 0.7
    mask[:, 0] = True
    assert_pool(arguments, data.draw(st.sampled_from([None, mask]), label="mask"))


def test_pool_opcheck(backend):
    mask, bounds = here(torch.tensor([[True, False, True]] * 2)), here(torch.tensor([0, 1, 1, 3], dtype=torch.int32))
    h, *weights = (here(x) for x in inputs(2, 3, 4, 5, heads=2, dtype=torch.float32))
    forward, plain = torch.ops.ercn.gated_attention_pool.default, (None, 0.0, "tanh")
    torch.library.opcheck(forward, (h, *weights, mask, None, *plain, backend))
    torch.library.opcheck(forward, (h[0], *weights, None, bounds, *plain, backend))
    pooled, scores = pool(h, *weights, mask=mask)
    backward = torch.ops.ercn.gated_attention_pool_backward.default
    for needs in ([True] * 7, [True] + [False] * 6):
        arguments = (torch.ones_like(pooled), None, h, *weights, mask, None, *plain, scores, needs, backend)
        torch.library.opcheck(backward, arguments)


def test_float64_is_refused_in_a_sentence():
    x = here(torch.ones(1, 2, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16; got torch.float64"):
        relu_affinity(x, x)
    arguments = [here(x) for x in inputs(1, 4, 3, 2)]
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 and float16; got torch.float64"):
        gated_attention_pool(*arguments)


@pytest.fixture
def far_apart():
    """A function that copies x [B, D, N] in bfloat16 to channel strides of 2³⁰, over more than 2³¹ elements."""
    storage = torch.empty((1 << 31) + 4096, dtype=torch.bfloat16, device=DEVICE)  # 4 GB of addresses

    def spread(x):
        assert x.shape[0] == 1 and x.shape[1] == 3
        view = storage.as_strided(x.shape, (0, 1 << 30, 1))
        view.copy_(x)
        return view

    return spread


def test_affinity_of_offsets_beyond_int32(far_apart):
    value, grad, feat = randn(1, 2, 45, seed=1), randn(1, 2, 45, seed=3), off_kink(1, 3, 45).bfloat16()
    near, far = (
        with_gradients(
            relu_affinity, here(grad.float()), here(value.float()), x
        )
        for x in (here(feat), far_apart(feat))
    )
    assert all(torch.equal(a, b) for a, b in zip(near, far))


def test_pool_of_offsets_beyond_int32(far_apart):
    arguments = [here(x) for x in inputs(1, 45, 3, 4, dtype=torch.bfloat16)]
    near, far = ([arguments[0], *arguments[1:]], [far_apart(arguments[0].mT).mT, *arguments[1:]])
    results = []
    for h, *weights in (near, far):
        leaves = [leaf(x) for x in weights]
        h = h.detach().requires_grad_()
        pooled, scores = pool(h, *leaves)
        results.append((pooled, scores, *gradients(pooled.sum() + scores.square().sum(), [h, *leaves], None)))
    assert all(torch.equal(a, b) for a, b in zip(*results))
