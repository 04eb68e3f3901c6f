"""Plain-torch definitions of the operators and their gradients: the specification, and the last fallback.

Inputs of lower precision are widened to float32 (float64 stays) and every sum is taken there. Work is cut into column
blocks of about ``_BLOCK_ELEMENTS`` affinities or activations, so N = 65,536 pixels need no N×N buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# 8 MB of float32: larger blocks leave the cache and are mapped anew on every use, 3x slower at N = 16,384.
_BLOCK_ELEMENTS = 1 << 21


def unavailable() -> None:
    """Plain torch is always there."""


def can_run(op: str, *args) -> None:
    """Plain torch runs every op on every device and floating dtype."""


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor has it, else float32: the dtype of sums, norms and of half-precision outputs."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _blocks(n: int, row_elements: int):
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
    """L·(1[T>0] ⊙ (PᵀQ + QᵀP)), T = FᵀF: what every derivative of A = relu(T) comes to. left L [B, R, N], p and q
    [B, C, N], feat F [B, D, N] -> [B, R, N], in the dtype of the sums.

    A tangent Ḟ changes V·A by (V; Ḟ, F); the gradient of F is (F; V, G), whose derivatives are such terms again.
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
ACTIVATIONS = ("tanh", "relu", "gelu")


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of random bits for a counter of four words and a key of two; all int64 holding 32 bits."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        # The product of two words wraps at 2^64, which is right, sign or not: its halves are taken as bits.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32 & _WORD) ^ b ^ k, second & _WORD, (first >> 32 & _WORD) ^ d ^ m, first & _WORD
        k, m = k + _KEY_STEPS[0] & _WORD, m + _KEY_STEPS[1] & _WORD
    return a, b, c, d


def dropout_threshold(dropout_p: float) -> int:
    """A unit is dropped where its 16 random bits are below this."""
    return round(dropout_p * 65536)


