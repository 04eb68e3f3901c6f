"""The pooling kernels in csrc/cpu: instruction sets, activations, order of sums, memory layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _ops import PLAIN, assert_within_budget, backends_of, error, finite_parts, generator, layouts, randn
from _pool import kept
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from ercn.ops import gated_attention_pool, pool_by_scores

pytestmark = pytest.mark.skipif("cpu" not in backends_of("gated_attention_pool"), reason="libercn is not built")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pool(*args, **kwargs):
    return gated_attention_pool(*args, **kwargs, backend="cpu")


def weights(d, hidden, heads=1, gated=True, bias=True, dtype=torch.float64):
    v, u = (randn(hidden, d, seed=s, dtype=dtype) / max(d, 1) ** 0.5 for s in (2, 3))
    bv, bu, bw = (randn(k, seed=s, dtype=dtype) if bias else None for s, k in ((4, hidden), (5, hidden), (6, heads)))
    return [v, bv, u if gated else None, bu if gated else None, randn(heads, hidden, seed=7, dtype=dtype), bw]


def dense(h, v, bv, u, bu, w, bw, mask=None):
    gate = torch.tanh(linear(h, v, bv))
    if u is not None:
        gate = gate * torch.sigmoid(linear(h, u, bu))
    scores = linear(gate, w, bw).mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return torch.softmax(scores, -1) @ h, scores


def outputs_and_gradients(function, h, parameters, dtype, mask=None, **kwargs):
    """pooled and scores (0 where masked), and the gradients of every input for fixed random output gradients."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in (h, *parameters)]
    pooled, scores = function(*leaves, mask=mask, **kwargs)
    scores = scores.masked_fill(scores == float("-inf"), 0)
    seeds = [randn(*t.shape, seed=s).to(t.dtype) for s, t in ((8, pooled), (9, scores))]
    grads = torch.autograd.grad((pooled, scores), [x for x in leaves if x is not None], seeds)
    return pooled, scores, *grads


def dense_in_order(instances, channels):
    """``dense``, summing over instances and channels in other orders."""

    def function(h, v, bv, u, bu, w, bw, mask):
        mask = None if mask is None else mask[:, instances]
        u = None if u is None else u[:, channels]
        pooled, scores = dense(h[:, instances][..., channels], v[:, channels], bv, u, bu, w, bw, mask)
        return pooled[..., channels.argsort()], scores[..., instances.argsort()]

    return function


def assert_as_good_as_torch(h, parameters, dtype, mask=None):
    """Compares with plain torch's worst of five orders of its sums: the rounding of sums that cancel is luck."""
    orders = [[torch.randperm(k, generator=generator(seed)) for k in h.shape[1:]] for seed in range(4)]
    plain = [dense, *(dense_in_order(*order) for order in orders)]
    ours, *torchs = (outputs_and_gradients(f, h, parameters, dtype, mask) for f in (pool, *plain))
    exact = outputs_and_gradients(dense, h, parameters, torch.float64, mask)
    for mine, truth, *candidates in zip(ours, exact, *torchs):
        assert_within_budget(mine, max(candidates, key=lambda x: error(x, truth)), truth)


