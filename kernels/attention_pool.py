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
from ercn.kernels._tiles import accumulate, add_product, dot, dot_terms, factor, narrow, rounded, split


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
def branches(
    h, offsets, rows, unit, v_weight, v_bias, u_weight, u_bias, D, L, stride_d,
    GATED: tl.constexpr, V_BIAS: tl.constexpr, U_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """tanh(V h + b_V) and σ(U h + b_U) for a tile of rows and hidden units: two of [BLOCK_M, BLOCK_L].

    Units beyond L have tanh(0) = 0. Without a gate σ is 1.
    """
    v = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = factor(load_rows(h, offsets, rows, d, D, stride_d), h.dtype.element_ty, PRECISION)
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
    return tanh(v), (tl.sigmoid(u) if GATED else u + 1)


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
def forward_kernel(
    h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, cu_seqlens, scores, maxima, sums, parts,
    T, N, bags, D, L, K, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, V_BIAS: tl.constexpr, U_BIAS: tl.constexpr,
    W_BIAS: tl.constexpr, TERMS: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the scores of BLOCK_M rows, and of each bag among them the largest score, Σ e and Σ e·h.

    maxima, sums [slots, K], parts [slots, K, D], with e = exp(score - largest).
    """
    tile = tl.program_id(0)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    offsets = row_offsets(r, N, stride_b, stride_n, RAGGED)
    real = real_rows(mask, r, T, N, stride_mb, stride_mn, MASKED)

    s = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for l0 in range(0, L, BLOCK_L):
        unit = l0 + tl.arange(0, BLOCK_L)
        t, gate = branches(
            h, offsets, real, unit, v_weight, v_bias, u_weight, u_bias, D, L, stride_d,
            GATED, V_BIAS, U_BIAS, PRECISION, BLOCK_M, BLOCK_L, BLOCK_D,
        )  # fmt: skip
        w = tl.trans(load_heads(w_weight, k, K, unit, L))
        s = accumulate(s, split(t * gate, 2, FULL), split(w, TERMS, FULL), EXACT)
    if W_BIAS:
        s += tl.load(w_bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    s = tl.where(real[:, None], s, -float("inf"))
    tl.store(scores + score_offsets(r, k, T, N, K, RAGGED), s, mask=(r < T)[:, None] & (k < K)[None, :])

    end = tl.minimum((tile + 1) * BLOCK_M, T)
    bag = bag_of(cu_seqlens, tile * BLOCK_M, bags, N, RAGGED)
    start = bag_start(cu_seqlens, bag, N, RAGGED)
    while (start < end) & (bag < bags):
        after = bag_start(cu_seqlens, bag + 1, N, RAGGED)
        inside = real & (r >= start) & (r < after)
        largest, e = softmax_parts(s, inside)
        # Numerator and denominator meet the same rounded weights.
        e = narrow(e, h.dtype.element_ty)
        slot = (tile + bag).to(tl.int64)
        tl.store(maxima + slot * K + k, largest, mask=k < K)
        tl.store(sums + slot * K + k, tl.sum(e.to(tl.float32), axis=0), mask=k < K)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x = load_rows(h, offsets, inside, d, D, stride_d)
            z = dot(tl.trans(x), e, tl.zeros((BLOCK_D, BLOCK_K), tl.float32), EXACT)
            p_parts = parts + ((slot * K + k)[None, :] * D + d[:, None])
            tl.store(p_parts, z, mask=(d < D)[:, None] & (k < K)[None, :])
        bag += 1
        start = after


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
            x = load_rows(h, offsets, inside, d, D, stride_d)
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
    h, v_weight, v_bias, u_weight, u_bias, w_weight, mask, grad, grad_branches, part_bias, part_heads,
    first_tile, T, N, D, L, K, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, V_BIAS: tl.constexpr, U_BIAS: tl.constexpr,
    TERMS: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    NEED_BRANCHES: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows and a block of hidden units, from the gradient ds of scores.

    grad_branches dP [rows of this launch, (1 + GATED)·L]: dt = (wᵀds) ⊙ σ ⊙ (1 - t²), then dσ = (wᵀds) ⊙ t ⊙ σ(1 - σ).
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
    t, gate = branches(
        h, offsets, real, unit, v_weight, v_bias, u_weight, u_bias, D, L, stride_d,
        GATED, V_BIAS, U_BIAS, PRECISION, BLOCK_M, BLOCK_L, BLOCK_D,
    )  # fmt: skip
    within = (r < T)[:, None] & (k < K)[None, :]
    ds = tl.load(grad + score_offsets(r, k, T, N, K, RAGGED), mask=within, other=0.0)
    w = load_heads(w_weight, k, K, unit, L)
    ds_terms = split(ds, 2, FULL)
    dg = dot_terms(ds_terms, split(w, TERMS, FULL), tl.zeros((BLOCK_M, BLOCK_L), tl.float32), EXACT)
    dt = dg * gate * (1 - t * t)
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
        gated = split(tl.trans(t * gate), 2, FULL)  # [BLOCK_L, BLOCK_M]
        x = dot_terms(gated, ds_terms, tl.zeros((BLOCK_L, BLOCK_K), tl.float32), EXACT)
        p_heads = part_heads + ((tile.to(tl.int64) * K + k)[None, :] * L + unit[:, None])
        tl.store(p_heads, x, mask=(unit < L)[:, None] & (k < K)[None, :])


@triton.jit
def row_grad_kernel(
    grad_branches, v_weight, u_weight, attention, grad_pooled, cu_seqlens, grad_h,
    first_row, last_row, T, N, bags, D, L, K,
    RAGGED: tl.constexpr, GATED: tl.constexpr, HAS_POOLED: tl.constexpr, TERMS: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_h [rows, D] = dt V + dσ U + aᵀĝ for rows first_row ≤ r < last_row."""
    blocks = tl.cdiv(D, BLOCK_N)
    pid = tl.program_id(0)
    i_d, i_r = pid % blocks, pid // blocks
    row0 = first_row + i_r * BLOCK_M
    r = row0 + tl.arange(0, BLOCK_M)
    d = i_d * BLOCK_N + tl.arange(0, BLOCK_N)
    at_row = (r - first_row).to(tl.int64)[:, None] * ((2 if GATED else 1) * L)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for branch in tl.static_range(2 if GATED else 1):
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
    """Sizes, strides and compile-time facts of a batch of bags, dense [B, N, D] or ragged [T, D]."""

    def __init__(self, h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None):
        self.ragged, self.masked = cu_seqlens is not None, mask is not None
        self.count = cu_seqlens.shape[0] - 1 if self.ragged else h.shape[0]
        self.n = h.shape[-2]
        self.rows = self.n if self.ragged else self.count * self.n
        self.strides = (0, *h.stride()) if self.ragged else h.stride()
        self.mask_strides = mask.stride() if self.masked else (0, 0)
        self.cu_seqlens = cu_seqlens.contiguous() if self.ragged else None
        self.mask = mask
        self.constants = {"RAGGED": self.ragged, "MASKED": self.masked}


def _precisions(h: Tensor, arch: str) -> tuple[configs.Precision, dict[str, object]]:
    """Of the projections, and the compile-time arguments for the narrow products, which are float32-accurate."""
    precision = configs.precision(h.dtype, arch)
    full = h.dtype == torch.float32
    terms = 1 if h.dtype == torch.bfloat16 else 2
    return precision, {"TERMS": terms, "FULL": full, "EXACT": configs.exact(arch)}


def _tile_constants(config: configs.PoolConfig, heads: int) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m, "BLOCK_L": config.block_l, "BLOCK_D": config.block_d,
        "BLOCK_K": max(16, triton.next_power_of_2(heads)),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def gated_attention_pool(
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
) -> tuple[Tensor, Tensor]:
    """pooled [B, K, D] in h's dtype and scores [B, K, N] or [K, T] in float32."""
    bags = _Bags(h, mask, cu_seqlens)
    (hidden, dim), heads = v_weight.shape, w_weight.shape[0]
    pooled = torch.zeros(bags.count, heads, dim, dtype=h.dtype, device=h.device)
    shape = (heads, bags.rows) if bags.ragged else (bags.count, heads, bags.n)
    scores = torch.empty(shape, dtype=torch.float32, device=h.device)
    if scores.numel() == 0:
        return pooled, scores
    arch = configs.arch(h.device)
    config = configs.pool_config(dim, h.dtype, arch)
    precision, narrow_constants = _precisions(h, arch)
    weights = _contiguous(v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    weights[0], weights[2] = (None if x is None else rounded(x, precision.dot) for x in (weights[0], weights[2]))
    tiles = triton.cdiv(bags.rows, config.block_m)
    slots = tiles + bags.count
    maxima, sums = torch.empty(2, slots, heads, dtype=torch.float32, device=h.device)
    parts = torch.empty(slots, heads, dim, dtype=torch.float32, device=h.device)
    forward_kernel[(tiles,)](
        h, *weights, bags.mask, bags.cu_seqlens, scores, maxima, sums, parts,
        bags.rows, bags.n, bags.count, dim, hidden, heads, *bags.strides, *bags.mask_strides, **bags.constants,
        GATED=u_weight is not None, V_BIAS=v_bias is not None, U_BIAS=u_bias is not None, W_BIAS=w_bias is not None,
        PRECISION=precision.dot, **narrow_constants, **_tile_constants(config, heads),
    )  # fmt: skip
    if pooled.numel() > 0:
        block_s, block_d = 16, 64
        combine_kernel[(bags.count * heads * triton.cdiv(dim, block_d),)](
            maxima, sums, parts, pooled, bags.cu_seqlens, bags.n, dim, heads,
            RAGGED=bags.ragged, BLOCK_M=config.block_m, BLOCK_S=block_s, BLOCK_D=block_d,
        )  # fmt: skip
    return pooled, scores


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
    tiles = triton.cdiv(bags.rows, config.block_m)
    maxima, sums, weighted = scores.new_empty(3, tiles + bags.count, heads)
    constants = _tile_constants(config, heads)
    del constants["BLOCK_L"]
    pooled_grad_kernel[(tiles,)](
        h, grad_pooled, scores, bags.mask, bags.cu_seqlens, grad, maxima, sums, weighted,
        bags.rows, bags.n, bags.count, dim, heads, *bags.strides, *bags.mask_strides, **bags.constants,
        EXACT=exact, **constants,
    )  # fmt: skip
    score_grad_kernel[(tiles,)](
        scores, grad_scores, bags.mask, bags.cu_seqlens, maxima, sums, weighted, attention, grad,
        bags.rows, bags.n, bags.count, heads, *bags.mask_strides, **bags.constants,
        HAS_SCORES=grad_scores is not None, BLOCK_M=config.block_m, BLOCK_S=16, BLOCK_K=constants["BLOCK_K"],
    )  # fmt: skip
    return grad, attention


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
    grads = [h.new_zeros(x.shape if need else 0) for x, need in zip(inputs, needs)]
    bags = _Bags(h, mask, cu_seqlens)
    (hidden, dim), heads = v_weight.shape, w_weight.shape[0]
    if scores.numel() == 0:
        return tuple(grads)
    arch = configs.arch(h.device)
    precision, narrow_constants = _precisions(h, arch)
    product_dtype = precision.product_dtype
    config = configs.pool_config(dim, product_dtype, arch)
    v_weight, v_bias, u_weight, u_bias, w_weight = _contiguous(v_weight, v_bias, u_weight, u_bias, w_weight)
    v_weight, u_weight = (None if x is None else rounded(x, precision.dot) for x in (v_weight, u_weight))
    scores = scores.contiguous()
    grad_pooled = None if grad_pooled is None else grad_pooled.to(h.dtype).contiguous()
    grad_scores = None if grad_scores is None else grad_scores.contiguous()
    ds, attention = _score_gradient(grad_pooled, grad_scores, h, scores, bags, config, narrow_constants["EXACT"])
    if needs[6]:
        grads[6] = ds.sum(dim=1 if bags.ragged else (0, 2)).to(w_bias.dtype)

    need_h, need_v, need_bv, need_u, need_bu, need_w, _ = needs
    gated = u_weight is not None
    width = (2 if gated else 1) * hidden
    need_branches = need_h or need_v or need_u
    if not (need_branches or need_bv or need_bu or need_w) or hidden == 0 and not need_h:
        return tuple(grads)
    tiles = triton.cdiv(bags.rows, config.block_m)
    part_bias = ds.new_empty((tiles, width) if need_bv or need_bu else 0)
    part_heads = ds.new_empty((tiles, heads, hidden) if need_w else 0)
    # Weights are needed as rows of dP: t's come first, the gate's after them.
    first_unit, units = (0 if need_v else hidden), (need_v + need_u) * hidden
    held_tiles = min(tiles, configs.workspace_tiles(config.block_m, width, product_dtype))
    branch_grads = h.new_empty((held_tiles * config.block_m if need_branches else 0, width), dtype=product_dtype)
    gemm = configs.gemm_config("row_grad", h.dtype, arch)
    weight_plan = configs.weight_grad_plan(units, dim, held_tiles * config.block_m, h.dtype, arch)
    part_weight = ds.new_empty(weight_plan.splits, units, dim)
    for first in range(0, tiles, held_tiles):
        held = min(held_tiles, tiles - first)
        low, high = first * config.block_m, min((first + held) * config.block_m, bags.rows)
        if hidden > 0:
            branch_grad_kernel[(held * triton.cdiv(hidden, config.block_l),)](
                h, v_weight, v_bias, u_weight, u_bias, w_weight, bags.mask, ds, branch_grads, part_bias, part_heads,
                first, bags.rows, bags.n, dim, hidden, heads, *bags.strides, *bags.mask_strides, **bags.constants,
                GATED=gated, V_BIAS=v_bias is not None, U_BIAS=u_bias is not None, NEED_BRANCHES=need_branches,
                NEED_BIAS=need_bv or need_bu, NEED_HEADS=need_w, PRECISION=precision.dot, **narrow_constants,
                **_tile_constants(config, heads),
            )  # fmt: skip
        if need_h and dim > 0:
            row_grad_kernel[(triton.cdiv(high - low, gemm.block_m) * triton.cdiv(dim, gemm.block_n),)](
                branch_grads, v_weight, u_weight, attention, grad_pooled, bags.cu_seqlens, grads[0],
                low, high, bags.rows, bags.n, bags.count, dim, hidden, heads,
                RAGGED=bags.ragged, GATED=gated, HAS_POOLED=grad_pooled is not None, PRECISION=precision.dot,
                **narrow_constants, BLOCK_M=gemm.block_m, BLOCK_N=gemm.block_n, BLOCK_L=gemm.block_k,
                BLOCK_K=max(16, triton.next_power_of_2(heads)), num_warps=gemm.num_warps, num_stages=gemm.num_stages,
            )  # fmt: skip
        if units * dim > 0:
            weight = weight_plan.config
            blocks = triton.cdiv(units, weight.block_m) * triton.cdiv(dim, weight.block_n)
            weight_grad_kernel[(blocks * weight_plan.splits,)](
                h, branch_grads, bags.mask, part_weight, low, high, bags.n, dim, width, first_unit, units,
                weight_plan.splits, weight_plan.step, *bags.strides, *bags.mask_strides, **bags.constants,
                ACCUMULATE=first > 0, PRECISION=precision.dot, BLOCK_M=weight.block_m, BLOCK_N=weight.block_n,
                BLOCK_R=weight.block_k, num_warps=weight.num_warps, num_stages=weight.num_stages,
            )  # fmt: skip
    if units > 0:
        weight_grads = part_weight.sum(dim=0).to(h.dtype).split(hidden)
        for index, grad in zip([i for i in (1, 3) if needs[i]], weight_grads):
            grads[index] = grad.clone()
    if need_bv or need_bu:
        bias_grads = part_bias.sum(dim=0).to(h.dtype).split(hidden)
        for index, grad in zip((2, 4), bias_grads):
            if needs[index]:
                grads[index] = grad.clone()
    if need_w:
        grads[5] = part_heads.sum(dim=0).to(h.dtype)
    return tuple(grads)
