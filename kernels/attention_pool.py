"""Gated attention pooling on GPUs, its gradients, and the launchers.

Instances of all bags are rows r of one list: dense bags [B, N] lie one after another, ragged ones already do. Programs
own tiles of rows whatever bags those belong to, so no bag is padded and nothing has to be known on the host. A tile's
partial result for bag b goes to slot tile + b, which no other pair shares (both only rise along the list); a second
kernel adds the slots of each bag in order.

The backward forms activations again, tile by tile; their gradients dP = [dt | dσ] live in a workspace of bounded size.
Tile sizes are in ``table.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ercn.kernels import configs
from ercn.kernels._dropout import dropout_factor
from ercn.kernels._tiles import accumulate, add_product, dot, dot_terms, factor, narrow, rounded, split
from ercn.kernels.configs import cdiv
from ercn.ops._arguments import PoolArguments


class Instances(NamedTuple):
    """h [B, N, D], or [T, D] if ragged; mask [B, N]; strides of both."""

    data: Tensor
    mask: Tensor | None
    stride_b: int
    stride_n: int
    stride_d: int
    mask_stride_b: int
    mask_stride_n: int


class Bags(NamedTuple):
    """cu_seqlens [B + 1] if ragged; rows of all bags, instances of a dense bag, bags, features, hidden units, heads."""

    cu_seqlens: Tensor | None
    T: int
    N: int
    B: int
    D: int
    L: int
    K: int


class Weights(NamedTuple):
    """Contiguous; v and u [L, D] in the dtype of products, the rest as given. u is None where nothing is gated."""

    v: Tensor
    v_bias: Tensor | None
    u: Tensor | None
    u_bias: Tensor | None
    w: Tensor
    w_bias: Tensor | None


class Dropout(NamedTuple):
    """seed [1], threshold for 16 bits of a branch, scale of a product of branches that are kept."""

    seed: Tensor
    threshold: int
    scale: float


class Slots(NamedTuple):
    """Of each slot and head the largest score, Σ e with e = exp(score - largest), and Σ e·value or Σ e·q."""

    maxima: Tensor
    sums: Tensor
    parts: Tensor


@triton.jit
def bag_start(bags, bag):
    """First row of a bag; that of the bag after the last is the number of rows."""
    if bags.cu_seqlens is not None:
        return tl.load(bags.cu_seqlens + bag).to(tl.int32)
    else:
        return bag * bags.N


@triton.jit
def bag_of(bags, row):
    """The bag that holds a row."""
    if bags.cu_seqlens is not None:
        low = row * 0
        high = low + bags.B
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(bags.cu_seqlens + middle) <= row
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
    else:
        low = row // bags.N
    return low


@triton.jit
def bag_slots(bags, bag, BLOCK_M: tl.constexpr):
    """First slot of a bag and the slot after its last."""
    start = bag_start(bags, bag)
    after = bag_start(bags, bag + 1)
    low = start // BLOCK_M + bag
    return low, tl.where(after > start, (after - 1) // BLOCK_M + bag + 1, low)


@triton.jit
def row_offsets(h, bags, r):
    """Where rows r begin in h: int64."""
    if bags.cu_seqlens is not None:
        return r.to(tl.int64) * h.stride_n
    else:
        return (r // bags.N).to(tl.int64) * h.stride_b + (r % bags.N).to(tl.int64) * h.stride_n


@triton.jit
def real_rows(h, bags, r, end):
    """Which rows come before ``end`` and are not masked."""
    real = r < end
    if h.mask is not None:
        offsets = (r // bags.N).to(tl.int64) * h.mask_stride_b + (r % bags.N).to(tl.int64) * h.mask_stride_n
        real = real & tl.load(h.mask + offsets, mask=real, other=0)
    return real


@triton.jit
def load_rows(h, bags, offsets, rows, d):
    """h[rows, d]: [len(rows), len(d)], zero where ``rows`` is False."""
    p_h = h.data + offsets[:, None] + d.to(tl.int64)[None, :] * h.stride_d
    return tl.load(p_h, mask=rows[:, None] & (d < bags.D)[None, :], other=0.0)


@triton.jit
def score_offsets(bags, r, k):
    """Offsets of [len(r), len(k)] in scores [B, K, N], or [K, T] if ragged."""
    if bags.cu_seqlens is not None:
        return k[None, :].to(tl.int64) * bags.T + r[:, None]
    else:
        return ((r // bags.N).to(tl.int64)[:, None] * bags.K + k[None, :]) * bags.N + (r % bags.N)[:, None]


@triton.jit
def load_scores(scores, bags, r, k):
    """[len(r), len(k)] of a tensor in the layout of scores, zero outside."""
    mask = (r < bags.T)[:, None] & (k < bags.K)[None, :]
    return tl.load(scores + score_offsets(bags, r, k), mask=mask, other=0.0)


@triton.jit
def tanh(x):
    """To a few ulps of float32: a polynomial where 1 - e^(-2|x|) would cancel."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def normal(x):
    """The standard normal distribution function."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """"tanh", "relu" (NaN stays NaN) or "gelu" by erf; 0 at 0."""
    if ACTIVATION == "tanh":
        y = tanh(x)
    elif ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        y = x * normal(x)
    return y


@triton.jit
def activation_slope(x, y, ACTIVATION: tl.constexpr):
    """Derivative of the activation at x, where it is y; that of relu is 0 at 0, and 1 at NaN as in torch."""
    if ACTIVATION == "tanh":
        slope = 1 - y * y
    elif ACTIVATION == "relu":
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        slope = normal(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    return slope


@triton.jit
def load_weight(weight, bags, unit, d):
    """weight[unit, d] of a contiguous [L, D], transposed: [len(d), len(unit)]."""
    offsets = unit.to(tl.int64)[None, :] * bags.D + d[:, None]
    return tl.load(weight + offsets, mask=(unit < bags.L)[None, :] & (d < bags.D)[:, None], other=0.0)


@triton.jit
def load_heads(w, bags, k, unit):
    """w[k, unit] of a contiguous [K, L] in float32: [len(k), len(unit)]."""
    mask = (k < bags.K)[:, None] & (unit < bags.L)[None, :]
    return tl.load(w + (k[:, None].to(tl.int64) * bags.L + unit[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def projections(h, bags, weights, offsets, rows, unit, config: tl.constexpr, PRECISION: tl.constexpr):
    """V h + b_V and U h + b_U for a tile of rows and hidden units, 0 for units beyond L: two of [block_m, block_l].

    h is widened to the weights' dtype where it is narrower.
    """
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_L: tl.constexpr = config.block_l
    BLOCK_D: tl.constexpr = config.block_d
    v = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for d0 in range(0, bags.D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = factor(load_rows(h, bags, offsets, rows, d), weights.v.dtype.element_ty, PRECISION)
        v = add_product(v, x, load_weight(weights.v, bags, unit, d), PRECISION)
        if weights.u is not None:
            u = add_product(u, x, load_weight(weights.u, bags, unit, d), PRECISION)
    if weights.v_bias is not None:
        v += tl.load(weights.v_bias + unit, mask=unit < bags.L, other=0.0).to(tl.float32)[None, :]
    if weights.u_bias is not None:
        u += tl.load(weights.u_bias + unit, mask=unit < bags.L, other=0.0).to(tl.float32)[None, :]
    # An infinite h times a padded weight is NaN.
    v = tl.where((unit < bags.L)[None, :], v, 0.0)
    u = tl.where((unit < bags.L)[None, :], u, 0.0)
    return v, u


@triton.jit
def softmax_parts(s, inside):
    """Largest score of the rows ``inside`` and exp(s - largest), 0 elsewhere, for s [rows, heads]."""
    s = tl.where(inside[:, None], s, -float("inf"))
    largest = tl.max(s, axis=0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    return largest, tl.exp(s - shift[None, :])


@triton.jit
def store_parts(
    h, bags, slots, s, offsets, real, tile, r, k, config: tl.constexpr, dtype: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The slots of each bag among the tile's rows, for scores s and value h. Products are of factors in ``dtype``."""
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_D: tl.constexpr = config.block_d
    D, K = bags.D, bags.K
    end = tl.minimum((tile + 1) * BLOCK_M, bags.T)
    bag = bag_of(bags, tile * BLOCK_M)
    start = bag_start(bags, bag)
    while (start < end) & (bag < bags.B):
        after = bag_start(bags, bag + 1)
        inside = real & (r >= start) & (r < after)
        largest, e = softmax_parts(s, inside)
        # Numerator and denominator meet the same rounded weights.
        e = narrow(e, dtype)
        slot = (tile + bag).to(tl.int64)
        tl.store(slots.maxima + slot * K + k, largest, mask=k < K)
        tl.store(slots.sums + slot * K + k, tl.sum(e.to(tl.float32), axis=0), mask=k < K)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = narrow(load_rows(h, bags, offsets, inside, d), dtype)
            z = dot(tl.trans(x), e, tl.zeros((BLOCK_D, BLOCK_K), tl.float32), EXACT)
            p_parts = slots.parts + ((slot * K + k)[None, :] * D + d[:, None])
            tl.store(p_parts, z, mask=(d < D)[:, None] & (k < K)[None, :])
        bag += 1
        start = after


