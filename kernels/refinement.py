"""Refinement over fixed neighbours on GPUs: weights of PAMR and PAR, a step, its adjoint, and a step of a random walk.

A program owns some pixels of one image and loops over their neighbours. Weights are [B, P, H, W] float32 in memory; the
map is never copied for a neighbour. No sum crosses programs, so results are bit-equal between runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ercn.ops.reference import fold_margin, near, position_weights, transition

BLOCK_N = 128
WEIGHT_BYTES = 256 << 20  # of weights in memory at a time


@triton.jit
def distance(j, DILATIONS: tl.constexpr):
    """DILATIONS[j]."""
    d = 0
    for k in tl.static_range(len(DILATIONS)):
        d = tl.where(j == k, DILATIONS[k], d)
    return d


@triton.jit
def clamped(y, x, H, W):
    """Offset of pixel (y, x) in a map; beyond the border, of the nearest pixel inside."""
    return tl.minimum(tl.maximum(y, 0), H - 1) * W + tl.minimum(tl.maximum(x, 0), W - 1)


@triton.jit
def scale_kernel(image, scale, K, H, W, DILATIONS: tl.constexpr, PAR: tl.constexpr, BLOCK: tl.constexpr):
    """image [B, K, H, W] -> scale [B, K, H, W], the factor of a channel's differences in the exponent."""
    N = H * W
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    n, i_bk = pid % blocks * BLOCK + tl.arange(0, BLOCK), (pid // blocks).to(tl.int64)
    y, x = n // W, n % W
    p_image = image + i_bk * N
    own = tl.load(p_image + n, mask=n < N, other=0.0).to(tl.float32)
    samples: tl.constexpr = (8 if PAR else 9) * len(DILATIONS)  # PAMR counts pixel i too
    mean = tl.zeros((BLOCK,), tl.float32)  # of differences to pixel i
    for j in range(len(DILATIONS)):
        d = distance(j, DILATIONS)
        for q in tl.static_range(9):
            if q != 4:
                place = clamped(y + (q // 3 - 1) * d, x + (q % 3 - 1) * d, H, W)
                mean += tl.load(p_image + place, mask=n < N, other=0.0).to(tl.float32) - own
    mean /= samples
    spread = (samples - 8 * len(DILATIONS)) * mean * mean
    for j in range(len(DILATIONS)):
        d = distance(j, DILATIONS)
        for q in tl.static_range(9):
            if q != 4:
                place = clamped(y + (q // 3 - 1) * d, x + (q % 3 - 1) * d, H, W)
                difference = tl.load(p_image + place, mask=n < N, other=0.0).to(tl.float32) - own - mean
                spread += difference * difference
    sigma = tl.sqrt(spread / (samples - 1))
    if PAR:
        width = 0.3 * (sigma + 1e-8)
        width *= width
    else:
        width = 0.1 * sigma + 1e-8
    tl.store(scale + i_bk * N + n, -1 / (K * width), mask=n < N)


@triton.jit
def weight_kernel(
    image, scale, position, weights, K, H, W, DILATIONS: tl.constexpr, PAR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """weights [B, P, H, W]: first the exponents, then their softmax over P, and position [P] with PAR."""
    N = H * W
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    n, i_b = pid % blocks * BLOCK + tl.arange(0, BLOCK), (pid // blocks).to(tl.int64)
    y, x = n // W, n % W
    image += i_b * K * N
    scale += i_b * K * N + n
    weights += i_b * (8 * len(DILATIONS)) * N + n
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(len(DILATIONS)):
        d = distance(j, DILATIONS)
        for q in tl.static_range(9):
            if q != 4:
                place = clamped(y + (q // 3 - 1) * d, x + (q % 3 - 1) * d, H, W)
                exponent = tl.zeros((BLOCK,), tl.float32)
                for c in range(K):
                    p_image = image + tl.cast(c, tl.int64) * N
                    other = tl.load(p_image + place, mask=n < N, other=0.0).to(tl.float32)
                    difference = other - tl.load(p_image + n, mask=n < N, other=0.0).to(tl.float32)
                    difference = difference * difference if PAR else tl.abs(difference)
                    exponent += difference * tl.load(scale + tl.cast(c, tl.int64) * N, mask=n < N, other=0.0)
                tl.store(weights + tl.cast(8 * j + q - q // 5, tl.int64) * N, exponent, mask=n < N)
                higher = tl.maximum(most, exponent, propagate_nan=tl.PropagateNan.ALL)
                total = total * tl.exp(most - higher) + tl.exp(exponent - higher)
                most = higher
    for p in range(8 * len(DILATIONS)):
        p_weight = weights + tl.cast(p, tl.int64) * N
        w = tl.exp(tl.load(p_weight, mask=n < N, other=0.0) - most) / total
        if PAR:
            w += tl.load(position + p)
        tl.store(p_weight, w, mask=n < N)


@triton.jit
def step_kernel(
    map, weights, out, C, H, W, margin, stride_b, stride_c, stride_y,
    DILATIONS: tl.constexpr, ADJOINT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_p w_p(i) map(i + o_p), the edge repeated.

    ADJOINT: out_i = Σ_p w_p(i - o_p) map(i - o_p) for i in the image and ``margin`` pixels around it.
    """
    wide = W + 2 * margin
    places = (H + 2 * margin) * wide
    blocks, blocks_c = tl.cdiv(places, BLOCK), tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    n, pid = pid % blocks * BLOCK + tl.arange(0, BLOCK), pid // blocks
    c, i_b = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C), (pid // blocks_c).to(tl.int64)
    y, x = n // wide - margin, n % wide - margin
    p_map = map + i_b * stride_b + c.to(tl.int64)[:, None] * stride_c
    weights += i_b * (8 * len(DILATIONS)) * H * W
    acc = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for j in range(len(DILATIONS)):
        d = distance(j, DILATIONS)
        for q in tl.static_range(9):
            if q != 4:
                dy, dx = (q // 3 - 1) * d, (q % 3 - 1) * d
                if ADJOINT:
                    yy, xx = y - dy, x - dx
                    there = (n < places) & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
                    own = yy * W + xx
                else:
                    yy = tl.minimum(tl.maximum(y + dy, 0), H - 1)
                    xx = tl.minimum(tl.maximum(x + dx, 0), W - 1)
                    there = n < places
                    own = n
                w = tl.load(weights + tl.cast(8 * j + q - q // 5, tl.int64) * H * W + own, mask=there, other=0.0)
                m = tl.load(p_map + (yy * stride_y + xx)[None, :], mask=there[None, :] & (c < C)[:, None], other=0.0)
                acc += w[None, :] * m.to(tl.float32)
    p_out = out + (i_b * C + c[:, None]) * places + n[None, :]
    tl.store(p_out, acc, mask=(n < places)[None, :] & (c < C)[:, None])


@triton.jit
def walk_kernel(
    map, weights, out, C, H, W, stride_b, RADIUS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_p w_p(i) map(i + o_p) over the disc in row order, within the border. weights [B, SLOTS, N]."""
    N = H * W
    blocks, blocks_c = tl.cdiv(N, BLOCK), tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    n, pid = pid % blocks * BLOCK + tl.arange(0, BLOCK), pid // blocks
    c, i_b = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C), (pid // blocks_c).to(tl.int64)
    y, x = n // W, n % W
    p_map = map + i_b * stride_b + c.to(tl.int64)[:, None] * N
    weights += i_b * SLOTS * N + n
    acc = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    slot = 0
    for i in range(2 * RADIUS - 1):
        for k in range(2 * RADIUS - 1):
            dy, dx = i - (RADIUS - 1), k - (RADIUS - 1)
            if dy * dy + dx * dx < RADIUS * RADIUS:
                there = (n < N) & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
                w = tl.load(weights + tl.cast(slot, tl.int64) * N, mask=there, other=0.0)
                m = tl.load(p_map + (n + dy * W + dx)[None, :], mask=there[None, :] & (c < C)[:, None], other=0.0)
                acc += w[None, :] * m.to(tl.float32)
                slot += 1
    p_out = out + (i_b * C + c[:, None]) * N + n[None, :]
    tl.store(p_out, acc, mask=(n < N)[None, :] & (c < C)[:, None])


def _weights(image: Tensor, dilations: Sequence[int], par: bool) -> Tensor:
    """[B, P, H, W] float32."""
    batch, channels, height, width = image.shape
    image = image.contiguous()
    scale = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    weights = scale.new_empty(batch, 8 * len(dilations), height, width)
    position = position_weights(dilations).to(scale) if par else scale
    blocks = triton.cdiv(height * width, BLOCK_N)
    constants = {"DILATIONS": near(dilations, image), "PAR": par, "BLOCK": BLOCK_N}
    scale_kernel[(batch * channels * blocks,)](image, scale, channels, height, width, **constants)
    weight_kernel[(batch * blocks,)](image, scale, position, weights, channels, height, width, **constants)
    return weights


def _step(map_: Tensor, weights: Tensor, out: Tensor, margin: int, dilations: tuple[int, ...], adjoint: bool) -> None:
    batch, channels, height, width = map_.shape
    block_c = min(8, triton.next_power_of_2(channels))
    blocks = triton.cdiv(out.shape[2] * out.shape[3], BLOCK_N) * triton.cdiv(channels, block_c)
    step_kernel[(batch * blocks,)](
        map_, weights, out, channels, height, width, margin, *map_.stride()[:3],
        DILATIONS=dilations, ADJOINT=adjoint, BLOCK=BLOCK_N, BLOCK_C=block_c,
    )  # fmt: skip


def _images_at_a_time(image: Tensor, slots: int) -> int:
    return max(1, WEIGHT_BYTES // (4 * slots * image.shape[2] * image.shape[3]))


def pixel_adaptive_refinement(cam: Tensor, image: Tensor, dilations: Sequence[int], steps: int, form: str) -> Tensor:
    """Like cam; see ``ercn.ops.pixel_adaptive_refinement``."""
    out = torch.empty_like(cam, memory_format=torch.contiguous_format)
    if steps == 0:
        return out.copy_(cam)
    size = _images_at_a_time(image, 8 * len(dilations))
    for m, picture, last in zip(cam.contiguous().split(size), image.split(size), out.split(size)):
        weights = _weights(picture, dilations, form == "par")
        for step in range(steps):
            to = last if step == steps - 1 else torch.empty(m.shape, dtype=torch.float32, device=m.device)
            _step(m, weights, to, 0, near(dilations, image), False)
            m = to
    return out


def pixel_adaptive_refinement_backward(
    grad_out: Tensor, image: Tensor, dilations: Sequence[int], steps: int, form: str
) -> Tensor:
    """Like grad_out. A margin takes the gradients of neighbours beyond the border, and is then folded into the edge."""
    margin = max(near(dilations, image))
    grad_cam = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    size = _images_at_a_time(image, 8 * len(dilations))
    for g, picture, last in zip(grad_out.contiguous().split(size), image.split(size), grad_cam.split(size)):
        weights = _weights(picture, dilations, form == "par")
        for _ in range(steps):
            (batch, channels, height, width), around = g.shape, 2 * margin
            wide = torch.empty(
                batch, channels, height + around, width + around, dtype=torch.float32, device=g.device
            )
            _step(g, weights, wide, margin, near(dilations, image), True)
            g = fold_margin(wide, margin)
        last.copy_(g)
    return grad_cam


def random_walk(value: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """Like value; see ``ercn.ops.random_walk``."""
    return _walk(value, affinity, radius, beta, steps, adjoint=False)


def random_walk_backward(grad_out: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """Like grad_out: the walk along Tᵀ."""
    return _walk(grad_out, affinity, radius, beta, steps, adjoint=True)


def _walk(map_: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, adjoint: bool) -> Tensor:
    out = torch.empty_like(map_, memory_format=torch.contiguous_format)
    if steps == 0:
        return out.copy_(map_)
    batch, channels, height, width = map_.shape
    weights = transition(affinity.float(), radius, beta, adjoint)
    m = map_.contiguous()
    block_c = min(8, triton.next_power_of_2(channels))
    blocks = triton.cdiv(height * width, BLOCK_N) * triton.cdiv(channels, block_c)
    for step in range(steps):
        to = out if step == steps - 1 else torch.empty(m.shape, dtype=torch.float32, device=m.device)
        walk_kernel[(batch * blocks,)](
            m, weights, to, channels, height, width, m.stride(0),
            RADIUS=radius, SLOTS=weights.shape[1], BLOCK=BLOCK_N, BLOCK_C=block_c,
        )  # fmt: skip
        m = to
    return out
