"""Plain-torch definitions of the operators and their gradients: the specification, and the last fallback.

Inputs of lower precision are widened to float32 (float64 stays) and every sum is taken there. Work is cut into column
blocks of about ``_BLOCK_ELEMENTS`` affinities or activations, so N = 65,536 pixels need no N×N buffer.
"""

from __future__ import annotations

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


def _branches(h: Tensor, v_weight: Tensor, v_bias: Tensor | None, u_weight: Tensor | None, u_bias: Tensor | None):
    """tanh(V h + b_V) and σ(U h + b_U) (None if ungated): each [B, n, L]."""
    t = torch.tanh(torch.nn.functional.linear(h, v_weight, v_bias))
    s = None if u_weight is None else torch.sigmoid(torch.nn.functional.linear(h, u_weight, u_bias))
    return t, s


def _widen(acc: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(acc) for t in tensors]


def _real(h: Tensor, mask: Tensor | None) -> Tensor:
    """h with masked instances zeroed, so that whatever they hold cannot leak."""
    return h if mask is None else h.masked_fill(~mask.unsqueeze(-1), 0)


def _attention(scores: Tensor, mask: Tensor | None) -> Tensor:
    """softmax over instances; masked ones, and so whole masked bags, weigh exactly 0. scores [B, K, N]."""
    attention = torch.softmax(scores, dim=-1)
    return attention if mask is None else attention.masked_fill(~mask.unsqueeze(1), 0)


