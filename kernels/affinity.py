"""ReLU affinity on GPUs: out = V·relu(FᵀF), its gradients, and the launchers.

Value and gradient maps are first laid out pixel-major as bfloat16 terms (``split_kernel``), so that the main loops feed
tensor cores from memory without arithmetic. A program owns rows i of A and walks columns j in tiles: T_ij = F_iᵀF_j,
then out_i += A_ij V_jᵀ. The triangle visits j ≥ i only and also writes V_iᵀ A_ij for the columns, one partial sum per
group of rows. Partial sums are added in a fixed order; nothing is atomic. Tile sizes are in ``table.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ercn.kernels import configs
from ercn.kernels._tiles import accumulate, add_product, dot, dot_terms, factor, narrow, rounded, split, transpose
from ercn.kernels.configs import cdiv


class Size(NamedTuple):
    """Images, channels of value and as padded in its terms, features, pixels."""

    B: int
    C: int
    CP: int
    D: int
    N: int


class Slabs(NamedTuple):
    """Columns are cut in ``count`` slabs of ``width``; a launch of the forward owns ``groups`` groups of rows."""

    count: int
    width: int
    groups: int = 0
    first_group: int = 0


@triton.jit
def split_kernel(
    value, terms, stride, C, N,
    TERMS: tl.constexpr, CP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """value [B, C, N] -> terms [B, TERMS, N, CP], channels padded with zeros."""
    blocks_n, blocks_c = tl.cdiv(N, BLOCK_N), CP // BLOCK_C
    pid = tl.program_id(0)
    i_c, pid = pid % blocks_c, pid // blocks_c
    i_n, i_b = pid % blocks_n, (pid // blocks_n).to(tl.int64)
    n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p_value = value + i_b * stride[0] + n[:, None] * stride[2] + c[None, :].to(tl.int64) * stride[1]
    x = tl.load(p_value, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_C]
    parts = split(x, TERMS, FULL)
    for i in tl.static_range(TERMS):
        p_terms = terms + (((i_b * TERMS + i) * N + n[:, None]) * CP + c[None, :])
        tl.store(p_terms, parts[i], mask=(n < N)[:, None])


@triton.jit
def load_terms(terms, n, size, i_c, TERMS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows n of one image's terms [TERMS, N, CP], channel block i_c: a tuple of [len(n), BLOCK_C]."""
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p_terms = terms + (n.to(tl.int64)[:, None] * size.CP + c[None, :])
    mask = (n < size.N)[:, None]
    parts = (tl.load(p_terms, mask=mask, other=0.0),)
    if TERMS == 2:
        parts = parts + (tl.load(p_terms + tl.cast(size.N, tl.int64) * size.CP, mask=mask, other=0.0),)
    return parts