# One off every tile; more than one chunk, group of hidden units and group of channels.
CASES = [(1, 1, 1, 1, 1), (2, 49, 65, 17, 3), (1, 145, 33, 15, 1), (3, 67, 128, 64, 2), (1, 2111, 133, 271, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(isa, case, gated, dtype):
    b, n, d, hidden, heads = case
    h = randn(b, n, d, seed=1).to(dtype)
    assert_as_good_as_torch(h, [None if x is None else x.to(dtype) for x in weights(d, hidden, heads, gated)], dtype)


def ulps(actual: torch.Tensor, exact: np.ndarray) -> np.ndarray:
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.abs(actual.double().numpy() - exact) / spacing


def test_activations_within_their_stated_accuracy(isa):
    """Every 509th float: tanh is the score of a plain pool, the sigmoid follows a tanh that is 1."""
    bits = np.arange(0, 1 << 32, 509, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    x = torch.from_numpy(x[np.isfinite(x)])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    wide = x.double().numpy()
    tanh = pool(x[None, :, None], one, None, None, None, one, None)[1][0, 0]
    sigmoid = pool(x[None, :, None], zero, torch.full((1,), 20.0), one, None, one, None)[1][0, 0]
    with np.errstate(over="ignore"):
        exact_tanh, exact_sigmoid = np.tanh(wide), 1 / (1 + np.exp(-wide))
    tiny = np.finfo(np.float32).tiny
    for ours, exact in ((tanh, exact_tanh), (sigmoid, exact_sigmoid)):
        normal = np.abs(exact) >= tiny
        assert ulps(ours, exact)[normal].max() <= 2.6
        assert np.abs(ours.double().numpy() - exact)[~normal].max(initial=0) <= tiny
        assert ours.abs().max() == 1


def test_gelu_within_its_stated_accuracy(isa):
    """gelu is the score of a plain pool, and its slope the gradient of h."""
    x = torch.linspace(-13, 13, 40001)
    one = torch.ones(1, 1)
    gelu = pool(x[None, :, None], one, None, None, None, one, None, activation="gelu")[1][0, 0]
    wide = x.double()
    cumulative = 0.5 * torch.erfc(-wide / 2**0.5)
    assert ((gelu.double() - wide * cumulative).abs() <= 2.2e-7 * wide.abs()).all()
    h = x[None, :, None].clone().requires_grad_()
    scores = pool(h, one, None, None, None, one, None, activation="gelu")[1]
    (slope,) = torch.autograd.grad(scores.sum(), h)
    density = torch.exp(-0.5 * wide.square()) / (2 * torch.pi) ** 0.5
    assert (slope[0, :, 0].double() - (cumulative + wide * density)).abs().max() < 2.2e-7
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 80.0, -80.0])
    ours = pool(special[None, :, None], one, None, None, None, one, None, activation="gelu")[1][0, 0]
    assert torch.equal(*finite_parts(ours, torch.nn.functional.gelu(special.double()).float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_instruction_set_drops_the_same_units(isa, gated, dtype):
    """Every unit is 1 and has its own head; there are more instances than a block has, and more units than 64."""
    b, n, hidden, p = 2, 131, 145, 0.3
    seed = torch.tensor([0x0123456789ABCDEF])
    h, weight, bias = torch.zeros(b, n, 1), torch.zeros(hidden, 1), torch.full((hidden,), 20.0)
    u, bu = (weight, bias) if gated else (None, None)
    tensors = [x if x is None else x.to(dtype) for x in (h, weight, bias, u, bu, torch.eye(hidden), None)]
    args = (*tensors, None, None, seed, p, "tanh", "cpu")
    scores = torch.ops.ercn.attention_scores(*args)
    v, u = kept(int(seed), p, torch.arange(b * n).view(b, n), hidden)
    assert torch.equal(scores.mT != 0, v & u if gated else v)
    scale = 65536 / (65536 - round(0.3 * 65536))
    assert error(scores.mT[scores.mT != 0].double(), torch.tensor([scale ** (2 if gated else 1)])) < 1e-6


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_in_float32_on_every_instruction_set(isa, case, dtypes):
    """Equals the pool of h widened beforehand, to the last bits: the products are those of float32."""
    b, n, d, hidden, heads = case
    h, parameters = randn(b, n, d, seed=1).to(dtypes[0]), weights(d, hidden, heads, dtype=dtypes[1])
    leaves = [[x.detach().requires_grad_() for x in (first, *parameters)] for first in (h, h.float())]
    outputs = [pool(*x) for x in leaves]
    grads = [torch.autograd.grad([o.square().sum() for o in x], y) for x, y in zip(outputs, leaves)]
    assert outputs[0][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*outputs))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*grads))