def bag_slices(cu_seqlens: Tensor, total: int) -> list[slice]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {total} without falling; got {bounds}")
    return [slice(a, b) for a, b in pairwise(bounds)]


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
) -> tuple[Tensor, Tensor]:
    """pooled [B, K, D] in h's dtype, scores [B, K, N] (ragged: [K, T]) in the accumulation dtype."""
    weights = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    if cu_seqlens is not None:
        bags = bag_slices(cu_seqlens, h.shape[0])
        parts = [gated_attention_pool(h[bag].unsqueeze(0), *weights, None, None) for bag in bags]
        pooled = [p for p, _ in parts]
        scores = [s[0] for _, s in parts]
        if not parts:  # no bag at all
            acc = accumulate_dtype(h)
            return h.new_zeros(0, len(w_weight), h.shape[1]), h.new_zeros(len(w_weight), 0, dtype=acc)
        return torch.cat(pooled), torch.cat(scores, dim=1)

    acc = accumulate_dtype(h)
    v, bv, u, bu, w, bw = _widen(acc, *weights)
    batch, n, dim = h.shape
    real = _real(h, mask)
    scores = torch.empty(batch, len(w), n, dtype=acc, device=h.device)
    for rows in _blocks(n, batch * max(v.shape[0], dim)):
        t, s = _branches(real[:, rows].to(acc), v, bv, u, bu)
        scores[..., rows] = torch.nn.functional.linear(t if s is None else t * s, w, bw).mT
    if mask is not None:
        scores.masked_fill_(~mask.unsqueeze(1), float("-inf"))
    attention = _attention(scores, mask)
    pooled = torch.zeros(batch, len(w), dim, dtype=acc, device=h.device)
    for rows in _blocks(n, batch * dim):
        pooled += attention[..., rows] @ real[:, rows].to(acc)
    return pooled.to(h.dtype), scores


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
    pooled: Tensor,
    scores: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias); one not needed is an empty tensor.

    With a = softmax(s), g = t ⊙ σ:  ds = a ⊙ (ĝ·h − ĝ·z) + grad_scores  for the pooled gradient ĝ and the pooled z,
    dw = ds g,  dt = (wᵀ ds) ⊙ σ ⊙ (1 − t²),  dσ = (wᵀ ds) ⊙ t ⊙ σ(1 − σ),  dV = dt h,  dU = dσ h,
    dh = aᵀ ĝ + Vᵀ dt + Uᵀ dσ.
    """
    inputs = (h, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    acc = accumulate_dtype(h)
    grads = [
        torch.zeros(x.shape if need else 0, dtype=acc, device=h.device) if x is not None else h.new_empty(0)
        for x, need in zip(inputs, needs)
    ]
    if cu_seqlens is not None:
        for i, bag in enumerate(bag_slices(cu_seqlens, h.shape[0])):
            parts = gated_attention_pool_backward(
                None if grad_pooled is None else grad_pooled[i : i + 1],
                None if grad_scores is None else grad_scores[None, :, bag],
                *(h[bag].unsqueeze(0).to(acc), *_widen(acc, *inputs[1:])),
                *(None, None, pooled[i : i + 1], scores[None, :, bag], needs),
            )
            if needs[0]:
                grads[0][bag] = parts[0][0]
            for total, part in zip(grads[1:], parts[1:]):
                total += part
        return _narrow(grads, inputs)

    v, bv, u, bu, w, _ = _widen(acc, *inputs[1:])
    attention = _attention(scores, mask)  # [B, K, N]
    ds = torch.zeros_like(scores)
    real = _real(h, mask)
    if grad_pooled is not None:
        grad_pooled = grad_pooled.to(acc)  # [B, K, D]
        for rows in _blocks(h.shape[1], h.shape[0] * h.shape[2]):
            ds[..., rows] = attention[..., rows] * (grad_pooled @ real[:, rows].to(acc).mT)
        # ĝ·z = Σ a (ĝ·h) from these very products: z itself may be rounded to half precision.
        ds -= attention * ds.sum(-1, keepdim=True)
    if grad_scores is not None:
        ds += grad_scores.to(acc)
    if mask is not None:
        ds.masked_fill_(~mask.unsqueeze(1), 0)

    for rows in _blocks(h.shape[1], h.shape[0] * max(v.shape[0], h.shape[2])):
        x = real[:, rows].to(acc)  # [B, n, D]
        t, s = _branches(x, v, bv, u, bu)  # [B, n, L]
        ds_rows = ds[..., rows]  # [B, K, n]
        dg = ds_rows.mT @ w  # [B, n, L]
        gated = t if s is None else t * s
        dt = dg * (1 - t * t) if s is None else dg * s * (1 - t * t)
        branch_grads = [(dt, v, 1)]
        if s is not None:
            branch_grads.append((dg * t * s * (1 - s), u, 3))
        for d, weight, i in branch_grads:
            if needs[i]:
                grads[i] += torch.einsum("bnl,bnd->ld", d, x)
            if needs[i + 1]:
                grads[i + 1] += d.sum((0, 1))
            if needs[0]:
                grads[0][:, rows] += d @ weight
        if needs[0] and grad_pooled is not None:
            grads[0][:, rows] += attention[..., rows].mT @ grad_pooled
        if needs[5]:
            grads[5] += torch.einsum("bkn,bnl->kl", ds_rows, gated)
        if needs[6]:
            grads[6] += ds_rows.sum((0, 2))
    if needs[0] and mask is not None:
        grads[0].masked_fill_(~mask.unsqueeze(-1), 0)
    return _narrow(grads, inputs)


def _narrow(grads: list[Tensor], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(g if x is None else g.to(x.dtype) for g, x in zip(grads, inputs))


# Refinement over fixed neighbours, one image after the other: its weights are the largest tensor.


def near(dilations: Sequence[int], image: Tensor) -> tuple[int, ...]:
    """From the longer side of a map on, all that is beyond its border is the same edge: margins need not be wider."""
    return tuple(min(d, max(image.shape[2:])) for d in dilations)


def ring_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """(dy, dx) of the 8 neighbours at each distance."""
    return [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def _neighbours(x: Tensor, offsets: list[tuple[int, int]], mode: str) -> list[Tensor]:
    """Views of the padded ``x``, each [B, C, H, W]: at every pixel its neighbour at one offset."""
    reach, (h, w) = max(max(map(abs, offset)) for offset in offsets), x.shape[2:]
    padded = torch.nn.functional.pad(x, [reach] * 4, mode=mode)
    return [padded[:, :, reach + dy : reach + dy + h, reach + dx : reach + dx + w] for dy, dx in offsets]


def adaptive_weights(image: Tensor, dilations: Sequence[int], form: str) -> Tensor:
    """w of ``pixel_adaptive_refinement``, [B, P, H, W]."""
    neighbours = _neighbours(image, ring_offsets(near(dilations, image)), "replicate")
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
        neighbours = _neighbours(map_, offsets, mode)
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