@triton.jit
def load_feat(feat, stride, n, d0, size, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """F[d0 : d0 + BLOCK_D, n] of one image: [BLOCK_D, len(n)], zero outside."""
    d = d0 + tl.arange(0, BLOCK_D)
    p_feat = feat + d.to(tl.int64)[:, None] * stride[1] + n.to(tl.int64)[None, :] * stride[2]
    mask = (n < size.N)[None, :]
    if not EVEN_D:
        mask = mask & (d < size.D)[:, None]
    return tl.load(p_feat, mask=mask, other=0.0)


@triton.jit
def load_chunks(feat, stride, n, first, size, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """CHUNKS consecutive feature blocks from channel ``first`` on, as a tuple."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        chunks = chunks + (load_feat(feat, stride, n, first + i * BLOCK_D, size, BLOCK_D, EVEN_D),)
    return chunks


@triton.jit
def products(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """T = F_iᵀF_j from chunks on chip: [BLOCK_M, BLOCK_N]."""
    t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(len(rows)):
        t = dot(tl.trans(rows[i]), columns[i], t, PRECISION)
    return t


@triton.jit
def streamed_products(
    feat, stride, n_i, n_j, size, config: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr
):
    """T = F_iᵀF_j where a row of D channels does not fit on chip."""
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_N: tl.constexpr = config.block_n
    BLOCK_D: tl.constexpr = config.block_d
    t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d0 in range(0, size.D, BLOCK_D):
        f_i = load_feat(feat, stride, n_i, d0, size, BLOCK_D, EVEN_D)
        f_j = load_feat(feat, stride, n_j, d0, size, BLOCK_D, EVEN_D)
        t = add_product(t, tl.trans(f_i), f_j, PRECISION)
    return t


@triton.jit
def relu(t):
    return tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def forward_kernel(
    feat, terms, direct, mirrored, stride, size, slabs, config: tl.constexpr, precision: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, TERMS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a group of rows against one slab of columns, for one block of channels.

    direct [slabs, B, C, rows of this launch]: the rows' sums over the slab. mirrored [groups, B, C, N], None for dense
    tiles: what the group's rows add to columns beyond the group.
    """
    TRIANGLE: tl.constexpr = mirrored is not None
    ROW_TILES: tl.constexpr = config.row_tiles
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_N: tl.constexpr = config.block_n
    BLOCK_D: tl.constexpr = config.block_d
    GROUP: tl.constexpr = ROW_TILES * BLOCK_M
    PRECISION: tl.constexpr = precision.dot
    C, N = size.C, size.N
    blocks_c = size.CP // BLOCK_C
    pid = tl.program_id(0)
    i_c, pid = pid % blocks_c, pid // blocks_c
    i_slab, pid = pid % slabs.count, pid // slabs.count
    i_group, i_b = pid % slabs.groups, (pid // slabs.groups).to(tl.int64)
    row0 = (slabs.first_group + i_group) * GROUP
    low, high = i_slab * slabs.width, tl.minimum((i_slab + 1) * slabs.width, N)
    inside = high  # columns from here on are also rows of other groups only
    if TRIANGLE:
        low = tl.maximum(low, row0)
        inside = tl.minimum(tl.maximum(row0 + GROUP, low), high)
    if low >= high:
        return
    feat += i_b * stride[0]
    terms += i_b * TERMS * N * size.CP

    f_rows = ()
    v_rows = ()
    acc = ()
    for r in tl.static_range(ROW_TILES):
        n_i = row0 + r * BLOCK_M + tl.arange(0, BLOCK_M)
        if config.resident:
            f_rows = f_rows + (load_chunks(feat, stride, n_i, 0, size, CHUNKS, BLOCK_D, EVEN_D),)
        if TRIANGLE:
            v_rows = v_rows + (load_terms(terms, n_i, size, i_c, TERMS, BLOCK_C),)
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_C), tl.float32),)

    for j in range(low, inside, BLOCK_N):
        n_j = j + tl.arange(0, BLOCK_N)
        v_j = load_terms(terms, n_j, size, i_c, TERMS, BLOCK_C)
        if config.resident:
            f_j = load_chunks(feat, stride, n_j, 0, size, CHUNKS, BLOCK_D, EVEN_D)
        sums = ()
        for r in tl.static_range(ROW_TILES):
            if config.resident:
                t = products(f_rows[r], f_j, BLOCK_M, BLOCK_N, PRECISION)
            else:
                n_i = row0 + r * BLOCK_M + tl.arange(0, BLOCK_M)
                t = streamed_products(feat, stride, n_i, n_j, size, config, EVEN_D, PRECISION)
            a = split(relu(t), precision.terms, precision.full)
            sums = sums + (accumulate(acc[r], a, v_j, PRECISION),)
        acc = sums

    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    if TRIANGLE:
        p_mirrored = mirrored + ((i_group.to(tl.int64) * size.B + i_b) * C + c)[None, :] * N
        for j in range(inside, high, BLOCK_N):
            n_j = j + tl.arange(0, BLOCK_N)
            v_j = load_terms(terms, n_j, size, i_c, TERMS, BLOCK_C)
            if config.resident:
                f_j = load_chunks(feat, stride, n_j, 0, size, CHUNKS, BLOCK_D, EVEN_D)
            sums = ()
            back = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for r in tl.static_range(ROW_TILES):
                if config.resident:
                    t = products(f_rows[r], f_j, BLOCK_M, BLOCK_N, PRECISION)
                else:
                    n_i = row0 + r * BLOCK_M + tl.arange(0, BLOCK_M)
                    t = streamed_products(feat, stride, n_i, n_j, size, config, EVEN_D, PRECISION)
                a = split(relu(t), precision.terms, precision.full)
                sums = sums + (accumulate(acc[r], a, v_j, PRECISION),)
                back = dot_terms(transpose(a), v_rows[r], back, PRECISION)
            acc = sums
            tl.store(p_mirrored + n_j[:, None], back, mask=(n_j < N)[:, None] & (c < C)[None, :])

    held = tl.minimum(N - slabs.first_group * GROUP, slabs.groups * GROUP)  # rows of this launch
    p_direct = direct + ((i_slab.to(tl.int64) * size.B + i_b) * C + c)[None, :] * held
    for r in tl.static_range(ROW_TILES):
        n_i = i_group * GROUP + r * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(p_direct + n_i[:, None], acc[r], mask=(n_i < held)[:, None] & (c < C)[None, :])