def dropout_factors(
    seed: Tensor, dropout_p: float, instances: Tensor, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What dropout multiplies V's and U's branch by, 0 or 1 / (1 - p): each [*instances.shape, hidden].

    Instance i and hidden unit l take word (l // 16) % 4 of the counter (i, i >> 32, (l // 64) · 16 + l % 16, 0) under
    the key ``seed``: V's branch its low 16 bits, U's its high ones. Nothing is read back from a device.
    """
    groups = -(-hidden // 64)
    i = instances.unsqueeze(-1)
    units = torch.arange(groups * 16, device=seed.device)
    words = philox((i & _WORD, i >> 32 & _WORD, units, torch.zeros_like(units)), (seed & _WORD, seed >> 32 & _WORD))
    words = torch.stack([word.unflatten(-1, (groups, 16)) for word in words], dim=-2)  # [*, groups, 4, 16]
    words = words.flatten(-3)[..., :hidden]
    threshold = dropout_threshold(dropout_p)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    v, u = ((bits >= threshold).to(dtype) * scale for bits in (words & 0xFFFF, words >> 16))
    return v, u


class _Branches:
    """drop(act(V h + b_V)) and drop(σ(U h + b_U)) of a dense batch's instances, and their derivatives."""

    def __init__(self, h, v_weight, v_bias, u_weight, u_bias, seed, dropout_p, activation):
        if dropout_p > 0 and seed is None:
            raise ValueError(f"dropout needs a seed; got dropout_p = {dropout_p} without one")
        self.acc = accumulate_dtype(h, v_weight)
        self.weights = _widen(self.acc, v_weight, v_bias, u_weight, u_bias)
        self.activation, self.seed, self.dropout_p = activation, seed, dropout_p
        self.batch, self.n, _ = h.shape
        self.hidden = v_weight.shape[0]

    def _factors(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        if self.seed is None:
            return None
        device = self.seed.device
        bags = self.n * torch.arange(self.batch, device=device)
        instances = bags[:, None] + torch.arange(rows.start, rows.stop, device=device)
        return dropout_factors(self.seed, self.dropout_p, instances, self.hidden, self.acc)

    def __call__(self, x: Tensor, rows: slice, derivatives: bool = False) -> tuple[Tensor | None, ...]:
        """t and s (None if ungated) of x [B, n, D], each [B, n, L]; with derivatives, theirs by V h and U h too."""
        v, bv, u, bu = self.weights
        factors = self._factors(rows)
        x_v = torch.nn.functional.linear(x, v, bv)
        t = {"tanh": torch.tanh, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[self.activation](x_v)
        s = None if u is None else torch.sigmoid(torch.nn.functional.linear(x, u, bu))
        dt = ds = None
        if derivatives:
            dt = _slope(self.activation, x_v, t)
            ds = None if s is None else s * (1 - s)
        if factors is None:
            return t, s, dt, ds
        v_factor, u_factor = factors
        return (
            t * v_factor,
            None if s is None else s * u_factor,
            None if dt is None else dt * v_factor,
            None if ds is None else ds * u_factor,
        )


def _slope(activation: str, x: Tensor, t: Tensor) -> Tensor:
    """act'(x) where t = act(x). As in torch, relu'(0) = 0 and NaN passes a gradient on."""
    if activation == "tanh":
        return 1 - t * t
    if activation == "relu":
        return torch.ones_like(x).masked_fill_(x <= 0, 0)
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _widen(acc: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(acc) for t in tensors]


def _real(h: Tensor, mask: Tensor | None) -> Tensor:
    """h with masked instances zeroed, so that whatever they hold cannot leak."""
    return h if mask is None else h.masked_fill(~mask.unsqueeze(-1), 0)


def _attention(scores: Tensor, mask: Tensor | None) -> Tensor:
    """softmax over instances; masked ones, and so whole masked bags, weigh exactly 0. scores [B, K, N]."""
    if mask is None:
        return torch.softmax(scores, dim=-1)
    masked = ~mask.unsqueeze(1)
    nothing = masked.all(-1, keepdim=True)  # all -inf would give NaN, and its gradient with it
    scores = scores.masked_fill(masked, float("-inf")).masked_fill(nothing, 0)
    return torch.softmax(scores, dim=-1).masked_fill(masked, 0)


def bag_slices(cu_seqlens: Tensor, total: int) -> list[slice]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {total} without falling; got {bounds}")
    return [slice(a, b) for a, b in pairwise(bounds)]


def attention_scores(
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
) -> Tensor:
    """[B, K, N] (ragged: [K, T]) in the accumulation dtype; -inf where masked."""
    if cu_seqlens is not None:
        bag_slices(cu_seqlens, h.shape[0])
        h = h.unsqueeze(0)
    branches = _Branches(h, v_weight, v_bias, u_weight, u_bias, seed, dropout_p, activation)
    w, bw = _widen(branches.acc, w_weight, w_bias)
    batch, n, dim = h.shape
    real = _real(h, mask)
    parts = [h.new_empty(batch, len(w), 0, dtype=branches.acc)]
    for rows in _blocks(n, batch * max(v_weight.shape[0], dim)):
        t, s, *_ = branches(real[:, rows].to(branches.acc), rows)
        parts.append(torch.nn.functional.linear(t if s is None else t * s, w, bw).mT)
    scores = torch.cat(parts, dim=-1)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return scores if cu_seqlens is None else scores[0]


def _pool(scores: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """softmax(scores) · value, [B, K, D] in the accumulation dtype. Like the scores', its steps are differentiable."""
    acc = accumulate_dtype(scores, value)
    if cu_seqlens is not None:
        bags = bag_slices(cu_seqlens, value.shape[0])
        parts = [_pool(scores[None, :, bag], value[None, bag], None, None) for bag in bags]
        return torch.cat(parts) if parts else value.new_zeros(0, scores.shape[0], value.shape[1], dtype=acc)
    attention = _attention(scores.to(acc), mask)
    real = _real(value, mask)
    batch, n, dim = value.shape
    pooled = torch.zeros(batch, scores.shape[1], dim, dtype=acc, device=value.device)
    for rows in _blocks(n, batch * dim):
        pooled = pooled + attention[..., rows] @ real[:, rows].to(acc)
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
    acc = accumulate_dtype(scores, value)
    grad_scores, grad_value = (
        torch.zeros(x.shape if need else 0, dtype=acc, device=x.device) for x, need in zip((scores, value), needs)
    )
    if cu_seqlens is not None:
        for i, bag in enumerate(bag_slices(cu_seqlens, value.shape[0])):
            of_bag = (grad_pooled[i : i + 1], scores[None, :, bag], value[None, bag], None, None, needs)
            parts = _pool_gradients(*of_bag)
            if needs[0]:
                grad_scores[:, bag] = parts[0][0]
            if needs[1]:
                grad_value[bag] = parts[1][0]
        return grad_scores, grad_value
    attention = _attention(scores.to(acc), mask)
    real = _real(value, mask)
    grad_pooled = grad_pooled.to(acc)  # [B, K, D]
    for rows in _blocks(value.shape[1], value.shape[0] * value.shape[2]):
        if needs[0]:
            grad_scores[..., rows] = attention[..., rows] * (grad_pooled @ real[:, rows].to(acc).mT)
        if needs[1]:
            grad_value[:, rows] = attention[..., rows].mT @ grad_pooled
    if needs[0]:
        # ĝ·z = Σ a (ĝ·v) from these very products: z itself may be rounded to half precision.
        grad_scores -= attention * grad_scores.sum(-1, keepdim=True)
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
    return _narrow(_pool_gradients(grad_pooled, scores, value, mask, cu_seqlens, needs), (scores, value))


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
    """pooled [B, K, D] in the dtype that h's and the weights' promote to, and ``attention_scores``."""
    weights = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    scores = attention_scores(h, *weights, mask, cu_seqlens, seed, dropout_p, activation)
    return _pool(scores, h, mask, cu_seqlens).to(torch.promote_types(h.dtype, v_weight.dtype)), scores


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
    """Gradients of (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias); one not needed is an empty tensor.

    With t = drop(act(x)), σ = drop(sigmoid(y)), x = V h + b_V, y = U h + b_U, and ds from ``pool_by_scores_backward``
    and grad_scores:  dw = ds (t ⊙ σ),  dx = (wᵀ ds) ⊙ σ ⊙ t',  dy = (wᵀ ds) ⊙ t ⊙ σ',  dV = dx h,  dU = dy h,
    dh = aᵀ ĝ + Vᵀ dx + Uᵀ dy.
    """
    inputs = (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    acc = accumulate_dtype(h, v_weight)
    grads = [
        torch.zeros(x.shape if need else 0, dtype=acc, device=h.device) if x is not None else h.new_empty(0)
        for x, need in zip(inputs, needs)
    ]
    ds = torch.zeros_like(scores)
    if grad_pooled is not None:
        ds, grad_h = _pool_gradients(grad_pooled, scores, h, mask, cu_seqlens, [True, needs[0]])
        if needs[0]:
            grads[0] = grad_h
    if grad_scores is not None:
        ds = ds + grad_scores.to(acc)
    if cu_seqlens is not None:  # one list of instances: bags no longer matter
        h, ds = h.unsqueeze(0), ds.unsqueeze(0)
    grad_h = grads[0].view(h.shape) if needs[0] else None
    if mask is not None:
        ds = ds.masked_fill(~mask.unsqueeze(1), 0)

    branches = _Branches(h, v_weight, v_bias, u_weight, u_bias, seed, dropout_p, activation)
    v, _, u, _ = branches.weights
    (w,) = _widen(acc, w_weight)
    real = _real(h, mask)
    for rows in _blocks(h.shape[1], h.shape[0] * max(v.shape[0], h.shape[2])):
        x = real[:, rows].to(acc)  # [B, n, D]
        t, s, t_slope, s_slope = branches(x, rows, derivatives=True)  # [B, n, L]
        ds_rows = ds[..., rows]  # [B, K, n]
        dg = ds_rows.mT @ w  # [B, n, L]
        branch_grads = [((dg if s is None else dg * s) * t_slope, v, 1)]
        if s is not None:
            branch_grads.append((dg * t * s_slope, u, 3))
        for d, weight, i in branch_grads:
            if needs[i]:
                grads[i] += torch.einsum("bnl,bnd->ld", d, x)
            if needs[i + 1]:
                grads[i + 1] += d.sum((0, 1))
            if needs[0]:
                grad_h[:, rows] += d @ weight
        if needs[5]:
            grads[5] += torch.einsum("bkn,bnl->kl", ds_rows, t if s is None else t * s)
        if needs[6]:
            grads[6] += ds_rows.sum((0, 2))
    if needs[0] and mask is not None:
        grad_h.masked_fill_(~mask.unsqueeze(-1), 0)
    return _narrow(grads, inputs)


def _narrow(grads: Sequence[Tensor], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(grads, inputs))


# Refinement over fixed neighbours, one image after the other: its weights are the largest tensor.


def near(dilations: Sequence[int], image: Tensor) -> tuple[int, ...]:
    """From the longer side of a map on, all that is beyond its border is the same edge: margins need not be wider."""
    return tuple(min(d, max(image.shape[2:])) for d in dilations)


def ring_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """(dy, dx) of the 8 neighbours at each distance."""
    return [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def shifted(x: Tensor, offsets: list[tuple[int, int]], mode: str) -> list[Tensor]:
    """Views of the padded ``x``, each [B, C, H, W]: at every pixel its neighbour at one offset."""
    reach, (h, w) = max(max(map(abs, offset)) for offset in offsets), x.shape[2:]
    padded = torch.nn.functional.pad(x, [reach] * 4, mode=mode)
    return [padded[:, :, reach + dy : reach + dy + h, reach + dx : reach + dx + w] for dy, dx in offsets]


def adaptive_weights(image: Tensor, dilations: Sequence[int], form: str) -> Tensor:
    """w of ``pixel_adaptive_refinement``, [B, P, H, W]."""
    neighbours = shifted(image, ring_offsets(near(dilations, image)), "replicate")
    own = 0 if form == "par" else len(dilations)  # how often pixel i counts
    count = len(neighbours) + own
    mean, spread = torch.zeros_like(image), torch.zeros_like(image)
    for neighbour in neighbours:  # about pixel i
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
    """What form "par" adds to the weight of each neighbour, [P], float64."""
    distance = torch.tensor(ring_offsets(dilations), dtype=torch.float64).norm(dim=1)
    return 0.01 * torch.softmax(-(distance / (0.3 * (distance.std() + 1e-8))).square(), 0)


def fold_margin(x: Tensor, margin: int) -> Tensor:
    """[B, C, H + 2 margin, W + 2 margin] -> [B, C, H, W]: the margin is added to the edge, in place."""
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
    """The adjoint: w_p(i) g(i) goes to i + o_p, where that lies beyond the border to the edge."""
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
    """(dy, dx) of the neighbours less than ``radius`` away to the right and below, row by row."""
    square = ((dy, dx) for dy in range(radius) for dx in range(1 - radius, radius) if dy or dx > 0)
    return [(dy, dx) for dy, dx in square if dy * dy + dx * dx < radius * radius]


def disc(radius: int) -> list[tuple[int, int]]:
    """All of them and the pixel itself, row by row."""
    below = half_disc(radius)
    return [(-dy, -dx) for dy, dx in reversed(below)] + [(0, 0)] + below


def _overlap(size: int, shift: int) -> tuple[slice, slice]:
    """Places i of a row with i + shift in it, and those i + shift."""
    first, last = max(0, -shift), max(0, size - max(0, shift))
    return slice(first, max(first, last)), slice(first + shift, max(first, last) + shift)


def transition(affinity: Tensor, radius: int, beta: float, adjoint: bool) -> Tensor:
    """T of ``random_walk`` as what every pixel takes of its ``disc``, [B, 2P + 1, H, W]; adjoint: Tᵀ."""
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


def random_walk(value: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    return _walk(value, affinity, radius, beta, steps, adjoint=False)


def random_walk_backward(grad_out: Tensor, affinity: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    return _walk(grad_out, affinity, radius, beta, steps, adjoint=True)


def _walk(map_: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, adjoint: bool) -> Tensor:
    acc = accumulate_dtype(map_, affinity)
    out = torch.empty_like(map_, memory_format=torch.contiguous_format)
    for to, m, pairs in zip(out.split(1), map_.split(1), affinity.split(1)):
        weights = transition(pairs.to(acc), radius, beta, adjoint)
        to.copy_(_propagate(m.to(acc), weights, disc(radius), steps, "constant"))
    return out