def test_activations_at_special_values(isa):
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
    one = torch.ones(1, 1)
    tanh = pool(special[None, :, None], one, None, None, None, one, None)[1][0, 0]
    gated = pool(special[None, :, None], one, None, one, None, one, None)[1][0, 0]
    assert torch.equal(tanh[:4], torch.tensor([0.0, 0.0, 1.0, -1.0])) and tanh[4].isnan()
    assert torch.equal(gated[:4], torch.tensor([0.0, 0.0, 1.0, 0.0])) and gated[4].isnan()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_bit_equal_for_any_number_of_threads(isa, dtype):
    parameters = weights(72, 40, 2, dtype=dtype)
    h = randn(3, 701, 72, seed=1, dtype=dtype)
    mask = torch.rand(3, 701, generator=torch.Generator().manual_seed(0)) < 0.8
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(outputs_and_gradients(pool, h, parameters, dtype, mask=mask))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_a_mask_is_the_ragged_bags_of_what_it_keeps():
    """Equal bit for bit: masked instances are left out, not multiplied by 0."""
    b, n, d = 4, 90, 24
    h, parameters = randn(b, n, d, seed=1, dtype=torch.float32), weights(d, 20, 2, dtype=torch.float32)
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[2] = False
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    padded, ragged = (outputs_and_gradients(pool, x, parameters, torch.float32, **kwargs) for x, kwargs in (
        (h, {"mask": mask}), (h[mask], {"cu_seqlens": bounds})
    ))
    assert torch.equal(padded[0], ragged[0])
    assert torch.equal(padded[1].transpose(1, 2)[mask], ragged[1].T)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 63, 64, 65, 200]), min_size=1, max_size=12),
    index=st.sampled_from([torch.int32, torch.int64]),
    heads=st.integers(1, 3),
)
def test_ragged_bags_property(lengths, index, heads):
    h, parameters = randn(sum(lengths), 9, seed=1), weights(9, 6, heads)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ours = outputs_and_gradients(pool, h, parameters, torch.float64, cu_seqlens=bounds.to(index))

    def bag_by_bag(h, *parameters, mask=None):
        bags = [dense(x[None], *parameters) for x in h.split(lengths) if len(x)]
        empty = h.new_zeros(1, heads, 9) + 0 * h.sum()
        found = iter(bags)
        pooled = torch.cat([next(found)[0] if n else empty for n in lengths])
        return pooled, torch.cat([s[0] for _, s in bags], -1) if bags else h.new_zeros(heads, 0) + 0 * pooled.sum()

    if sum(lengths) == 0:
        assert all((x == 0).all() for x in ours)
        return
    # Plain torch gives an unused bias a gradient of rounding errors: compare where it has another.
    for mine, theirs in zip(ours, outputs_and_gradients(bag_by_bag, h, parameters, torch.float64)):
        assert error(mine, theirs) < 1e-11 or (mine - theirs).abs().max() < 1e-12


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_stride_dtype_offset_and_mask_property(data):
    b, n, d, hidden, heads = (
        data.draw(st.integers(1, high), label=k)
        for k, high in (("B", 3), ("N", 150), ("D", 150), ("L", 70), ("K", 4))
    )
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    gated, bias = (data.draw(st.booleans(), label=k) for k in ("gated", "bias"))
    kinds = ["contiguous", "channels_last", "strided", "offset", "expanded"]
    layout = data.draw(st.sampled_from(kinds), label="layout")
    parameters = weights(d, hidden, heads, gated, bias, dtype)
    if data.draw(st.booleans(), label="weights transposed"):
        parameters = [x.mT.contiguous().mT if x is not None and x.dim() == 2 else x for x in parameters]
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(n)) < data.draw(st.sampled_from([0.1, 0.7, 2.0]))
    mask[:, n // 2] = True
    mask = data.draw(st.sampled_from([None, mask]), label="mask")
    h = layouts(randn(b, n, d, seed=1, dtype=dtype))[layout]
    assert_as_good_as_torch(h, parameters, dtype, mask)


@pytest.mark.parametrize("needed", range(7))
def test_only_what_is_asked_for(needed):
    arguments = [randn(2, 30, 12, seed=1), *weights(12, 10, 2)]
    pooled, scores = pool(*arguments)
    call = torch.ops.ercn.gated_attention_pool_backward
    everything, one = (
        call(torch.ones_like(pooled), torch.ones_like(scores), *arguments, *PLAIN[1:], scores, needs, "cpu")
        for needs in ([True] * 7, [i == needed for i in range(7)])
    )
    assert torch.equal(one[needed], everything[needed])
    assert all(x.numel() == 0 for i, x in enumerate(one) if i != needed)


def test_pool_by_scores_forms_only_what_is_asked_for():
    scores, value, grad = (randn(*s, seed=k).float() for k, s in enumerate([(2, 3, 130), (2, 130, 12), (2, 3, 12)]))
    call = torch.ops.ercn.pool_by_scores_backward
    both, first, second = (
        call(grad, scores, value, None, None, needs, "cpu") for needs in ([True, True], [True, False], [False, True])
    )
    assert torch.equal(first[0], both[0]) and torch.equal(second[1], both[1])
    assert first[1].numel() == 0 and second[0].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pool_by_scores_is_bit_equal_for_any_number_of_threads_and_to_the_pool(isa, dtype):
    """With the pool's own scores it equals the pool: both sum in one order."""
    h, parameters = randn(3, 701, 72, seed=1, dtype=dtype), weights(72, 40, 2, dtype=dtype)
    mask = torch.rand(3, 701, generator=torch.Generator().manual_seed(0)) < 0.8
    pooled, scores = pool(h, *parameters, mask=mask)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaves = [x.detach().requires_grad_() for x in (scores, h)]
            again = pool_by_scores(*leaves, mask=mask, backend="cpu")
            runs.append((again, *torch.autograd.grad(again.float().square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0][0], pooled)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_infinite_scores_are_as_in_torch():
    """All scores -Inf, or one +Inf, give NaN, as in torch. A block of -Inf beside a finite score weighs nothing."""
    h = -torch.ones(3, 200, 2)
    h[1, 7, 0] = 1
    arguments = [h, torch.tensor([[20.0, 0.0]]), None, None, None, torch.full((1, 1), float("inf")), None]
    for ours, theirs in zip(pool(*arguments), dense(*arguments)):
        assert theirs.isnan().any() or theirs.isinf().any()
        assert torch.equal(*finite_parts(ours, theirs))
    finite = torch.full((1, 200, 1), -1e30)
    finite[0, 190:] = torch.linspace(-1, 1, 10)[:, None]
    one = torch.ones(1, 1)
    mixed = [finite, one, None, None, None, torch.full((1, 1), 3e38), torch.full((1,), -3e38)]
    pooled, scores = pool(*mixed)
    assert (scores[0, 0, :190] == float("-inf")).all() and scores[0, 0, 199].isfinite()
    assert error(pooled, dense(*mixed)[0].double()) < 1e-6


def test_unknown_instruction_set_says_what_there_is(monkeypatch):
    monkeypatch.setenv("ERCN_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="ERCN_CPU_ISA is 'sse9'; there are portable, avx2, avx512, avx512_bf16"):
        pool(torch.ones(1, 1, 1), torch.ones(1, 1), None, None, None, torch.ones(1, 1), None)