@triton.jit
def combine_kernel(
    direct, mirrored, out, size, slabs, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """out [B, C, N] (from the launch's first row on) = mirrored sums of the groups above, then direct sums by slab."""
    N = size.N
    row0 = slabs.first_group * GROUP
    blocks = tl.cdiv(N - row0, BLOCK_N)
    pid = tl.program_id(0)
    i_n, i_bc = pid % blocks, (pid // blocks).to(tl.int64)
    start = row0 + i_n * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    group = start // GROUP
    total = tl.zeros((BLOCK_N,), tl.float32)
    if ACCUMULATE:
        total = tl.load(out + i_bc * N + n, mask=n < N, other=0.0)
    stride = tl.cast(size.B, tl.int64) * size.C
    for g in range(tl.minimum(group - slabs.first_group, slabs.groups)):
        total += tl.load(mirrored + (g * stride + i_bc) * N + n, mask=n < N, other=0.0)
    if group < slabs.first_group + slabs.groups:
        held = tl.minimum(N - row0, slabs.groups * GROUP)
        for p in range(group * GROUP // slabs.width, slabs.count):
            total += tl.load(direct + (p * stride + i_bc) * held + n - row0, mask=n < N, other=0.0)
    tl.store(out + i_bc * N + n, total, mask=n < N)


@triton.jit
def backward_kernel(
    feat, value, grad, grad_value, grad_feat, stride, size, slabs, config: tl.constexpr, precision: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN_D: tl.constexpr, BLOCKS_C: tl.constexpr, V_TERMS: tl.constexpr, G_TERMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: block_m rows of grad_feat (CHUNKS·block_d of its channels) and grad_value over one slab of columns.

    value, grad: terms of V and G. W_ij = 1[T>0] ⊙ (V_iᵀG_j + G_iᵀV_j), grad_feat_i = Σ_j F_j W_ji with W symmetric,
    grad_value_i = Σ_j G_j A_ji, unless it is None. Outputs are [slabs, B, channels, N].
    """
    NEED_VALUE: tl.constexpr = grad_value is not None
    RESIDENT: tl.constexpr = config.chunks == 0
    BLOCK_M: tl.constexpr = config.block_m
    BLOCK_N: tl.constexpr = config.block_n
    BLOCK_D: tl.constexpr = config.block_d
    PRECISION: tl.constexpr = precision.dot
    C, D, N = size.C, size.D, size.N
    blocks_n = tl.cdiv(N, BLOCK_M)
    blocks_d = tl.cdiv(D, CHUNKS * BLOCK_D)
    pid = tl.program_id(0)
    i_d, pid = pid % blocks_d, pid // blocks_d
    i_slab, pid = pid % slabs.count, pid // slabs.count
    i_n, i_b = pid % blocks_n, (pid // blocks_n).to(tl.int64)
    low, high = i_slab * slabs.width, tl.minimum((i_slab + 1) * slabs.width, N)
    n_i = i_n * BLOCK_M + tl.arange(0, BLOCK_M)
    first_d = i_d * CHUNKS * BLOCK_D
    feat += i_b * stride[0]
    value += i_b * V_TERMS * N * size.CP
    grad += i_b * G_TERMS * N * size.CP

    if RESIDENT:
        f_i = load_chunks(feat, stride, n_i, 0, size, CHUNKS, BLOCK_D, EVEN_D)
    if BLOCKS_C == 1:
        v_i = load_terms(value, n_i, size, 0, V_TERMS, BLOCK_C)
        g_i = load_terms(grad, n_i, size, 0, G_TERMS, BLOCK_C)
    acc = ()
    for i in tl.static_range(CHUNKS):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)
    if NEED_VALUE:
        acc_value = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)

    for j in range(low, high, BLOCK_N):
        n_j = j + tl.arange(0, BLOCK_N)
        f_j = load_chunks(feat, stride, n_j, first_d, size, CHUNKS, BLOCK_D, EVEN_D)
        if RESIDENT:
            t = products(f_i, f_j, BLOCK_M, BLOCK_N, PRECISION)
        else:
            t = streamed_products(feat, stride, n_i, n_j, size, config, EVEN_D, PRECISION)
        w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(BLOCKS_C):
            v_j = load_terms(value, n_j, size, i, V_TERMS, BLOCK_C)
            g_j = load_terms(grad, n_j, size, i, G_TERMS, BLOCK_C)
            if BLOCKS_C > 1:
                v_i = load_terms(value, n_i, size, i, V_TERMS, BLOCK_C)
                g_i = load_terms(grad, n_i, size, i, G_TERMS, BLOCK_C)
            if NEED_VALUE:
                a = split(relu(t), precision.terms, precision.full)
                acc_value = accumulate(acc_value, a, g_j, PRECISION)
            w = dot_terms(v_i, transpose(g_j), w, PRECISION)
            w = dot_terms(g_i, transpose(v_j), w, PRECISION)
        w = tl.where(t <= 0, 0.0, w)  # T = NaN passes the gradient on, as in torch
        w = factor(w, feat.dtype.element_ty, PRECISION)
        sums = ()
        for i in tl.static_range(CHUNKS):
            sums = sums + (add_product(acc[i], w, tl.trans(f_j[i]), PRECISION),)
        acc = sums

    part = i_slab.to(tl.int64) * size.B + i_b
    for i in tl.static_range(CHUNKS):
        d = first_d + i * BLOCK_D + tl.arange(0, BLOCK_D)
        p_feat = grad_feat + ((part * D + d)[None, :] * N + n_i[:, None])
        x = narrow(acc[i], grad_feat.dtype.element_ty)
        tl.store(p_feat, x, mask=(n_i < N)[:, None] & (d < D)[None, :])
    if NEED_VALUE:
        c = tl.arange(0, BLOCK_C)
        p_value = grad_value + ((part * C + c)[None, :] * N + n_i[:, None])
        x = narrow(acc_value, grad_value.dtype.element_ty)
        tl.store(p_value, x, mask=(n_i < N)[:, None] & (c < C)[None, :])


def _terms(x: Tensor, precision: configs.Precision) -> Tensor:
    """x [B, C, N] as [B, terms, N, CP] in the layout of the kernels."""
    batch, channels, n = x.shape
    block_c, block_n = configs.channel_block(channels), 32
    padded = cdiv(channels, block_c) * block_c
    count = 1 if precision.full or x.dtype == torch.bfloat16 else 2
    terms = torch.empty(batch, count, n, padded, dtype=precision.terms_dtype, device=x.device)
    split_kernel[(batch * cdiv(n, block_n) * (padded // block_c),)](
        x, terms, x.stride(), channels, n,
        TERMS=count, CP=padded, BLOCK_N=block_n, BLOCK_C=block_c, FULL=precision.full,
    )  # fmt: skip
    return terms


def relu_affinity(value: Tensor, feat: Tensor, plan: configs.ForwardPlan | None = None) -> Tensor:
    """out = V·relu(FᵀF), float32; value V [B, C, N], feat F [B, D, N]."""
    (batch, channels, n), dim = value.shape, feat.shape[1]
    out = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    if out.numel() == 0 or dim == 0:
        return out.zero_()
    arch = configs.arch(feat.device)
    plan = plan or configs.forward_plan(batch, channels, dim, n, feat.dtype, arch)
    precision = configs.precision(feat.dtype, arch)
    feat = rounded(feat, precision.dot)
    terms = _terms(value, precision)
    config, block_c = plan.config, configs.channel_block(channels)
    size = Size(batch, channels, terms.shape[3], dim, n)
    groups = cdiv(n, config.group)

    def launch(direct: Tensor, mirrored: Tensor | None, slabs: Slabs) -> None:
        forward_kernel[(batch * slabs.groups * slabs.count * (size.CP // block_c),)](
            feat, terms, direct, mirrored, feat.stride(), size, slabs, config, precision, cdiv(dim, config.block_d),
            dim % config.block_d == 0, terms.shape[1], block_c,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    if plan.band == 0:
        direct = out if plan.slabs == 1 else out.new_empty(plan.slabs, *out.shape)
        launch(direct, None, Slabs(plan.slabs, plan.slab, groups))
        return out if plan.slabs == 1 else torch.sum(direct, dim=0, out=out)
    mirrored = out.new_empty(min(plan.band, groups), batch, channels, n)
    group = config.group
    block_n = min(256, triton.next_power_of_2(group) // 2 if group & (group - 1) else group)
    for first in range(0, groups, plan.band):
        slabs = Slabs(plan.slabs, plan.slab, min(plan.band, groups - first), first)
        left = n - first * group
        direct = out.new_empty(plan.slabs, batch, channels, min(left, slabs.groups * group))
        launch(direct, mirrored, slabs)
        combine_kernel[(batch * channels * cdiv(left, block_n),)](
            direct, mirrored, out, size, slabs, GROUP=group, BLOCK_N=block_n, ACCUMULATE=first > 0
        )
    return out


def relu_affinity_backward(
    grad_out: Tensor, value: Tensor, feat: Tensor, need_value: bool, plan: configs.BackwardPlan | None = None
) -> tuple[Tensor, Tensor]:
    """grad_value = G·A in value's dtype (empty if not needed) and grad_feat = F·W in feat's."""
    (batch, channels, n), dim = value.shape, feat.shape[1]
    grad_value = torch.empty(value.shape if need_value else 0, dtype=value.dtype, device=value.device)
    grad_feat = torch.empty(feat.shape, dtype=feat.dtype, device=feat.device)
    if batch * channels * n * dim == 0:
        return grad_value.zero_(), grad_feat.zero_()
    arch = configs.arch(feat.device)
    precision = configs.precision(feat.dtype, arch)
    plan = plan or configs.backward_plan(batch, dim, n, precision.product_dtype, arch)
    config, block_c = plan.config, configs.channel_block(channels)
    blocks_c, resident = cdiv(channels, block_c), config.chunks == 0
    fused = need_value and resident and blocks_c == 1
    if need_value and not fused:  # the op is its own adjoint
        grad_value.copy_(relu_affinity(grad_out, feat))
    factors = rounded(feat, precision.dot).to(precision.product_dtype)
    v, g = _terms(value, precision), _terms(grad_out, precision)
    parts = plan.slabs > 1
    part_feat = grad_feat.new_empty(plan.slabs, *feat.shape, dtype=torch.float32) if parts else grad_feat
    part_value = grad_value if fused else None
    if fused and parts:
        part_value = grad_value.new_empty(plan.slabs, *value.shape, dtype=torch.float32)
    chunks = cdiv(dim, config.block_d) if resident else config.chunks
    owned = chunks * config.block_d  # channels of grad_feat that a program sums
    backward_kernel[(batch * cdiv(n, config.block_m) * cdiv(dim, owned) * plan.slabs,)](
        factors, v, g, part_value, part_feat, factors.stride(), Size(batch, channels, v.shape[3], dim, n),
        Slabs(plan.slabs, plan.slab), config, precision, chunks, dim % owned == 0, blocks_c, v.shape[1], g.shape[1],
        block_c, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if parts:
        grad_feat = part_feat.sum(dim=0).to(feat.dtype)
        grad_value = part_value.sum(dim=0).to(value.dtype) if fused else grad_value
    return grad_value, grad_feat
