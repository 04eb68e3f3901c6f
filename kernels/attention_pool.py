"""Gated attention pooling on GPUs, its gradients, and the launchers.

Instances of all bags are rows r of one list: dense bags [B, N] lie one after another, ragged ones already do. Programs
own tiles of rows whatever bags those belong to, so no bag is padded and nothing has to be known on the host. A tile's
partial result for bag b goes to slot tile + b, which no other pair shares (both only rise along the list); a second
kernel adds the slots of each bag in order.

The backward forms activations again, tile by tile; their gradients dP = [dt | dσ] live in a workspace of bounded size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ercn.kernels import configs
from ercn.kernels._dropout import dropout_factor
from ercn.kernels._tiles import accumulate, add_product, dot, dot_terms, factor, narrow, rounded, split
from ercn.kernels.configs import cdiv


@triton.jit
def bag_start(cu_seqlens, bag, N, RAGGED: tl.constexpr):
    """First row of a bag; that of the bag after the last is the number of rows."""
    if RAGGED:
        return tl.load(cu_seqlens + bag).to(tl.int32)
    else:
        return bag * N


@triton.jit
def bag_of(cu_seqlens, row, bags, N, RAGGED: tl.constexpr):
    """The bag that holds a row."""
    if RAGGED:
        low = row * 0
        high = low + bags
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle) <= row
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
    else:
        low = row // N
    return low


@triton.jit
def row_offsets(r, N, stride_b, stride_n, RAGGED: tl.constexpr):
    """Where rows r begin in a tensor [B, N, …], or [T, …] if ragged: int64."""
    if RAGGED:
        return r.to(tl.int64) * stride_n
    else:
        return (r // N).to(tl.int64) * stride_b + (r % N).to(tl.int64) * stride_n


@triton.jit
def real_rows(mask, r, T, N, stride_b, stride_n, MASKED: tl.constexpr):
    """Which rows exist and are not masked."""
    real = r < T
    if MASKED:
        real = real & tl.load(mask + row_offsets(r, N, stride_b, stride_n, False), mask=real, other=0)
    return real


@triton.jit
def score_offsets(r, k, T, N, K, RAGGED: tl.constexpr):
    """Offsets of [len(r), len(k)] in scores [B, K, N] or [K, T]."""
    if RAGGED:
        return k[None, :].to(tl.int64) * T + r[:, None]
    else:
        return ((r // N).to(tl.int64)[:, None] * K + k[None, :]) * N + (r % N)[:, None]


@triton.jit
def load_weight(weight, unit, L, d, D):
    """weight[unit, d] of a contiguous [L, D], transposed: [len(d), len(unit)]."""
    offsets = unit.to(tl.int64)[None, :] * D + d[:, None]
    return tl.load(weight + offsets, mask=(unit < L)[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def load_rows(h, offsets, rows, d, D, stride_d):
    """h[rows, d]: [len(rows), len(d)], zero where ``rows`` is False."""
    p_h = h + offsets[:, None] + d.to(tl.int64)[None, :] * stride_d
    return tl.load(p_h, mask=rows[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def tanh(x):
    """To a few ulps of float32: a polynomial where 1 - e^(-2|x|) would cancel."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2 * tl.abs(x))
    far = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


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
def normal(x):
    """The standard normal distribution function."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def projections(
    h, offsets, rows, unit, v_weight, v_bias, u_weight, u_bias, D, L, stride_d,
    GATED: tl.constexpr, V_BIAS: tl.constexpr, U_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """V h + b_V and U h + b_U for a tile of rows and hidden units, 0 for units beyond L: two of [BLOCK_M, BLOCK_L].

    h is widened to the weights' dtype where it is narrower.
    """
    v = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = factor(load_rows(h, offsets, rows, d, D, stride_d), v_weight.dtype.element_ty, PRECISION)
        v = add_product(v, x, load_weight(v_weight, unit, L, d, D), PRECISION)
        if GATED:
            u = add_product(u, x, load_weight(u_weight, unit, L, d, D), PRECISION)
    if V_BIAS:
        v += tl.load(v_bias + unit, mask=unit < L, other=0.0).to(tl.float32)[None, :]
    if U_BIAS:
        u += tl.load(u_bias + unit, mask=unit < L, other=0.0).to(tl.float32)[None, :]
    # An infinite h times a padded weight is NaN.
    v = tl.where((unit < L)[None, :], v, 0.0)
    u = tl.where((unit < L)[None, :], u, 0.0)
    return v, u


@triton.jit
def load_heads(w_weight, k, K, unit, L):
    """w_weight[k, unit] of a contiguous [K, L] in float32: [len(k), len(unit)]."""
    mask = (k < K)[:, None] & (unit < L)[None, :]
    return tl.load(w_weight + (k[:, None].to(tl.int64) * L + unit[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def softmax_parts(s, inside):
    """Largest score of the rows ``inside`` and exp(s - largest), 0 elsewhere, for s [rows, heads]."""
    s = tl.where(inside[:, None], s, -float("inf"))
    largest = tl.max(s, axis=0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    return largest, tl.exp(s - shift[None, :])


@triton.jit
def store_parts(
    value, s, offsets, real, tile, r, k, cu_seqlens, maxima, sums, parts, T, N, bags, D, K, stride_d,
    dtype: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each bag among the tile's rows the largest score, Σ e and Σ e·value, with e = exp(score - largest).

    maxima, sums [slots, K], parts [slots, K, D]. Products are of factors in ``dtype``.
    """
    end = tl.minimum((tile + 1) * BLOCK_M, T)
    bag = bag_of(cu_seqlens, tile * BLOCK_M, bags, N, RAGGED)
    start = bag_start(cu_seqlens, bag, N, RAGGED)
    while (start < end) & (bag < bags):
        after = bag_start(cu_seqlens, bag + 1, N, RAGGED)
        inside = real & (r >= start) & (r < after)
        largest, e = softmax_parts(s, inside)
        # Numerator and denominator meet the same rounded weights.
        e = narrow(e, dtype)
        slot = (tile + bag).to(tl.int64)
        tl.store(maxima + slot * K + k, largest, mask=k < K)
        tl.store(sums + slot * K + k, tl.sum(e.to(tl.float32), axis=0), mask=k < K)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = narrow(load_rows(value, offsets, inside, d, D, stride_d), dtype)
            z = dot(tl.trans(x), e, tl.zeros((BLOCK_D, BLOCK_K), tl.float32), EXACT)
            p_parts = parts + ((slot * K + k)[None, :] * D + d[:, None])
            tl.store(p_parts, z, mask=(d < D)[:, None] & (k < K)[None, :])
        bag += 1
        start = after