@triton.jit
def forward_kernel(
    h, bags, weights, dropout, scores, slots, config: tl.constexpr, precision: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the scores of block_m rows, and their ``store_parts`` unless slots is None."""
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_L: tl.constexpr = config.block_l
    PRECISION: tl.constexpr = precision.dot
    EXACT: tl.constexpr = precision.exact
    GATED: tl.constexpr = weights.u is not None
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(h, bags, r)
    real = real_rows(h, bags, r, bags.T)

    s = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for l0 in range(0, bags.L, BLOCK_L):
        unit = l0 + tl.arange(0, BLOCK_L)
        v, u = projections(h, bags, weights, offsets, real, unit, config, PRECISION)
        gated = activate(v, ACTIVATION) * (tl.sigmoid(u) if GATED else u + 1)
        if dropout is not None:
            gated *= dropout_factor(dropout, r, l0, GATED, BLOCK_M, BLOCK_L)
        w = tl.trans(load_heads(weights.w, bags, k, unit))
        w_terms = split(w, precision.terms, precision.full_heads)
        s = accumulate(s, split(gated, 2, precision.full_heads), w_terms, EXACT)
    if weights.w_bias is not None:
        s += tl.load(weights.w_bias + k, mask=k < bags.K, other=0.0).to(tl.float32)[None, :]
    s = tl.where(real[:, None], s, -float("inf"))
    p_scores = scores + score_offsets(bags, r, k)
    tl.store(p_scores, s, mask=(r < bags.T)[:, None] & (k < bags.K)[None, :])

    if slots is not None:
        dtype: tl.constexpr = weights.v.dtype.element_ty
        store_parts(h, bags, slots, s, offsets, real, tile, r, k, config, dtype, EXACT, BLOCK_K)


@triton.jit
def scored_parts_kernel(
    h, bags, scores, slots, config: tl.constexpr, EXACT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program: ``store_parts`` of block_m rows whose scores are given."""
    BLOCK_M: tl.constexpr = config.block_m
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(h, bags, r)
    real = real_rows(h, bags, r, bags.T)
    s = load_scores(scores, bags, r, k)
    dtype: tl.constexpr = h.data.dtype.element_ty
    store_parts(h, bags, slots, s, offsets, real, tile, r, k, config, dtype, EXACT, BLOCK_K)


@triton.jit
def combine_kernel(
    bags, slots, pooled, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """pooled [B, K, D]: one program per bag, head and block of channels, its slots in ascending order."""
    D, K = bags.D, bags.K
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    i_d, pid = pid % blocks, pid // blocks
    i_k, bag = pid % K, pid // K
    low, high = bag_slots(bags, bag, BLOCK_M)
    d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    i_s = tl.arange(0, BLOCK_S)
    largest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    for s0 in range(low, high, BLOCK_S):
        slot = s0 + i_s
        m = tl.load(slots.maxima + slot.to(tl.int64) * K + i_k, mask=slot < high, other=-float("inf"))
        largest = tl.maximum(largest, m)
    top = tl.max(largest, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK_S,), tl.float32)
    z = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for s0 in range(low, high, BLOCK_S):
        slot = s0 + i_s
        at = slot.to(tl.int64) * K + i_k
        scale = tl.exp(tl.load(slots.maxima + at, mask=slot < high, other=-float("inf")) - top)
        total += scale * tl.load(slots.sums + at, mask=slot < high, other=0.0)
        mask = (slot < high)[:, None] & (d < D)[None, :]
        z += scale[:, None] * tl.load(slots.parts + at[:, None] * D + d[None, :], mask=mask, other=0.0)
    total = tl.sum(total, axis=0)
    z = tl.sum(z, axis=0) / tl.where(total == 0, 1.0, total)  # no real instance: 0
    p_pooled = pooled + (bag.to(tl.int64) * K + i_k) * D + d
    tl.store(p_pooled, narrow(z, pooled.dtype.element_ty), mask=d < D)


class _Problem(NamedTuple):
    """Arguments as the kernels take them. dtype: of products. weights is None where scores are given."""

    h: Instances
    bags: Bags
    dtype: torch.dtype
    plan: configs.PoolPlan
    weights: Weights | None = None
    dropout: Dropout | None = None
    activation: str = ""


def _layout(
    h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, hidden: int, heads: int
) -> tuple[Instances, Bags]:
    mask_strides = (0, 0) if mask is None else mask.stride()
    if cu_seqlens is None:
        batch, n, dim = h.shape
        return Instances(h, mask, *h.stride(), *mask_strides), Bags(None, batch * n, n, batch, dim, hidden, heads)
    rows, dim = h.shape
    bags = Bags(cu_seqlens.contiguous(), rows, rows, cu_seqlens.shape[0] - 1, dim, hidden, heads)
    return Instances(h, mask, 0, *h.stride(), *mask_strides), bags


def _problem(given: PoolArguments, plan: configs.PoolPlan | None) -> _Problem:
    h, bags = _layout(given.h, given.mask, given.cu_seqlens, *given.w_weight.shape[::-1])
    dtype = torch.promote_types(given.h.dtype, given.v_weight.dtype)
    plan = plan or configs.pool_plan(bags.D, dtype, configs.arch(given.h.device))
    v, u = (
        None if x is None else rounded(x.to(dtype).contiguous(), plan.precision.dot)
        for x in (given.v_weight, given.u_weight)
    )
    v_bias, u_bias, w, w_bias = (
        None if x is None else x.contiguous() for x in (given.v_bias, given.u_bias, given.w_weight, given.w_bias)
    )
    threshold, dropout = round(given.dropout_p * 65536), None
    if threshold > 0:
        scale = 0.0 if threshold == 65536 else 65536 / (65536 - threshold)
        dropout = Dropout(given.seed, threshold, scale if u is None else scale**2)
    return _Problem(h, bags, dtype, plan, Weights(v, v_bias, u, u_bias, w, w_bias), dropout, given.activation)


def _problem_of_scores(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Problem:
    h, bags = _layout(value, mask, cu_seqlens, 0, scores.shape[-2])
    return _Problem(h, bags, value.dtype, configs.pool_plan(bags.D, value.dtype, configs.arch(value.device)))


@configs.kept
def _block_k(heads: int) -> int:
    return max(16, triton.next_power_of_2(heads))


def _slots(p: _Problem, block_m: int, *parts: int) -> Slots:
    """For tiles of block_m rows; parts: the last sizes of ``Slots.parts``."""
    shape = cdiv(p.bags.T, block_m) + p.bags.B, p.bags.K
    shapes = shape, shape, (*shape, *parts)
    return Slots(*(torch.empty(x, dtype=torch.float32, device=p.h.data.device) for x in shapes))


def _combine(p: _Problem, slots: Slots) -> Tensor:
    """pooled [B, K, D] of the slots."""
    bags = p.bags
    pooled = torch.empty(bags.B, bags.K, bags.D, dtype=p.dtype, device=p.h.data.device)
    if pooled.numel() > 0:
        block_s, block_d = 16, 64
        combine_kernel[(bags.B * bags.K * cdiv(bags.D, block_d),)](
            bags, slots, pooled, BLOCK_M=p.plan.forward.block_m, BLOCK_S=block_s, BLOCK_D=block_d
        )
    return pooled


def _forward(p: _Problem, pool: bool) -> tuple[Tensor | None, Tensor]:
    """pooled (None unless ``pool``) and scores."""
    h, bags, dtype, plan, weights, dropout, activation = p
    shape = (bags.B, bags.K, bags.N) if bags.cu_seqlens is None else (bags.K, bags.T)
    scores = torch.empty(shape, dtype=torch.float32, device=h.data.device)
    if scores.numel() == 0:
        return scores.new_zeros(bags.B, bags.K, bags.D, dtype=dtype) if pool else None, scores
    config = plan.forward
    slots = _slots(p, config.block_m, bags.D) if pool else None
    forward_kernel[(cdiv(bags.T, config.block_m),)](
        h, bags, weights, dropout, scores, slots, config, plan.precision, activation, _block_k(bags.K),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return _combine(p, slots) if pool else None, scores


def gated_attention_pool(*given, plan: configs.PoolPlan | None = None) -> tuple[Tensor, Tensor]:
    """pooled [B, K, D] in the dtype of products and scores [B, K, N] or [K, T] in float32. given: ``PoolArguments``."""
    return _forward(_problem(PoolArguments(*given), plan), pool=True)


def attention_scores(*given, plan: configs.PoolPlan | None = None) -> Tensor:
    """The scores of ``gated_attention_pool`` alone."""
    return _forward(_problem(PoolArguments(*given), plan), pool=False)[1]


def pool_by_scores(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """pooled [B, K, D] in value's dtype, for scores [B, K, N] or [K, T]."""
    p = _problem_of_scores(scores, value, mask, cu_seqlens)
    h, bags, config = p.h, p.bags, p.plan.forward
    if scores.numel() == 0:
        return value.new_zeros(bags.B, bags.K, bags.D)
    slots = _slots(p, config.block_m, bags.D)
    scored_parts_kernel[(cdiv(bags.T, config.block_m),)](
        h, bags, scores.float().contiguous(), slots, config, p.plan.precision.exact, _block_k(bags.K),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return _combine(p, slots)


@triton.jit
def pooled_grad_kernel(
    h, bags, grad_pooled, scores, products, slots, config: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """products q = ĝ·h in the layout of scores, and the slots with Σ e·q [slots, K] as parts."""
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_D: tl.constexpr = config.block_d
    D, K = bags.D, bags.K
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(h, bags, r)
    real = real_rows(h, bags, r, bags.T)
    at = score_offsets(bags, r, k)
    s = load_scores(scores, bags, r, k)

    end = tl.minimum((tile + 1) * BLOCK_M, bags.T)
    bag = bag_of(bags, tile * BLOCK_M)
    start = bag_start(bags, bag)
    while (start < end) & (bag < bags.B):
        after = bag_start(bags, bag + 1)
        belongs = (r >= start) & (r < after) & (r < bags.T)
        inside = real & belongs
        q = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = narrow(load_rows(h, bags, offsets, inside, d), grad_pooled.dtype.element_ty)
            p_grad = grad_pooled + ((bag.to(tl.int64) * K + k)[None, :] * D + d[:, None])
            g = tl.load(p_grad, mask=(d < D)[:, None] & (k < K)[None, :], other=0.0)
            q = accumulate(q, (x,), (g,), EXACT)
        tl.store(products + at, q, mask=belongs[:, None] & (k < K)[None, :])
        largest, e = softmax_parts(s, inside)
        slot = (tile + bag).to(tl.int64) * K + k
        tl.store(slots.maxima + slot, largest, mask=k < K)
        tl.store(slots.sums + slot, tl.sum(e, axis=0), mask=k < K)
        tl.store(slots.parts + slot, tl.sum(e * q, axis=0), mask=k < K)
        bag += 1
        start = after


@triton.jit
def score_grad_kernel(
    h, bags, scores, grad_scores, slots, attention, grad,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """attention a = softmax(scores) and, over the products q in ``grad``, ds = a ⊙ (q - Σ a q) + grad_scores."""
    K = bags.K
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    i_s = tl.arange(0, BLOCK_S)
    real = real_rows(h, bags, r, bags.T)
    at = score_offsets(bags, r, k)
    s = load_scores(scores, bags, r, k)
    q = load_scores(grad, bags, r, k)
    extra = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if grad_scores is not None:
        extra = load_scores(grad_scores, bags, r, k).to(tl.float32)

    end = tl.minimum((tile + 1) * BLOCK_M, bags.T)
    bag = bag_of(bags, tile * BLOCK_M)
    start = bag_start(bags, bag)
    while (start < end) & (bag < bags.B):
        after = bag_start(bags, bag + 1)
        low, high = bag_slots(bags, bag, BLOCK_M)
        top = tl.full((BLOCK_K,), -float("inf"), tl.float32)
        for s0 in range(low, high, BLOCK_S):
            slot = (s0 + i_s)[:, None]
            held = (slot < high) & (k < K)[None, :]
            m = tl.load(slots.maxima + slot.to(tl.int64) * K + k[None, :], mask=held, other=-float("inf"))
            top = tl.maximum(top, tl.max(m, axis=0))
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.zeros((BLOCK_K,), tl.float32)
        mean = tl.zeros((BLOCK_K,), tl.float32)
        for s0 in range(low, high, BLOCK_S):
            slot = (s0 + i_s)[:, None]
            held = (slot < high) & (k < K)[None, :]
            p = slot.to(tl.int64) * K + k[None, :]
            scale = tl.exp(tl.load(slots.maxima + p, mask=held, other=-float("inf")) - top[None, :])
            total += tl.sum(scale * tl.load(slots.sums + p, mask=held, other=0.0), axis=0)
            mean += tl.sum(scale * tl.load(slots.parts + p, mask=held, other=0.0), axis=0)
        total = tl.where(total == 0, 1.0, total)  # no real instance, so no row inside
        belongs = (r >= start) & (r < after) & (r < bags.T)
        inside = (real & belongs)[:, None]
        a = tl.where(inside, tl.exp(s - top[None, :]) / total[None, :], 0.0)
        ds = tl.where(inside, a * (q - (mean / total)[None, :]) + extra, 0.0)
        tl.store(attention + at, a, mask=belongs[:, None] & (k < K)[None, :])
        tl.store(grad + at, ds, mask=belongs[:, None] & (k < K)[None, :])
        bag += 1
        start = after


@triton.jit
def branch_grad_kernel(
    h, bags, weights, dropout, grad, grad_branches, part_bias, part_heads, first_tile,
    config: tl.constexpr, precision: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows and a block of hidden units, from the gradient ds of scores.

    With t = φ(V h + b_V) and σ the branches; a dropout's factor is in t and in φ'. Outputs, None where not needed:
    grad_branches dP [rows of this launch, (1 + gated)·L]: dt = (wᵀds) ⊙ σ ⊙ φ', then dσ = (wᵀds) ⊙ t ⊙ σ(1 - σ).
    part_bias [tiles, 1 + gated, L]: their sums. part_heads [tiles, K, L]: ds ⊗ (t ⊙ σ).
    """
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_L: tl.constexpr = config.block_l
    PRECISION: tl.constexpr = precision.dot
    EXACT: tl.constexpr = precision.exact
    GATED: tl.constexpr = weights.u is not None
    K, L = bags.K, bags.L
    blocks = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    i_l, i_tile = pid % blocks, pid // blocks
    tile = first_tile + i_tile
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(h, bags, r)
    real = real_rows(h, bags, r, bags.T)
    v, u = projections(h, bags, weights, offsets, real, unit, config, PRECISION)
    t = activate(v, ACTIVATION)
    slope = activation_slope(v, t, ACTIVATION)
    if dropout is not None:
        keep = dropout_factor(dropout, r, i_l * BLOCK_L, GATED, BLOCK_M, BLOCK_L)
        t *= keep
        slope *= keep
    gate = tl.sigmoid(u) if GATED else u + 1
    ds = load_scores(grad, bags, r, k)
    w = load_heads(weights.w, bags, k, unit)
    ds_terms = split(ds, 2, precision.full_heads)
    w_terms = split(w, precision.terms, precision.full_heads)
    dg = dot_terms(ds_terms, w_terms, tl.zeros((BLOCK_M, BLOCK_L), tl.float32), EXACT)
    dt = dg * gate * slope
    du = dg * t * gate * (1 - gate)

    width = (2 if GATED else 1) * L
    if grad_branches is not None:
        i_r = (r - first_tile * BLOCK_M).to(tl.int64)
        at = i_r[:, None] * width + unit[None, :]
        held = (r < bags.T)[:, None] & (unit < L)[None, :]
        tl.store(grad_branches + at, factor(dt, grad_branches.dtype.element_ty, PRECISION), mask=held)
        if GATED:
            tl.store(grad_branches + (at + L), factor(du, grad_branches.dtype.element_ty, PRECISION), mask=held)
    if part_bias is not None:
        p_bias = part_bias + tile.to(tl.int64) * width + unit
        tl.store(p_bias, tl.sum(dt, axis=0), mask=unit < L)
        if GATED:
            tl.store(p_bias + L, tl.sum(du, axis=0), mask=unit < L)
    if part_heads is not None:
        terms = split(tl.trans(t * gate), 2, precision.full_heads)  # [BLOCK_L, BLOCK_M]
        x = dot_terms(terms, ds_terms, tl.zeros((BLOCK_L, BLOCK_K), tl.float32), EXACT)
        p_heads = part_heads + ((tile.to(tl.int64) * K + k)[None, :] * L + unit[:, None])
        tl.store(p_heads, x, mask=(unit < L)[:, None] & (k < K)[None, :])


@triton.jit
def row_grad_kernel(
    bags, weights, grad_branches, attention, grad_pooled, grad_h, first_row, last_row,
    config: tl.constexpr, precision: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_h [rows, D] = dt V + dσ U + aᵀĝ for rows first_row ≤ r < last_row; a term that is None is left out."""
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_N: tl.constexpr = config.block_n
    BLOCK_L: tl.constexpr = config.block_k
    PRECISION: tl.constexpr = precision.dot
    EXACT: tl.constexpr = precision.exact
    BRANCHES: tl.constexpr = 0 if grad_branches is None else (1 if weights.u is None else 2)
    D, L, K = bags.D, bags.L, bags.K
    blocks = tl.cdiv(D, BLOCK_N)
    pid = tl.program_id(0)
    i_d, i_r = pid % blocks, pid // blocks
    row0 = first_row + i_r * BLOCK_M
    r = row0 + tl.arange(0, BLOCK_M)
    d = i_d * BLOCK_N + tl.arange(0, BLOCK_N)
    at_row = (r - first_row).to(tl.int64)[:, None] * (BRANCHES * L)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for branch in tl.static_range(BRANCHES):
        for l0 in range(0, L, BLOCK_L):
            unit = l0 + tl.arange(0, BLOCK_L)
            held = (r < last_row)[:, None] & (unit < L)[None, :]
            dp = tl.load(grad_branches + (at_row + branch * L + unit[None, :]), mask=held, other=0.0)
            weight = weights.u if branch else weights.v
            p_weight = weight + (unit.to(tl.int64)[:, None] * D + d[None, :])
            w = tl.load(p_weight, mask=(unit < L)[:, None] & (d < D)[None, :], other=0.0)
            acc = add_product(acc, dp, w.to(grad_branches.dtype.element_ty), PRECISION)
    if grad_pooled is not None:
        k = tl.arange(0, BLOCK_K)
        end = tl.minimum(row0 + BLOCK_M, last_row)
        at = score_offsets(bags, r, k)
        bag = bag_of(bags, row0)
        start = bag_start(bags, bag)
        while (start < end) & (bag < bags.B):
            after = bag_start(bags, bag + 1)
            inside = (r >= start) & (r < after) & (r < last_row)
            a = tl.load(attention + at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
            p_grad = grad_pooled + ((bag.to(tl.int64) * K + k)[:, None] * D + d[None, :])
            g = tl.load(p_grad, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            g_terms = split(g, precision.terms, precision.full_heads)
            acc = accumulate(acc, split(a, 2, precision.full_heads), g_terms, EXACT)
            bag += 1
            start = after
    p_h = grad_h + (r.to(tl.int64)[:, None] * D + d[None, :])
    tl.store(p_h, narrow(acc, grad_h.dtype.element_ty), mask=(r < last_row)[:, None] & (d < D)[None, :])


@triton.jit
def weight_grad_kernel(
    h, bags, grad_branches, parts, columns, first_row, last_row, step,
    config: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """parts [splits, units, D] (+)= dPᵀh over the split's ``step`` rows, for the columns of dP."""
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_N: tl.constexpr = config.block_n
    BLOCK_R: tl.constexpr = config.block_k
    D, units = bags.D, columns.units
    blocks_u, blocks_d = tl.cdiv(units, BLOCK_M), tl.cdiv(D, BLOCK_N)
    pid = tl.program_id(0)
    i_d, pid = pid % blocks_d, pid // blocks_d
    i_u, i_split = pid % blocks_u, pid // blocks_u
    unit = i_u * BLOCK_M + tl.arange(0, BLOCK_M)
    d = i_d * BLOCK_N + tl.arange(0, BLOCK_N)
    p_parts = parts + ((i_split.to(tl.int64) * units + unit)[:, None] * D + d[None, :])
    held = (unit < units)[:, None] & (d < D)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ACCUMULATE:
        acc = tl.load(p_parts, mask=held, other=0.0)
    low = first_row + i_split * step
    for row0 in range(low, tl.minimum(low + step, last_row), BLOCK_R):
        r = row0 + tl.arange(0, BLOCK_R)
        at = (r - first_row).to(tl.int64)[:, None] * columns.width + columns.first + unit[None, :]
        dp = tl.load(grad_branches + at, mask=(r < last_row)[:, None] & (unit < units)[None, :], other=0.0)
        rows = real_rows(h, bags, r, last_row)
        x = load_rows(h, bags, row_offsets(h, bags, r), rows, d)
        x = factor(x, grad_branches.dtype.element_ty, PRECISION)
        acc = add_product(acc, tl.trans(dp), x, PRECISION)
    tl.store(p_parts, acc, mask=held)


class Columns(NamedTuple):
    """Of dP [rows, width]: ``units`` from ``first`` on, those whose weights' gradients are needed."""

    width: int
    first: int
    units: int


def _score_gradient(
    p: _Problem, grad_pooled: Tensor | None, grad_scores: Tensor | None, scores: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradient ds of scores, float32 in their layout, and the attention (None without grad_pooled)."""
    h, bags, config = p.h, p.bags, p.plan.backward
    if grad_pooled is None:
        grad = grad_scores.float()
        return (grad if h.mask is None else grad.masked_fill(~h.mask[:, None], 0)).contiguous(), None
    grad, attention = torch.empty_like(scores), torch.empty_like(scores)
    tiles, block_k, slots = cdiv(bags.T, config.block_m), _block_k(bags.K), _slots(p, config.block_m)
    pooled_grad_kernel[(tiles,)](
        h, bags, grad_pooled, scores, grad, slots, config, p.plan.precision.exact, block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    score_grad_kernel[(tiles,)](
        h, bags, scores, grad_scores, slots, attention, grad, BLOCK_M=config.block_m, BLOCK_S=16, BLOCK_K=block_k
    )
    return grad, attention


def _branch_gradients(p: _Problem, ds: Tensor, outputs: tuple[Tensor | None, ...], first_tile: int, tiles: int) -> None:
    """outputs: grad_branches, part_bias and part_heads of ``branch_grad_kernel``."""
    config = p.plan.backward
    if p.bags.L > 0:
        branch_grad_kernel[(tiles * cdiv(p.bags.L, config.block_l),)](
            p.h, p.bags, p.weights, p.dropout, ds, *outputs, first_tile, config, p.plan.precision, p.activation,
            _block_k(p.bags.K), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def _row_gradients(
    p: _Problem, grad_branches: Tensor | None, attention: Tensor | None, grad_pooled: Tensor | None, grad_h: Tensor,
    first_row: int, last_row: int,
) -> None:  # fmt: skip
    config = p.plan.row_grad
    if grad_h.numel() > 0:
        row_grad_kernel[(cdiv(last_row - first_row, config.block_m) * cdiv(p.bags.D, config.block_n),)](
            p.bags, p.weights, grad_branches, attention, grad_pooled, grad_h, first_row, last_row, config,
            p.plan.precision, _block_k(p.bags.K), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def _weight_gradients(
    p: _Problem, grad_branches: Tensor | None, parts: Tensor, columns: Columns, step: int, first_row: int, last_row: int
) -> None:
    config = p.plan.weight_grad
    if parts.numel() > 0:
        blocks = cdiv(columns.units, config.block_m) * cdiv(p.bags.D, config.block_n)
        weight_grad_kernel[(blocks * parts.shape[0],)](
            p.h, p.bags, grad_branches, parts, columns, first_row, last_row, step, config, p.plan.precision.dot,
            ACCUMULATE=first_row > 0, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def pool_by_scores_backward(
    grad_pooled: Tensor, scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of (scores, value); one not needed is an empty tensor."""
    if scores.numel() == 0:
        return scores.new_zeros(scores.shape if needs[0] else 0), value.new_zeros(value.shape if needs[1] else 0)
    p = _problem_of_scores(scores, value, mask, cu_seqlens)
    grad_pooled = grad_pooled.to(value.dtype).contiguous()
    ds, attention = _score_gradient(p, grad_pooled, None, scores.float().contiguous())
    grad_value = value.new_empty(value.shape if needs[1] else 0)
    _row_gradients(p, None, attention, grad_pooled, grad_value, 0, p.bags.T)
    return ds.to(scores.dtype) if needs[0] else scores.new_empty(0), grad_value


def gated_attention_pool_backward(
    grad_pooled: Tensor | None, grad_scores: Tensor | None, *given, plan: configs.PoolPlan | None = None
) -> tuple[Tensor, ...]:
    """Gradients of (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias); one not needed is an empty tensor.

    given: ``PoolArguments``, the scores, and for each input whether its gradient is needed.
    """
    *given, scores, needs = given
    given = PoolArguments(*given)
    need = dict(zip(PoolArguments._fields, needs))
    grads = _gradients(given, scores, grad_pooled, grad_scores, need, plan) if scores.numel() > 0 else {}

    def zeros(x: Tensor | None, needed: bool) -> Tensor:
        return (given.h if x is None else x).new_zeros(x.shape if needed else 0)

    return tuple(grads[name].to(x.dtype) if name in grads else zeros(x, need[name]) for name, x in zip(need, given))


def _gradients(
    given: PoolArguments, scores: Tensor, grad_pooled: Tensor | None, grad_scores: Tensor | None, need: dict[str, bool],
    plan: configs.PoolPlan | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients by the names of ``PoolArguments``; a gradient of 0 may be absent."""
    p = _problem(given, plan)
    (bags, plan), L = (p.bags, p.plan), p.bags.L
    grad_pooled = None if grad_pooled is None else grad_pooled.to(p.dtype).contiguous()
    grad_scores = None if grad_scores is None else grad_scores.contiguous()
    ds, attention = _score_gradient(p, grad_pooled, grad_scores, scores.contiguous())
    grads = {"w_bias": ds.sum(dim=(0, 2) if bags.cu_seqlens is None else 1)} if need["w_bias"] else {}
    need_branches = need["h"] or need["v_weight"] or need["u_weight"]
    need_bias = need["v_bias"] or need["u_bias"]
    if not (need_branches or need_bias or need["w_weight"]) or L == 0 and not need["h"]:
        return grads

    block_m, dtype = plan.backward.block_m, plan.precision.product_dtype
    tiles, width = cdiv(bags.T, block_m), L if p.weights.u is None else 2 * L
    held_tiles = min(tiles, configs.workspace_tiles(block_m, width, dtype))
    grad_branches = ds.new_empty(held_tiles * block_m, width, dtype=dtype) if need_branches else None
    part_bias = ds.new_empty(tiles, width) if need_bias else None
    part_heads = ds.new_empty(tiles, bags.K, L) if need["w_weight"] else None
    # Weights are needed as columns of dP: t's come first, the gate's after them.
    columns = Columns(width, 0 if need["v_weight"] else L, (need["v_weight"] + need["u_weight"]) * L)
    splits, step = configs.weight_grad_splits(plan, columns.units, bags.D, held_tiles * block_m)
    part_weight = ds.new_empty(splits, columns.units, bags.D)
    if need["h"]:
        grads["h"] = torch.empty(given.h.shape, dtype=given.h.dtype, device=given.h.device)
    for first in range(0, tiles, held_tiles):
        held = min(held_tiles, tiles - first)
        rows = first * block_m, min((first + held) * block_m, bags.T)
        _branch_gradients(p, ds, (grad_branches, part_bias, part_heads), first, held)
        if need["h"]:
            _row_gradients(p, grad_branches, attention, grad_pooled, grads["h"], *rows)
        _weight_gradients(p, grad_branches, part_weight, columns, step, *rows)
    parts = {
        "v_weight": (part_weight, 0), "u_weight": (part_weight, L - columns.first),
        "v_bias": (part_bias, 0), "u_bias": (part_bias, L),
    }  # fmt: skip
    grads |= {name: x[:, at : at + L].sum(dim=0) for name, (x, at) in parts.items() if need[name]}
    return grads | {"w_weight": part_heads.sum(dim=0)} if need["w_weight"] else grads
