"""The pool's Hopper kernels: on such a GPU, or emulated. The operator's contract is in ops/test_gpu_ops.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from _cuda import HOPPER as DEVICE
from _cuda import marks, pool_with
from _ops import assert_within_budget, finite_parts, randn
from _pool import inputs, leaf
from _pool import twin as dense

pytestmark = marks(DEVICE)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def pool():
    return pool_with("sm90", exact=False, device=DEVICE)


def by_bag(h, *weights, cu_seqlens):
    bags = [dense(h[None, a:b], *weights) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    return torch.cat([pooled.nan_to_num(0) for pooled, _ in bags]), torch.cat([scores[0] for _, scores in bags], -1)


def results(function, arguments, dtype, mask=None, scale=1.0, **kwargs):
    """(pooled, scores, gradients…), scores of masked instances as 0."""
    leaves = [None if x is None else leaf(x.to(dtype)) for x in arguments]
    pooled, scores = function(*leaves, mask=mask, **kwargs) if mask is not None else function(*leaves, **kwargs)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], 0)
    seeds = [(scale * randn(*x.shape, seed=s)).to(x) for s, x in ((8, pooled), (9, scores))]
    return pooled, scores, *torch.autograd.grad((pooled, scores), [x for x in leaves if x is not None], seeds)


def here(arguments):
    return [None if x is None else x.to(DEVICE) for x in arguments]


def channels_first(h):
    return h.mT.contiguous().mT


def check(pool, arguments, reference=dense, **kwargs):
    dtype = arguments[0].dtype
    ours = results(pool, arguments, dtype, **kwargs)
    plain, exact = (results(reference, arguments, cast, **kwargs) for cast in (dtype, torch.float64))
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert mine.isfinite().all()
        assert_within_budget(mine.cpu(), torchs.cpu(), truth.cpu())


# B, N, D, L, K: one instance, a segment and one off it, half a group of units and two, more channels than the ring.
CASES = [(1, 1, 64, 64, 1), (1, 64, 64, 128, 3), (2, 65, 128, 192, 2), (3, 63, 320, 64, 8), (1, 65, 576, 256, 1)]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_budget(pool, case, dtype):
    check(pool, here(inputs(*case, bias=case[1] % 2 == 0, dtype=dtype)))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", [(2, 72, 64, 64, 2), (1, 72, 576, 192, 1)], ids=str)
def test_channels_first(pool, case, dtype):
    arguments = here(inputs(*case, dtype=dtype))
    check(pool, [channels_first(arguments[0]), *arguments[1:]])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_ragged(pool, index_dtype):
    cu_seqlens = torch.tensor([0, 0, 1, 71, 71, 135, 198, 263, 263], dtype=index_dtype, device=DEVICE)
    check(pool, here(inputs(None, 263, 64, 64, 2, dtype=BF16)), by_bag, cu_seqlens=cu_seqlens)


def test_strides_between_rows_and_bags(pool):
    h, *weights = here(inputs(2, 70, 64, 64, dtype=BF16))
    padded = torch.full((2, 75, 72), float("nan"), dtype=BF16, device=DEVICE)
    padded[:, :70, 8:] = h
    check(pool, [padded[:, :70, 8:], *weights])
    ours = pool(padded[:, :70, 8:], *weights)
    assert all(torch.equal(a, b) for a, b in zip(ours, pool(h, *weights)))


@pytest.mark.parametrize("layout", [torch.clone, channels_first], ids=["rows", "channels_first"])
@pytest.mark.parametrize("leak", [float("nan"), float("inf")])
def test_masked_instances_never_leak(pool, layout, leak):
    mask = torch.rand(3, 136, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False
    mask[2] = False
    mask[2, 130] = True
    mask = mask.to(DEVICE)
    h, *weights = here(inputs(3, 136, 64, 64, 2, dtype=BF16))
    dirty, clean = (
        results(pool, [layout(x), *weights], BF16, mask) for x in (h.masked_fill(~mask.unsqueeze(-1), leak), h)
    )
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean))
    assert (dirty[0][1] == 0).all() and (dirty[2][~mask] == 0).all()
    for bag in (0, 2):  # as if the bag held its real instances only
        alone = [h[bag : bag + 1, mask[bag]], *weights]
        exact = dense(*(x.double() for x in alone))[0]
        assert_within_budget(dirty[0][bag : bag + 1].cpu(), dense(*alone)[0].cpu(), exact.cpu())


def test_a_bag_does_not_see_its_neighbours(pool):
    """A box of 64 rows reaches into the next bag, whose instances are not finite."""
    h, *weights = here(inputs(None, 160, 64, 64, dtype=BF16))
    h[:40], h[110:] = float("nan"), float("inf")
    leaves = [leaf(x) for x in (h, *weights)]
    pooled, _ = pool(*leaves, cu_seqlens=torch.tensor([0, 40, 110, 160], device=DEVICE))
    assert pooled[1].isfinite().all() and pooled[0].isnan().all()
    (grad,) = torch.autograd.grad(pooled[1].sum(), leaves[0])
    alone = leaf(h[None, 40:110])
    (expected,) = torch.autograd.grad(pool(alone, *weights)[0].sum(), alone)
    assert torch.equal(grad[40:110], expected[0])


def test_no_instances(pool):
    _, *weights = here(inputs(1, 1, 64, 64, 2, dtype=BF16))
    for shape, cu_seqlens in (
        ((2, 0, 64), None),
        ((0, 5, 64), None),
        ((0, 64), torch.tensor([0, 0, 0], device=DEVICE)),
    ):
        h = leaf(torch.ones(shape, dtype=BF16, device=DEVICE))
        pooled, scores = pool(h, *map(leaf, weights), cu_seqlens=cu_seqlens)
        assert (pooled == 0).all() and scores.numel() == 0
        if pooled.numel() > 0:
            pooled.sum().backward()
            assert h.grad.shape == h.shape


@pytest.mark.parametrize("wanted", [*range(7), (1, 5), (3, 4)], ids=str)
def test_gradients_asked_for(pool, wanted):
    wanted = [wanted] if isinstance(wanted, int) else wanted
    arguments = here(inputs(2, 70, 64, 64, 2, dtype=BF16))
    alone = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(arguments)]
    grad_scores = randn(2, 2, 70, seed=9).float().to(DEVICE)
    grads = []
    for leaves in (alone, [leaf(x) for x in arguments]):
        pooled, scores = pool(*leaves)
        asked = [leaves[i] for i in wanted]
        grads.append(torch.autograd.grad((pooled, scores), asked, (torch.ones_like(pooled), grad_scores)))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("pick", [0, 1], ids=["pooled", "scores"])
def test_gradient_through_one_output(pool, pick):
    arguments = here(inputs(1, 70, 64, 64, dtype=BF16))
    grads = []
    for function, cast in ((pool, BF16), (dense, BF16), (dense, torch.float64)):
        leaves = [leaf(x.to(cast)) for x in arguments]
        output = function(*leaves)[pick]
        # The bias of w moves pooled by rounding only.
        grads.append(torch.autograd.grad(output, leaves[:-1], randn(*output.shape, seed=5).to(output)))
    for mine, torchs, truth in zip(*grads):
        assert_within_budget(mine.cpu(), torchs.cpu(), truth.cpu())


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_chunks_of_segments(pool, ragged):
    """More segments than a chunk of the backward has; the emulator's L2 cache is small."""
    total = 420
    cu_seqlens = torch.tensor([0, 3, 70, 250, 250, 331, total], device=DEVICE)
    if ragged:
        check(pool, here(inputs(None, total, 64, 128, dtype=BF16)), by_bag, cu_seqlens=cu_seqlens)
    else:
        check(pool, here(inputs(3, total // 3, 64, 128, dtype=BF16)))


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**8])
def test_gradients_in_half_precision_are_scaled(pool, scale):
    """dP in float16 would overflow or vanish; a gradient of scores is float32 and may have any size."""
    arguments = here(inputs(1, 70, 64, 64, 2, dtype=FP16))
    arguments[5] = arguments[5] / 8
    unscaled, scaled = ([leaf(x) for x in arguments] for _ in range(2))
    seed = randn(1, 2, 70, seed=9).float().to(DEVICE)
    pool(*unscaled)[1].backward(seed)
    pool(*scaled)[1].backward(scale * seed)
    for a, b in zip(unscaled, scaled):
        exact = scale * a.grad.double()
        normal = min(1, scale) * a.grad.double().abs() > torch.finfo(FP16).tiny  # rounded to 11 bits in both
        assert torch.equal(b.grad.double()[normal], exact[normal])


def test_runs_are_bit_equal(pool):
    """Every run of the emulator has another order of threads and blocks."""
    arguments = here(inputs(1, 100, 576, 64, 2, dtype=BF16))
    runs = [results(pool, arguments, BF16) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate(pool, bad):
    arguments = here(inputs(2, 70, 64, 64, 3, dtype=BF16))
    arguments[0][1, 2, 3] = bad
    for mine, theirs in zip(pool(*arguments), dense(*arguments)):
        finite_parts(mine, theirs)


def test_refused_tensors(pool):
    def refused(words, *arguments, **kwargs):
        with pytest.raises(RuntimeError, match=words):
            pool(*arguments, **kwargs)

    refused("take bfloat16 and float16", *here(inputs(1, 8, 64, 64, dtype=torch.float32)))
    refused("u_weight is None", *here(inputs(1, 8, 64, 64, gated=False, dtype=BF16)))
    for sizes in ((96, 64, 1), (64, 32, 1), (64, 64, 9), (3136, 64, 1)):
        refused("D = {}, L = {}, K = {}".format(*sizes), *here(inputs(1, 8, *sizes, dtype=BF16)))
    h, *weights = here(inputs(2, 9, 64, 64, dtype=BF16))
    refused("multiples of 16 bytes", channels_first(h), *weights)  # 9 instances are 18 bytes
    refused("multiples of 16 bytes", h.expand(2, 9, 64)[:1].expand(2, 9, 64), *weights)
    offset = torch.empty(h.numel() + 1, dtype=BF16, device=DEVICE)[1:].view(h.shape)
    refused("multiples of 16 bytes", offset, *weights)