@triton.jit
def forward_kernel(
    h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens, seed, scores, maxima, sums, parts,
    T, N, bags, D, L, K, stride_b, stride_n, stride_d, stride_mb, stride_mn, threshold, scale,
    POOLED: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, V_BIAS: tl.constexpr,
    U_BIAS: tl.constexpr, W_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, TERMS: tl.constexpr,
    FULL: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the scores of BLOCK_M rows, and where POOLED what ``store_parts`` makes of them."""
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(r, N, stride_b, stride_n, RAGGED)
    real = real_rows(mask, r, T, N, stride_mb, stride_mn, MASKED)

    s = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for l0 in range(0, L, BLOCK_L):
        unit = l0 + tl.arange(0, BLOCK_L)
        v, u = projections(
            h, offsets, real, unit, v_weight, v_bias, u_weight, u_bias, D, L, stride_d,
            GATED, V_BIAS, U_BIAS, PRECISION, BLOCK_M, BLOCK_L, BLOCK_D,
        )  # fmt: skip
        gated = activate(v, ACTIVATION) * (tl.sigmoid(u) if GATED else u + 1)
        if DROPOUT:
            gated *= dropout_factor(seed, r, l0, threshold, scale, GATED, BLOCK_M, BLOCK_L)
        w = tl.trans(load_heads(w_weight, k, K, unit, L))
        s = accumulate(s, split(gated, 2, FULL), split(w, TERMS, FULL), EXACT)
    if W_BIAS:
        s += tl.load(w_bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    s = tl.where(real[:, None], s, -float("inf"))
    tl.store(scores + score_offsets(r, k, T, N, K, RAGGED), s, mask=(r < T)[:, None] & (k < K)[None, :])

    if POOLED:
        store_parts(
            h, s, offsets, real, tile, r, k, cu_seqlens, maxima, sums, parts, T, N, bags, D, K, stride_d,
            v_weight.dtype.element_ty, RAGGED, EXACT, BLOCK_M, BLOCK_D, BLOCK_K,
        )  # fmt: skip


@triton.jit
def scored_parts_kernel(
    value, scores, mask, cu_seqlens, maxima, sums, parts,
    T, N, bags, D, K, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: ``store_parts`` of BLOCK_M rows whose scores are given."""
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(r, N, stride_b, stride_n, RAGGED)
    real = real_rows(mask, r, T, N, stride_mb, stride_mn, MASKED)
    within = (r < T)[:, None] & (k < K)[None, :]
    s = tl.load(scores + score_offsets(r, k, T, N, K, RAGGED), mask=within, other=0.0)
    store_parts(
        value, s, offsets, real, tile, r, k, cu_seqlens, maxima, sums, parts, T, N, bags, D, K, stride_d,
        value.dtype.element_ty, RAGGED, EXACT, BLOCK_M, BLOCK_D, BLOCK_K,
    )  # fmt: skip


@triton.jit
def bag_slots(cu_seqlens, bag, N, BLOCK_M: tl.constexpr, RAGGED: tl.constexpr):
    """First slot of a bag and the slot after its last."""
    start = bag_start(cu_seqlens, bag, N, RAGGED)
    after = bag_start(cu_seqlens, bag + 1, N, RAGGED)
    low = start // BLOCK_M + bag
    return low, tl.where(after > start, (after - 1) // BLOCK_M + bag + 1, low)


@triton.jit
def combine_kernel(
    maxima, sums, parts, pooled, cu_seqlens, N, D, K,
    RAGGED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """pooled [B, K, D]: one program per bag, head and block of channels, its slots in ascending order."""
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    i_d, pid = pid % blocks, pid // blocks
    i_k, bag = pid % K, pid // K
    low, high = bag_slots(cu_seqlens, bag, N, BLOCK_M, RAGGED)
    d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    i_s = tl.arange(0, BLOCK_S)
    largest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    for s0 in range(low, high, BLOCK_S):
        slot = s0 + i_s
        m = tl.load(maxima + slot.to(tl.int64) * K + i_k, mask=slot < high, other=-float("inf"))
        largest = tl.maximum(largest, m)
    top = tl.max(largest, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK_S,), tl.float32)
    z = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for s0 in range(low, high, BLOCK_S):
        slot = s0 + i_s
        at = slot.to(tl.int64) * K + i_k
        scale = tl.exp(tl.load(maxima + at, mask=slot < high, other=-float("inf")) - top)
        total += scale * tl.load(sums + at, mask=slot < high, other=0.0)
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=(slot < high)[:, None] & (d < D)[None, :], other=0.0)
        z += scale[:, None] * part
    total = tl.sum(total, axis=0)
    z = tl.sum(z, axis=0) / tl.where(total == 0, 1.0, total)  # no real instance: 0
    p_pooled = pooled + (bag.to(tl.int64) * K + i_k) * D + d
    tl.store(p_pooled, narrow(z, pooled.dtype.element_ty), mask=d < D)


@triton.jit
def pooled_grad_kernel(
    h, grad_pooled, scores, mask, cu_seqlens, products, maxima, sums, weighted,
    T, N, bags, D, K, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """products q = ĝ·h in the layout of scores; per slot and head the largest score, Σ e and Σ e·q."""
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(r, N, stride_b, stride_n, RAGGED)
    real = real_rows(mask, r, T, N, stride_mb, stride_mn, MASKED)
    at = score_offsets(r, k, T, N, K, RAGGED)
    s = tl.load(scores + at, mask=(r < T)[:, None] & (k < K)[None, :], other=0.0)

    end = tl.minimum((tile + 1) * BLOCK_M, T)
    bag = bag_of(cu_seqlens, tile * BLOCK_M, bags, N, RAGGED)
    start = bag_start(cu_seqlens, bag, N, RAGGED)
    while (start < end) & (bag < bags):
        after = bag_start(cu_seqlens, bag + 1, N, RAGGED)
        belongs = (r >= start) & (r < after) & (r < T)
        inside = real & belongs
        q = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = narrow(load_rows(h, offsets, inside, d, D, stride_d), grad_pooled.dtype.element_ty)
            p_grad = grad_pooled + ((bag.to(tl.int64) * K + k)[None, :] * D + d[:, None])
            g = tl.load(p_grad, mask=(d < D)[:, None] & (k < K)[None, :], other=0.0)
            q = accumulate(q, (x,), (g,), EXACT)
        tl.store(products + at, q, mask=belongs[:, None] & (k < K)[None, :])
        largest, e = softmax_parts(s, inside)
        slot = (tile + bag).to(tl.int64) * K + k
        tl.store(maxima + slot, largest, mask=k < K)
        tl.store(sums + slot, tl.sum(e, axis=0), mask=k < K)
        tl.store(weighted + slot, tl.sum(e * q, axis=0), mask=k < K)
        bag += 1
        start = after


@triton.jit
def score_grad_kernel(
    scores, grad_scores, mask, cu_seqlens, maxima, sums, weighted, attention, grad,
    T, N, bags, K, stride_mb, stride_mn,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, HAS_SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """attention a = softmax(scores) and, over the products q in ``grad``, ds = a ⊙ (q - Σ a q) + grad_scores."""
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    i_s = tl.arange(0, BLOCK_S)
    real = real_rows(mask, r, T, N, stride_mb, stride_mn, MASKED)
    at = score_offsets(r, k, T, N, K, RAGGED)
    within = (r < T)[:, None] & (k < K)[None, :]
    s = tl.load(scores + at, mask=within, other=0.0)
    q = tl.load(grad + at, mask=within, other=0.0)
    extra = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if HAS_SCORES:
        extra = tl.load(grad_scores + at, mask=within, other=0.0).to(tl.float32)

    end = tl.minimum((tile + 1) * BLOCK_M, T)
    bag = bag_of(cu_seqlens, tile * BLOCK_M, bags, N, RAGGED)
    start = bag_start(cu_seqlens, bag, N, RAGGED)
    while (start < end) & (bag < bags):
        after = bag_start(cu_seqlens, bag + 1, N, RAGGED)
        low, high = bag_slots(cu_seqlens, bag, N, BLOCK_M, RAGGED)
        top = tl.full((BLOCK_K,), -float("inf"), tl.float32)
        for s0 in range(low, high, BLOCK_S):
            slot = (s0 + i_s)[:, None]
            held = (slot < high) & (k < K)[None, :]
            m = tl.load(maxima + slot.to(tl.int64) * K + k[None, :], mask=held, other=-float("inf"))
            top = tl.maximum(top, tl.max(m, axis=0))
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.zeros((BLOCK_K,), tl.float32)
        mean = tl.zeros((BLOCK_K,), tl.float32)
        for s0 in range(low, high, BLOCK_S):
            slot = (s0 + i_s)[:, None]
            held = (slot < high) & (k < K)[None, :]
            p = slot.to(tl.int64) * K + k[None, :]
            scale = tl.exp(tl.load(maxima + p, mask=held, other=-float("inf")) - top[None, :])
            total += tl.sum(scale * tl.load(sums + p, mask=held, other=0.0), axis=0)
            mean += tl.sum(scale * tl.load(weighted + p, mask=held, other=0.0), axis=0)
        total = tl.where(total == 0, 1.0, total)  # no real instance, so no row inside
        belongs = (r >= start) & (r < after) & (r < T)
        inside = (real & belongs)[:, None]
        a = tl.where(inside, tl.exp(s - top[None, :]) / total[None, :], 0.0)
        ds = tl.where(inside, a * (q - (mean / total)[None, :]) + extra, 0.0)
        tl.store(attention + at, a, mask=belongs[:, None] & (k < K)[None, :])
        tl.store(grad + at, ds, mask=belongs[:, None] & (k < K)[None, :])
        bag += 1
        start = after


@triton.jit
def branch_grad_kernel(
    h, v_weight, v_bias, u_weight, u_bias, w_weight, mask, seed, grad, grad_branches, part_bias, part_heads,
    first_tile, T, N, D, L, K, stride_b, stride_n, stride_d, stride_mb, stride_mn, threshold, scale,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, V_BIAS: tl.constexpr, U_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, TERMS: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, NEED_BRANCHES: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows and a block of hidden units, from the gradient ds of scores.

    With t = φ(V h + b_V) and σ the branches; a dropout's factor is in t and in φ'.
    grad_branches dP [rows of this launch, (1 + GATED)·L]: dt = (wᵀds) ⊙ σ ⊙ φ', then dσ = (wᵀds) ⊙ t ⊙ σ(1 - σ).
    part_bias [tiles, 1 + GATED, L]: their sums. part_heads [tiles, K, L]: ds ⊗ (t ⊙ σ).
    """
    blocks = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    i_l, i_tile = pid % blocks, pid // blocks
    tile = first_tile + i_tile
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = i_l * BLOCK_L + tl.arange(0, BLOCK_L)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(r, N, stride_b, stride_n, RAGGED)
    real = real_rows(mask, r, T, N, stride_mb, stride_mn, MASKED)
    v, u = projections(
        h, offsets, real, unit, v_weight, v_bias, u_weight, u_bias, D, L, stride_d,
        GATED, V_BIAS, U_BIAS, PRECISION, BLOCK_M, BLOCK_L, BLOCK_D,
    )  # fmt: skip
    t = activate(v, ACTIVATION)
    slope = activation_slope(v, t, ACTIVATION)
    if DROPOUT:
        keep = dropout_factor(seed, r, i_l * BLOCK_L, threshold, scale, GATED, BLOCK_M, BLOCK_L)
        t *= keep
        slope *= keep
    gate = tl.sigmoid(u) if GATED else u + 1
    within = (r < T)[:, None] & (k < K)[None, :]
    ds = tl.load(grad + score_offsets(r, k, T, N, K, RAGGED), mask=within, other=0.0)
    w = load_heads(w_weight, k, K, unit, L)
    ds_terms = split(ds, 2, FULL)
    dg = dot_terms(ds_terms, split(w, TERMS, FULL), tl.zeros((BLOCK_M, BLOCK_L), tl.float32), EXACT)
    dt = dg * gate * slope
    du = dg * t * gate * (1 - gate)

    width = (2 if GATED else 1) * L
    if NEED_BRANCHES:
        i_r = (r - first_tile * BLOCK_M).to(tl.int64)
        at = i_r[:, None] * width + unit[None, :]
        held = (r < T)[:, None] & (unit < L)[None, :]
        tl.store(grad_branches + at, factor(dt, grad_branches.dtype.element_ty, PRECISION), mask=held)
        if GATED:
            tl.store(grad_branches + (at + L), factor(du, grad_branches.dtype.element_ty, PRECISION), mask=held)
    if NEED_BIAS:
        p_bias = part_bias + tile.to(tl.int64) * width + unit
        tl.store(p_bias, tl.sum(dt, axis=0), mask=unit < L)
        if GATED:
            tl.store(p_bias + L, tl.sum(du, axis=0), mask=unit < L)
    if NEED_HEADS:
        terms = split(tl.trans(t * gate), 2, FULL)  # [BLOCK_L, BLOCK_M]
        x = dot_terms(terms, ds_terms, tl.zeros((BLOCK_L, BLOCK_K), tl.float32), EXACT)
        p_heads = part_heads + ((tile.to(tl.int64) * K + k)[None, :] * L + unit[:, None])
        tl.store(p_heads, x, mask=(unit < L)[:, None] & (k < K)[None, :])


@triton.jit
def row_grad_kernel(
    grad_branches, v_weight, u_weight, attention, grad_pooled, cu_seqlens, grad_h,
    first_row, last_row, T, N, bags, D, L, K,
    RAGGED: tl.constexpr, BRANCHES: tl.constexpr, HAS_POOLED: tl.constexpr, TERMS: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_h [rows, D] = dt V + dσ U + aᵀĝ for rows first_row ≤ r < last_row, of 0 to 2 branches."""
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
            weight = u_weight if branch else v_weight
            p_weight = weight + (unit.to(tl.int64)[:, None] * D + d[None, :])
            w = tl.load(p_weight, mask=(unit < L)[:, None] & (d < D)[None, :], other=0.0)
            acc = add_product(acc, dp, w.to(grad_branches.dtype.element_ty), PRECISION)
    if HAS_POOLED:
        k = tl.arange(0, BLOCK_K)
        end = tl.minimum(row0 + BLOCK_M, last_row)
        at = score_offsets(r, k, T, N, K, RAGGED)
        bag = bag_of(cu_seqlens, row0, bags, N, RAGGED)
        start = bag_start(cu_seqlens, bag, N, RAGGED)
        while (start < end) & (bag < bags):
            after = bag_start(cu_seqlens, bag + 1, N, RAGGED)
            inside = (r >= start) & (r < after) & (r < last_row)
            a = tl.load(attention + at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
            p_grad = grad_pooled + ((bag.to(tl.int64) * K + k)[:, None] * D + d[None, :])
            g = tl.load(p_grad, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            acc = accumulate(acc, split(a, 2, FULL), split(g, TERMS, FULL), EXACT)
            bag += 1
            start = after
    p_h = grad_h + (r.to(tl.int64)[:, None] * D + d[None, :])
    tl.store(p_h, narrow(acc, grad_h.dtype.element_ty), mask=(r < last_row)[:, None] & (d < D)[None, :])


@triton.jit
def weight_grad_kernel(
    h, grad_branches, mask, parts,
    first_row, last_row, N, D, width, first_unit, units, splits, step,
    stride_b, stride_n, stride_d, stride_mb, stride_mn,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts [splits, units, D] (+)= dPᵀh over the split's ``step`` rows, for columns of dP from first_unit on."""
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
        p_branches = grad_branches + ((r - first_row).to(tl.int64)[:, None] * width + first_unit + unit[None, :])
        dp = tl.load(p_branches, mask=(r < last_row)[:, None] & (unit < units)[None, :], other=0.0)
        rows = real_rows(mask, r, last_row, N, stride_mb, stride_mn, MASKED)
        x = load_rows(h, row_offsets(r, N, stride_b, stride_n, RAGGED), rows, d, D, stride_d)
        x = factor(x, grad_branches.dtype.element_ty, PRECISION)
        acc = add_product(acc, tl.trans(dp), x, PRECISION)
    tl.store(p_parts, acc, mask=held)


class _Bags:
    """Sizes and strides of a batch of bags, dense [B, N, D] or ragged [T, D]."""

    def __init__(self, h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None):
        self.ragged, self.masked = cu_seqlens is not None, mask is not None
        if self.ragged:
            self.count, self.n = cu_seqlens.shape[0] - 1, h.shape[0]
            self.rows = self.n
            self.strides = (0, *h.stride())
            self.cu_seqlens = cu_seqlens.contiguous()
        else:
            self.count, self.n, _ = h.shape
            self.rows = self.count * self.n
            self.strides = h.stride()
            self.cu_seqlens = None
        self.mask = mask
        self.mask_strides = mask.stride() if self.masked else (0, 0)


@configs.kept
def _narrow_constants(dtype: torch.dtype, arch: str) -> dict[str, object]:
    """Of products with the heads' weights and with the attention, which are float32-accurate."""
    terms = 1 if dtype == torch.bfloat16 else 2
    return {"TERMS": terms, "FULL": dtype == torch.float32, "EXACT": configs.exact(arch)}


@configs.kept
def _block_k(heads: int) -> int:
    return max(16, triton.next_power_of_2(heads))


@configs.kept
def _tile_constants(config: configs.PoolConfig, heads: int, ragged: bool, masked: bool) -> dict[str, object]:
    """Of every kernel with tiles of rows, features and heads."""
    return {
        "RAGGED": ragged, "MASKED": masked, "BLOCK_M": config.block_m, "BLOCK_D": config.block_d,
        "BLOCK_K": _block_k(heads), "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


@configs.kept
def _branch_constants(
    config: configs.PoolConfig, dtype: torch.dtype, arch: str, dot: str, heads: int, ragged: bool, masked: bool,
    gated: bool, v_bias: bool, u_bias: bool, activation: str, dropout: bool,
) -> dict[str, object]:  # fmt: skip
    """Of the kernels that form the branches; dtype and dot: of the projections' products."""
    return {
        **_tile_constants(config, heads, ragged, masked), **_narrow_constants(dtype, arch), "BLOCK_L": config.block_l,
        "GATED": gated, "V_BIAS": v_bias, "U_BIAS": u_bias, "ACTIVATION": activation, "DROPOUT": dropout,
        "PRECISION": dot,
    }  # fmt: skip


@configs.kept
def _row_grad_constants(
    gemm: configs.GemmConfig, dtype: torch.dtype, arch: str, dot: str, heads: int, ragged: bool
) -> dict[str, object]:
    return {
        **_narrow_constants(dtype, arch), "RAGGED": ragged, "PRECISION": dot, "BLOCK_M": gemm.block_m,
        "BLOCK_N": gemm.block_n, "BLOCK_L": gemm.block_k, "BLOCK_K": _block_k(heads),
        "num_warps": gemm.num_warps, "num_stages": gemm.num_stages,
    }  # fmt: skip


def _factors(weight: Tensor | None, dtype: torch.dtype, dot: str) -> Tensor | None:
    """A weight of the projections as the kernels multiply it."""
    return None if weight is None else rounded(weight.to(dtype).contiguous(), dot)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _dropout(seed: Tensor | None, p: float, gated: bool) -> tuple[Tensor | None, int | None, float | None]:
    """seed, threshold and scale of what is kept of the branches' product; all None where nothing is dropped."""
    threshold = round(p * 65536)
    if threshold == 0:
        return None, None, None
    scale = 0.0 if threshold == 65536 else 65536 / (65536 - threshold)
    return seed, threshold, scale**2 if gated else scale


def _slots(like: Tensor, bags: _Bags, config: configs.PoolConfig, heads: int, dim: int) -> tuple[Tensor, ...]:
    """maxima, sums and parts of every tile's bags."""
    slots = cdiv(bags.rows, config.block_m) + bags.count
    shapes = (slots, heads), (slots, heads), (slots, heads, dim)
    return tuple(torch.empty(shape, dtype=torch.float32, device=like.device) for shape in shapes)


def _combine(slots: tuple[Tensor, ...], bags: _Bags, config: configs.PoolConfig, dtype: torch.dtype) -> Tensor:
    """pooled [B, K, D] of the slots."""
    heads, dim = slots[2].shape[1:]
    pooled = torch.empty(bags.count, heads, dim, dtype=dtype, device=slots[2].device)
    if pooled.numel() > 0:
        block_s, block_d = 16, 64
        combine_kernel[(bags.count * heads * cdiv(dim, block_d),)](
            *slots, pooled, bags.cu_seqlens, bags.n, dim, heads,
            RAGGED=bags.ragged, BLOCK_M=config.block_m, BLOCK_S=block_s, BLOCK_D=block_d,
        )  # fmt: skip
    return pooled


def _forward(
    pool: bool,
    h: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
) -> tuple[Tensor | None, Tensor]:
    """pooled (None unless ``pool``) and scores."""
    bags = _Bags(h, mask, cu_seqlens)
    (hidden, dim), heads = v_weight.shape, w_weight.shape[0]
    dtype, device = torch.promote_types(h.dtype, v_weight.dtype), h.device
    shape = (heads, bags.rows) if bags.ragged else (bags.count, heads, bags.n)
    scores = torch.empty(shape, dtype=torch.float32, device=device)
    if scores.numel() == 0:
        return torch.zeros(bags.count, heads, dim, dtype=dtype, device=device) if pool else None, scores
    arch = configs.arch(device)
    config, precision = configs.pool_config(dim, dtype, arch), configs.precision(dtype, arch)
    seed, threshold, scale = _dropout(seed, dropout_p, u_weight is not None)
    slots = _slots(h, bags, config, heads, dim) if pool else (None, None, None)
    forward_kernel[(cdiv(bags.rows, config.block_m),)](
        h, _factors(v_weight, dtype, precision.dot), _contiguous(v_bias), _factors(u_weight, dtype, precision.dot),
        _contiguous(u_bias), w_weight.contiguous(), _contiguous(w_bias), mask, bags.cu_seqlens, seed, scores, *slots,
        bags.rows, bags.n, bags.count, dim, hidden, heads, *bags.strides, *bags.mask_strides, threshold, scale,
        POOLED=pool, W_BIAS=w_bias is not None, **_branch_constants(
            config, dtype, arch, precision.dot, heads, bags.ragged, bags.masked, u_weight is not None,
            v_bias is not None, u_bias is not None, activation, seed is not None,
        ),
    )  # fmt: skip
    return _combine(slots, bags, config, dtype) if pool else None, scores


def gated_attention_pool(h: Tensor, v_weight: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """pooled [B, K, D] in the dtype of products and scores [B, K, N] or [K, T] in float32."""
    return _forward(True, h, v_weight, *arguments)


def attention_scores(h: Tensor, v_weight: Tensor, *arguments) -> Tensor:
    """The scores of ``gated_attention_pool`` alone."""
    return _forward(False, h, v_weight, *arguments)[1]


def pool_by_scores(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """pooled [B, K, D] in value's dtype, for scores [B, K, N] or [K, T]."""
    bags = _Bags(value, mask, cu_seqlens)
    heads, dim = scores.shape[-2], value.shape[-1]
    if scores.numel() == 0:
        return value.new_zeros(bags.count, heads, dim)
    arch = configs.arch(value.device)
    config = configs.pool_config(dim, value.dtype, arch)
    slots = _slots(value, bags, config, heads, dim)
    scored_parts_kernel[(cdiv(bags.rows, config.block_m),)](
        value, scores.float().contiguous(), mask, bags.cu_seqlens, *slots,
        bags.rows, bags.n, bags.count, dim, heads, *bags.strides, *bags.mask_strides,
        EXACT=configs.exact(arch), **_tile_constants(config, heads, bags.ragged, bags.masked),
    )  # fmt: skip
    return _combine(slots, bags, config, value.dtype)


def _score_gradient(
    grad_pooled: Tensor | None, grad_scores: Tensor | None, h: Tensor, scores: Tensor, bags: _Bags,
    config: configs.PoolConfig, exact: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The gradient ds of scores, float32 in their layout, and the attention (None without grad_pooled)."""
    if grad_pooled is None:
        grad = grad_scores.float()
        return (grad.masked_fill(~bags.mask[:, None], 0) if bags.masked else grad).contiguous(), None
    heads, dim = grad_pooled.shape[1:]
    grad, attention = torch.empty_like(scores), torch.empty_like(scores)
    tiles = cdiv(bags.rows, config.block_m)
    maxima, sums, weighted = (scores.new_empty(tiles + bags.count, heads) for _ in range(3))
    constants = _tile_constants(config, heads, bags.ragged, bags.masked)
    pooled_grad_kernel[(tiles,)](
        h, grad_pooled, scores, bags.mask, bags.cu_seqlens, grad, maxima, sums, weighted,
        bags.rows, bags.n, bags.count, dim, heads, *bags.strides, *bags.mask_strides, EXACT=exact, **constants,
    )  # fmt: skip
    score_grad_kernel[(tiles,)](
        scores, grad_scores, bags.mask, bags.cu_seqlens, maxima, sums, weighted, attention, grad,
        bags.rows, bags.n, bags.count, heads, *bags.mask_strides, RAGGED=bags.ragged, MASKED=bags.masked,
        HAS_SCORES=grad_scores is not None, BLOCK_M=config.block_m, BLOCK_S=16, BLOCK_K=constants["BLOCK_K"],
    )  # fmt: skip
    return grad, attention


def pool_by_scores_backward(
    grad_pooled: Tensor, scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of (scores, value); one not needed is an empty tensor."""
    bags = _Bags(value, mask, cu_seqlens)
    heads, dim = scores.shape[-2], value.shape[-1]
    if scores.numel() == 0:
        return scores.new_zeros(scores.shape if needs[0] else 0), value.new_zeros(value.shape if needs[1] else 0)
    arch, dtype = configs.arch(value.device), value.dtype
    config, exact = configs.pool_config(dim, dtype, arch), configs.exact(arch)
    grad_pooled = grad_pooled.to(dtype).contiguous()
    ds, attention = _score_gradient(grad_pooled, None, value, scores.float().contiguous(), bags, config, exact)
    grad_value = value.new_empty(value.shape if needs[1] else 0)
    if grad_value.numel() > 0:
        gemm = configs.gemm_config("row_grad", dtype, arch)
        row_grad_kernel[(cdiv(bags.rows, gemm.block_m) * cdiv(dim, gemm.block_n),)](
            None, None, None, attention, grad_pooled, bags.cu_seqlens, grad_value,
            0, bags.rows, bags.rows, bags.n, bags.count, dim, 0, heads, BRANCHES=0, HAS_POOLED=True,
            **_row_grad_constants(gemm, dtype, arch, "ieee", heads, bags.ragged),
        )  # fmt: skip
    return ds.to(scores.dtype) if needs[0] else scores.new_empty(0), grad_value


def _complete(
    grads: list[Tensor | None], inputs: tuple[Tensor | None, ...], needs: list[bool]
) -> tuple[Tensor, ...]:
    """What is not needed as an empty tensor, what nothing was added to as zeros."""
    return tuple(
        (inputs[0] if x is None else x).new_zeros(x.shape if need else 0) if grad is None else grad
        for grad, x, need in zip(grads, inputs, needs)
    )


def gated_attention_pool_backward(
    grad_pooled: Tensor | None,
    grad_scores: Tensor | None,
    h: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor | None,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    activation: str,
    scores: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias); one not needed is an empty tensor."""
    inputs = (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    bags = _Bags(h, mask, cu_seqlens)
    (hidden, dim), heads = v_weight.shape, w_weight.shape[0]
    need_h, need_v, need_bv, need_u, need_bu, need_w, need_bw = needs
    grads: list[Tensor | None] = [None] * len(inputs)
    if scores.numel() == 0:
        return _complete(grads, inputs, needs)
    arch, dtype = configs.arch(h.device), torch.promote_types(h.dtype, v_weight.dtype)
    precision = configs.precision(dtype, arch)
    product_dtype = precision.product_dtype
    config = configs.pool_config(dim, product_dtype, arch)
    scores = scores.contiguous()
    grad_pooled = None if grad_pooled is None else grad_pooled.to(dtype).contiguous()
    ds, attention = _score_gradient(
        grad_pooled, _contiguous(grad_scores), h, scores, bags, config, configs.exact(arch)
    )
    if need_bw:
        grads[6] = ds.sum(dim=1 if bags.ragged else (0, 2)).to(w_bias.dtype)

    gated = u_weight is not None
    branches = 2 if gated else 1
    width = branches * hidden
    need_branches, need_bias = need_h or need_v or need_u, need_bv or need_bu
    if not (need_branches or need_bias or need_w) or hidden == 0 and not need_h:
        return _complete(grads, inputs, needs)
    grads[0] = torch.empty(h.shape, dtype=h.dtype, device=h.device) if need_h else None
    v_weight, u_weight = _factors(v_weight, dtype, precision.dot), _factors(u_weight, dtype, precision.dot)
    seed, threshold, scale = _dropout(seed, dropout_p, u_weight is not None)
    tiles = cdiv(bags.rows, config.block_m)
    part_bias = ds.new_empty((tiles, width) if need_bias else 0)
    part_heads = ds.new_empty((tiles, heads, hidden) if need_w else 0)
    # Weights are needed as rows of dP: t's come first, the gate's after them.
    first_unit, units = (0 if need_v else hidden), (need_v + need_u) * hidden
    held_tiles = min(tiles, configs.workspace_tiles(config.block_m, width, product_dtype))
    branch_grads = h.new_empty((held_tiles * config.block_m if need_branches else 0, width), dtype=product_dtype)
    gemm = configs.gemm_config("row_grad", dtype, arch)
    weight_plan = configs.weight_grad_plan(units, dim, held_tiles * config.block_m, dtype, arch)
    part_weight = ds.new_empty(weight_plan.splits, units, dim)
    for first in range(0, tiles, held_tiles):
        held = min(held_tiles, tiles - first)
        low, high = first * config.block_m, min((first + held) * config.block_m, bags.rows)
        if hidden > 0:
            branch_grad_kernel[(held * cdiv(hidden, config.block_l),)](
                h, v_weight, _contiguous(v_bias), u_weight, _contiguous(u_bias), w_weight.contiguous(), mask, seed, ds,
                branch_grads, part_bias, part_heads,
                first, bags.rows, bags.n, dim, hidden, heads, *bags.strides, *bags.mask_strides, threshold, scale,
                NEED_BRANCHES=need_branches, NEED_BIAS=need_bias, NEED_HEADS=need_w, **_branch_constants(
                    config, dtype, arch, precision.dot, heads, bags.ragged, bags.masked, gated, v_bias is not None,
                    u_bias is not None, activation, seed is not None,
                ),
            )  # fmt: skip
        if need_h and dim > 0:
            row_grad_kernel[(cdiv(high - low, gemm.block_m) * cdiv(dim, gemm.block_n),)](
                branch_grads, v_weight, u_weight, attention, grad_pooled, bags.cu_seqlens, grads[0],
                low, high, bags.rows, bags.n, bags.count, dim, hidden, heads,
                BRANCHES=branches, HAS_POOLED=grad_pooled is not None,
                **_row_grad_constants(gemm, dtype, arch, precision.dot, heads, bags.ragged),
            )  # fmt: skip
        if units * dim > 0:
            weight = weight_plan.config
            blocks = cdiv(units, weight.block_m) * cdiv(dim, weight.block_n)
            weight_grad_kernel[(blocks * weight_plan.splits,)](
                h, branch_grads, mask, part_weight, low, high, bags.n, dim, width, first_unit, units,
                weight_plan.splits, weight_plan.step, *bags.strides, *bags.mask_strides,
                RAGGED=bags.ragged, MASKED=bags.masked, ACCUMULATE=first > 0, PRECISION=precision.dot,
                BLOCK_M=weight.block_m, BLOCK_N=weight.block_n, BLOCK_R=weight.block_k,
                num_warps=weight.num_warps, num_stages=weight.num_stages,
            )  # fmt: skip
    for index, unit in ((1, 0), (3, hidden - first_unit)):
        if needs[index]:
            grads[index] = part_weight[:, unit : unit + hidden].sum(dim=0).to(inputs[index].dtype)
    for index, unit in ((2, 0), (4, hidden)):
        if needs[index]:
            grads[index] = part_bias[:, unit : unit + hidden].sum(dim=0).to(inputs[index].dtype)
    if need_w:
        grads[5] = part_heads.sum(dim=0).to(w_weight.dtype)
    return _complete(grads, inputs, needs)
