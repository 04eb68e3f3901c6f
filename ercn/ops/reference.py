"""Plain-torch definitions of the operators and their gradients: the specification, and the fallback of every device.

Inputs of lower precision are widened to float32 (float64 stays), in which all sums are taken. Work is cut into column
blocks of about ``_BLOCK_ELEMENTS`` affinities or activations, so that N = 65,536 pixels need no N×N buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad

from ercn.ops._arguments import DIFFERENTIABLE, PoolArguments

# 8 MB of float32. Larger blocks leave the cache and are mapped again at every use: 3x slower at N = 16,384.
_BLOCK_ELEMENTS = 1 << 21


def unavailable() -> None:
    """Plain torch is always available."""


def can_run(op: str, *args: Any) -> None:
    """Plain torch runs every op on every device and floating dtype."""


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: the dtype of sums, norms and of half-precision outputs."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _blocks(n: int, row_elements: int) -> Iterator[slice]:
    size = max(16, _BLOCK_ELEMENTS // max(row_elements, 1))
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def relu_affinity(value: Tensor, feat: Tensor) -> Tensor:
    """out = V·A with A = relu(FᵀF); value V [B, C, N], feat F [B, D, N] -> [B, C, N]."""
    acc = accumulate_dtype(value, feat)
    value, feat = value.to(acc), feat.to(acc)
    batch, _, n = feat.shape
    out = torch.empty(value.shape, dtype=acc, device=value.device)
    for cols in _blocks(n, batch * n):
        affinity = torch.relu_(feat.mT @ feat[..., cols])  # [B, N, cols]
        out[..., cols] = value @ affinity
    return out


def relu_affinity_backward(
    grad_out: Tensor, value: Tensor, feat: Tensor, need_value: bool
) -> tuple[Tensor, Tensor]:
    """grad_value = G·A (an empty tensor if not needed) and grad_feat = F·W, W = 1[T>0] ⊙ (VᵀG + GᵀV).

    As in torch's relu, T = NaN passes the gradient on.
    """
    acc = accumulate_dtype(value, feat)
    grad, v, f = grad_out.to(acc), value.to(acc), feat.to(acc)
    batch, _, n = f.shape
    grad_value = torch.empty(v.shape if need_value else 0, dtype=acc, device=v.device)
    grad_feat = torch.empty(f.shape, dtype=acc, device=f.device)
    for cols in _blocks(n, batch * n):
        t = f.mT @ f[..., cols]  # [B, N, cols]
        w = v.mT @ grad[..., cols] + grad.mT @ v[..., cols]
        grad_feat[..., cols] = f @ w.masked_fill_(t <= 0, 0)
        if need_value:
            grad_value[..., cols] = grad @ torch.relu_(t)
    return grad_value.to(value.dtype), grad_feat.to(feat.dtype)


def relu_affinity_derivative(left: Tensor, p: Tensor, q: Tensor, feat: Tensor) -> Tensor:
    """L·(1[T>0] ⊙ (PᵀQ + QᵀP)), T = FᵀF: the form of every derivative of A = relu(T). left L [B, R, N], p and q
    [B, C, N], feat F [B, D, N] -> [B, R, N], in the accumulation dtype.

    With (L; P, Q) for it, a tangent Ḟ changes V·A by (V; Ḟ, F), and the gradient of F is (F; V, G), whose derivatives
    have the same form.
    """
    acc = accumulate_dtype(left, p, q, feat)
    left, p, q, f = (x.to(acc) for x in (left, p, q, feat))
    batch, _, n = f.shape
    out = torch.empty(left.shape, dtype=acc, device=left.device)
    for cols in _blocks(n, batch * n):
        w = p.mT @ q[..., cols] + q.mT @ p[..., cols]  # [B, N, cols]
        out[..., cols] = left @ w.masked_fill_(f.mT @ f[..., cols] <= 0, 0)
    return out


# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": gelu}


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words of a counter of four words and a key of two; each word is 32 bits in an int64."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        # The product of two words may wrap to a negative int64; only the bits of its halves are used.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32 & _WORD) ^ b ^ k, second & _WORD, (first >> 32 & _WORD) ^ d ^ m, first & _WORD
        k, m = k + _KEY_STEPS[0] & _WORD, m + _KEY_STEPS[1] & _WORD
    return a, b, c, d


def dropout_threshold(dropout_p: float) -> int:
    """Units with 16 random bits below this are dropped."""
    return round(dropout_p * 65536)


def dropout_factors(
    seed: Tensor, dropout_p: float, instances: Tensor, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Factors of dropout for V's and U's branch, 0 or 1 / (1 - p): each [*instances.shape, hidden].

    Instance i and hidden unit l take word (l // 16) % 4 of the counter (i, i >> 32, (l // 64) · 16 + l % 16, 0) under
    the key ``seed``: V's branch its low 16 bits, U's its high 16. Nothing is read back from a device.
    """
    groups = -(-hidden // 64)
    i = instances.unsqueeze(-1)
    units = torch.arange(groups * 16, device=seed.device)
    counter = i & _WORD, i >> 32 & _WORD, units, torch.zeros_like(units)
    each = [word.unflatten(-1, (groups, 16)) for word in philox(counter, (seed & _WORD, seed >> 32 & _WORD))]
    words = torch.stack(each, dim=-2).flatten(-3)[..., :hidden]  # of [*, groups, 4, 16]
    threshold = dropout_threshold(dropout_p)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    v, u = ((bits >= threshold).to(dtype) * scale for bits in (words & 0xFFFF, words >> 16))
    return v, u


class Branches:
    """drop(act(V h + b_V)) and drop(σ(U h + b_U)) of the instances of dense bags, and their derivatives."""

    def __init__(self, p: PoolArguments) -> None:
        if p.dropout_p > 0 and p.seed is None:
            raise ValueError(f"dropout needs a seed; got dropout_p = {p.dropout_p} without one")
        self.acc = accumulate_dtype(p.h, p.v_weight)
        self.v, self.u = p.v_weight.to(self.acc), _widen(p.u_weight, self.acc)
        self.v_bias, self.u_bias = _widen(p.v_bias, self.acc), _widen(p.u_bias, self.acc)
        self.activation, self.seed, self.dropout_p = p.activation, p.seed, p.dropout_p
        self.batch, self.n, _ = p.h.shape

    def __call__(self, x: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """t and s (None without a gate) of the instances ``rows``, x [B, n, D] -> [B, n, L]."""
        _, t, s = self._activated(x)
        return _drop(self._factors(rows), t, s)

    def with_slopes(self, x: Tensor, rows: slice) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """t, s and their derivatives with respect to V h + b_V and U h + b_U."""
        x_v, t, s = self._activated(x)
        factors = self._factors(rows)
        slopes = _slope(self.activation, x_v, t), None if s is None else s * (1 - s)
        return *_drop(factors, t, s), *_drop(factors, *slopes)

    def _activated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_v = linear(x, self.v, self.v_bias)
        gate = None if self.u is None else torch.sigmoid(linear(x, self.u, self.u_bias))
        return x_v, ACTIVATIONS[self.activation](x_v), gate

    def _factors(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        if self.seed is None:
            return None
        device = self.seed.device
        bags = self.n * torch.arange(self.batch, device=device)
        instances = bags[:, None] + torch.arange(rows.start, rows.stop, device=device)
        return dropout_factors(self.seed, self.dropout_p, instances, self.v.shape[0], self.acc)


def _drop(factors: tuple[Tensor, Tensor] | None, v: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (v, u) if factors is None else (v * factors[0], None if u is None else u * factors[1])


def _slope(activation: str, x: Tensor, t: Tensor) -> Tensor:
    """act'(x), t = act(x). As in torch, relu'(0) = 0 and the gradient passes where x is NaN."""
    if activation == "tanh":
        return 1 - t * t
    if activation == "relu":
        return torch.ones_like(x).masked_fill_(x <= 0, 0)
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _widen(x: Tensor | None, acc: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(acc)


def zero_masked(h: Tensor, mask: Tensor | None) -> Tensor:
    """h [B, N, D] with 0 for masked instances, so that no value of theirs has an influence."""
    return h if mask is None else h.masked_fill(~mask.unsqueeze(-1), 0)


def attention(scores: Tensor, mask: Tensor | None) -> Tensor:
    """softmax of scores [B, K, N] over instances. Masked ones have weight exactly 0, also where all of a bag are."""
    if mask is None:
        return torch.softmax(scores, dim=-1)
    masked = ~mask.unsqueeze(1)
    empty = masked.all(-1, keepdim=True)  # the softmax of -inf alone, and its gradient, would be NaN
    scores = scores.masked_fill(masked, float("-inf")).masked_fill(empty, 0)
    return torch.softmax(scores, dim=-1).masked_fill(masked, 0)


def bag_slices(cu_seqlens: Tensor, total: int) -> list[slice]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {total} without falling; got {bounds}")
    return [slice(a, b) for a, b in pairwise(bounds)]


def attention_scores(*args: Any) -> Tensor:
    """[B, K, N] (ragged: [K, T]) in the accumulation dtype; -inf where masked. args: ``PoolArguments``."""
    p = PoolArguments(*args)
    if p.cu_seqlens is not None:
        bag_slices(p.cu_seqlens, p.h.shape[0])
        p = p._replace(h=p.h.unsqueeze(0))
    branches, acc = Branches(p), accumulate_dtype(p.h, p.v_weight)
    w, w_bias = p.w_weight.to(acc), _widen(p.w_bias, acc)
    batch, n, dim = p.h.shape
    h = zero_masked(p.h, p.mask)
    parts = [h.new_empty(batch, len(w), 0, dtype=acc)]
    for rows in _blocks(n, batch * max(p.v_weight.shape[0], dim)):
        t, s = branches(h[:, rows].to(acc), rows)
        parts.append(linear(t if s is None else t * s, w, w_bias).mT)
    scores = torch.cat(parts, dim=-1)
    if p.mask is not None:
        scores = scores.masked_fill(~p.mask.unsqueeze(1), float("-inf"))
    return scores if p.cu_seqlens is None else scores[0]


def _pool(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """softmax(scores) · value, [B, K, D] in the accumulation dtype. Autograd can differentiate it, as the scores."""
    acc = accumulate_dtype(scores, value)
    if cu_seqlens is not None:
        bags = bag_slices(cu_seqlens, value.shape[0])
        parts = [_pool(scores[None, :, bag], value[None, bag], None, None) for bag in bags]
        return torch.cat(parts) if parts else value.new_zeros(0, scores.shape[0], value.shape[1], dtype=acc)
    weights = attention(scores.to(acc), mask)
    value = zero_masked(value, mask)
    batch, n, dim = value.shape
    pooled = torch.zeros(batch, scores.shape[1], dim, dtype=acc, device=value.device)
    for rows in _blocks(n, batch * dim):
        pooled = pooled + weights[..., rows] @ value[:, rows].to(acc)
    return pooled


def _pool_gradients(
    grad_pooled: Tensor,
    scores: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """``pool_by_scores_backward`` in the accumulation dtype."""
    need_scores, need_value = needs
    acc = accumulate_dtype(scores, value)
    grad_scores, grad_value = (
        torch.zeros(x.shape if need else 0, dtype=acc, device=x.device) for x, need in zip((scores, value), needs)
    )
    if cu_seqlens is not None:
        for i, bag in enumerate(bag_slices(cu_seqlens, value.shape[0])):
            one = _pool_gradients(grad_pooled[i : i + 1], scores[None, :, bag], value[None, bag], None, None, needs)
            if need_scores:
                grad_scores[:, bag] = one[0][0]
            if need_value:
                grad_value[bag] = one[1][0]
        return grad_scores, grad_value
    weights = attention(scores.to(acc), mask)
    value = zero_masked(value, mask)
    grad_pooled = grad_pooled.to(acc)  # [B, K, D]
    for rows in _blocks(value.shape[1], value.shape[0] * value.shape[2]):
        if need_scores:
            grad_scores[..., rows] = weights[..., rows] * (grad_pooled @ value[:, rows].to(acc).mT)
        if need_value:
            grad_value[:, rows] = weights[..., rows].mT @ grad_pooled
    if need_scores:
        # ĝ·z = Σ a (ĝ·v) is summed from these products: z may be rounded to half precision.
        grad_scores -= weights * grad_scores.sum(-1, keepdim=True)
    return grad_scores, grad_value


def pool_by_scores(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """softmax(scores) · value: [B, K, D] in value's dtype."""
    return _pool(scores, value, mask, cu_seqlens).to(value.dtype)


def pool_by_scores_backward(
    grad_pooled: Tensor,
    scores: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of (scores, value); one not needed is an empty tensor.

    With a = softmax(s), the pooled gradient ĝ and v of an instance:  ds = a ⊙ (ĝ·v − Σ a (ĝ·v)),  dv = aᵀ ĝ.
    """
    grad_scores, grad_value = _pool_gradients(grad_pooled, scores, value, mask, cu_seqlens, needs)
    return grad_scores.to(scores.dtype), grad_value.to(value.dtype)


def gated_attention_pool(*args: Any) -> tuple[Tensor, Tensor]:
    """pooled [B, K, D] in the dtype that h and the weights promote to, and ``attention_scores``."""
    p, scores = PoolArguments(*args), attention_scores(*args)
    return _pool(scores, p.h, p.mask, p.cu_seqlens).to(torch.promote_types(p.h.dtype, p.v_weight.dtype)), scores


def gated_attention_pool_backward(
    grad_pooled: Tensor | None, grad_scores: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    """Gradients of (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias); one not needed is an empty tensor.

    args: ``PoolArguments``, the scores and which gradients are needed. With t = drop(act(x)), σ = drop(sigmoid(y)),
    x = V h + b_V, y = U h + b_U, and ds from ``pool_by_scores_backward`` and grad_scores:  dw = ds (t ⊙ σ),
    dx = (wᵀ ds) ⊙ σ ⊙ t',  dy = (wᵀ ds) ⊙ t ⊙ σ',  dV = dx h,  dU = dy h,  dh = aᵀ ĝ + Vᵀ dx + Uᵀ dy.
    """
    p, (scores, needs) = PoolArguments.split(args)
    acc = accumulate_dtype(p.h, p.v_weight)
    inputs: dict[str, Tensor | None] = {name: getattr(p, name) for name in DIFFERENTIABLE}
    needed = {name: need and inputs[name] is not None for name, need in zip(DIFFERENTIABLE, needs)}
    grads = {
        name: p.h.new_zeros(x.shape if needed[name] else 0, dtype=acc) if x is not None else p.h.new_empty(0)
        for name, x in inputs.items()
    }
    ds = torch.zeros_like(scores)
    if grad_pooled is not None:
        ds, grad_h = _pool_gradients(grad_pooled, scores, p.h, p.mask, p.cu_seqlens, [True, needed["h"]])
        if needed["h"]:
            grads["h"] = grad_h
    if grad_scores is not None:
        ds = ds + grad_scores.to(acc)
    if p.cu_seqlens is not None:  # from here on bags do not matter
        p, ds = p._replace(h=p.h.unsqueeze(0)), ds.unsqueeze(0)
    if p.mask is not None:
        ds = ds.masked_fill(~p.mask.unsqueeze(1), 0)
    grad_h = grads["h"].view(p.h.shape if needed["h"] else 0)

    branches, w = Branches(p), p.w_weight.to(acc)
    h = zero_masked(p.h, p.mask)
    for rows in _blocks(h.shape[1], h.shape[0] * max(w.shape[1], h.shape[2])):
        x = h[:, rows].to(acc)  # [B, n, D]
        t, s, t_slope, s_slope = branches.with_slopes(x, rows)  # [B, n, L]
        ds_rows = ds[..., rows]  # [B, K, n]
        dg = ds_rows.mT @ w  # [B, n, L]
        along = [("v", branches.v, (dg if s is None else dg * s) * t_slope)]
        if branches.u is not None and s_slope is not None:
            along.append(("u", branches.u, dg * t * s_slope))
        for name, weight, d in along:
            if needed[f"{name}_weight"]:
                grads[f"{name}_weight"] += torch.einsum("bnl,bnd->ld", d, x)
            if needed[f"{name}_bias"]:
                grads[f"{name}_bias"] += d.sum((0, 1))
            if needed["h"]:
                grad_h[:, rows] += d @ weight
        if needed["w_weight"]:
            grads["w_weight"] += torch.einsum("bkn,bnl->kl", ds_rows, t if s is None else t * s)
        if needed["w_bias"]:
            grads["w_bias"] += ds_rows.sum((0, 2))
    if needed["h"] and p.mask is not None:
        grad_h.masked_fill_(~p.mask.unsqueeze(-1), 0)
    return tuple(grad if x is None else grad.to(x.dtype) for grad, x in zip(grads.values(), inputs.values()))


# Refinement over fixed neighbours, one image after the other, since the weights are the largest tensor.


def near(dilations: Sequence[int], image: Tensor) -> tuple[int, ...]:
    """Dilations clamped to the longer side of the map: the edge repeats beyond the border, so that neighbours farther
    away are equal and a wider margin is not needed."""
    return tuple(min(d, max(image.shape[2:])) for d in dilations)


def ring_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """(dy, dx) of the 8 neighbours at each distance."""
    return [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def shifted(x: Tensor, offsets: list[tuple[int, int]], mode: str) -> list[Tensor]:
    """For each offset (dy, dx) the neighbour of every pixel there: views [B, C, H, W] of the padded ``x``."""
    reach, (h, w) = max(max(map(abs, offset)) for offset in offsets), x.shape[2:]
    padded = pad(x, [reach] * 4, mode=mode)
    return [padded[:, :, reach + dy : reach + dy + h, reach + dx : reach + dx + w] for dy, dx in offsets]


def adaptive_weights(image: Tensor, dilations: Sequence[int], form: str) -> Tensor:
    """w of ``pixel_adaptive_refinement``, [B, P, H, W]."""
    neighbours = shifted(image, ring_offsets(near(dilations, image)), "replicate")
    own = 0 if form == "par" else len(dilations)  # times that pixel i itself counts
    count = len(neighbours) + own
    mean, spread = torch.zeros_like(image), torch.zeros_like(image)
    for neighbour in neighbours:  # relative to pixel i
        mean += neighbour - image
    mean /= count
    for neighbour in neighbours:
        spread += (neighbour - image - mean).square_()
    deviation = ((spread + own * mean.square()) / (count - 1)).sqrt()
    if form == "par":
        scale = -1 / (image.shape[1] * (0.3 * (deviation + 1e-8)).square())
    else:
        scale = -1 / (image.shape[1] * (1e-8 + 0.1 * deviation))
    weights = image.new_empty(len(image), len(neighbours), *image.shape[2:])
    for j, neighbour in enumerate(neighbours):
        difference = neighbour - image
        weights[:, j] = ((difference.square_() if form == "par" else difference.abs_()) * scale).sum(1)
    weights -= weights.amax(1, keepdim=True)
    weights.exp_()
    weights /= weights.sum(1, keepdim=True)
    return weights.add_(position_weights(dilations).to(weights)[:, None, None]) if form == "par" else weights


def position_weights(dilations: Sequence[int]) -> Tensor:
    """The summand of the weights of form "par", [P], float64."""
    distance = torch.tensor(ring_offsets(dilations), dtype=torch.float64).norm(dim=1)
    return 0.01 * torch.softmax(-(distance / (0.3 * (distance.std() + 1e-8))).square(), 0)


def fold_margin(x: Tensor, margin: int) -> Tensor:
    """[B, C, H + 2·margin, W + 2·margin] -> [B, C, H, W]: add the margin to the edge, in place."""
    inner = slice(margin, -margin)
    for y in (x, x[:, :, inner].mT):
        y[:, :, margin] += y[:, :, :margin].sum(2)
        y[:, :, -1 - margin] += y[:, :, -margin:].sum(2)
    return x[:, :, inner, inner]


def _propagate(map_: Tensor, weights: Tensor, offsets: list[tuple[int, int]], steps: int, mode: str) -> Tensor:
    for _ in range(steps):
        neighbours = shifted(map_, offsets, mode)
        map_ = torch.zeros_like(map_)
        for weight, neighbour in zip(weights.split(1, 1), neighbours):
            map_.addcmul_(weight, neighbour)
    return map_


def pixel_adaptive_refinement(
    cam: Tensor, image: Tensor, dilations: Sequence[int], steps: int, form: str
) -> Tensor:
    """m_i <- Σ_p w_p(i) m(i + o_p), the edge repeated beyond the border, ``steps`` times."""
    acc = accumulate_dtype(cam, image)
    refined = torch.empty_like(cam, memory_format=torch.contiguous_format)
    for out, m, picture in zip(refined.split(1), cam.split(1), image.split(1)):
        weights = adaptive_weights(picture.to(acc), dilations, form)
        out.copy_(_propagate(m.to(acc), weights, ring_offsets(near(dilations, image)), steps, "replicate"))
    return refined


def pixel_adaptive_refinement_backward(
    grad_out: Tensor, image: Tensor, dilations: Sequence[int], steps: int, form: str
) -> Tensor:
    """The adjoint: w_p(i) g(i) is added at i + o_p, beyond the border at the nearest pixel of the edge."""
    acc = accumulate_dtype(grad_out, image)
    grad_cam = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    (h, w), reach = image.shape[2:], max(near(dilations, image))
    for out, g, picture in zip(grad_cam.split(1), grad_out.split(1), image.split(1)):
        weights = adaptive_weights(picture.to(acc), dilations, form).split(1, 1)
        g = g.to(acc)
        for _ in range(steps):
            wide = g.new_zeros(*g.shape[:2], h + 2 * reach, w + 2 * reach)
            for weight, (dy, dx) in zip(weights, ring_offsets(near(dilations, image))):
                wide[:, :, reach + dy : reach + dy + h, reach + dx : reach + dx + w].addcmul_(weight, g)
            g = fold_margin(wide, reach)
        out.copy_(g)
    return grad_cam


def half_disc(radius: int) -> list[tuple[int, int]]:
    """(dy, dx) of the neighbours to the right and below that are less than ``radius`` away, row by row."""
    square = ((dy, dx) for dy in range(radius) for dx in range(1 - radius, radius) if dy or dx > 0)
    return [(dy, dx) for dy, dx in square if dy * dy + dx * dx < radius * radius]


def disc(radius: int) -> list[tuple[int, int]]:
    """(dy, dx) of all neighbours less than ``radius`` away and of the pixel itself, row by row."""
    below = half_disc(radius)
    return [(-dy, -dx) for dy, dx in reversed(below)] + [(0, 0)] + below


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    """The indices i of a row for which i + shift lies in the row, and the indices i + shift."""
    first, last = max(0, -shift), max(0, size - max(0, shift))
    return slice(first, max(first, last)), slice(first + shift, max(first, last) + shift)


def transition(affinity: Tensor, radius: int, beta: float, adjoint: bool) -> Tensor:
    """T of ``random_walk`` (adjoint: Tᵀ): the weight of each neighbour in the ``disc``, [B, 2P + 1, H, W]."""
    batch, pairs, h, w = affinity.shape
    taken = affinity.new_zeros(batch, 2 * pairs + 1, h, w)
    taken[:, pairs] = 1
    for p, (dy, dx) in enumerate(half_disc(radius)):
        (rows, rows_below), (columns, columns_beside) = _overlap(h, dy), _overlap(w, dx)
        power = affinity[:, p, rows, columns] ** beta
        taken[:, pairs + 1 + p, rows, columns] = power
        taken[:, pairs - 1 - p, rows_below, columns_beside] = power
    degree = taken.sum(1)
    if not adjoint:
        return taken.div_(degree.unsqueeze(1))
    for p, (dy, dx) in enumerate(disc(radius)):
        (rows, there_rows), (columns, there_columns) = _overlap(h, dy), _overlap(w, dx)
        taken[:, p, rows, columns] /= degree[:, there_rows, there_columns]
    return taken


def random_walk(
    map_: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, adjoint: bool = False
) -> Tensor:
    """V · T^steps of a map V; adjoint: with Tᵀ."""
    acc = accumulate_dtype(map_, affinity)
    out = torch.empty_like(map_, memory_format=torch.contiguous_format)
    for to, m, pairs in zip(out.split(1), map_.split(1), affinity.split(1)):
        weights = transition(pairs.to(acc), radius, beta, adjoint)
        to.copy_(_propagate(m.to(acc), weights, disc(radius), steps, "constant"))
    return out


random_walk_backward = partial(random_walk, adjoint=True)
