"""Inputs whose results every kernel must give bit for bit: all sums are of small integers, exact in any order.

Affinity: F, V, G in {-1, 0, 1}. T and A are integers of at most 256, which bfloat16 holds, W is at most 2C, and every
sum stays below 2^24, which float32 holds.

Pool: V h + b_V and U h + b_U are multiples of 128, so tanh is -1, 0 or 1 and σ is 0, 1/2 or 1. The attention of a bag
and head is one instance, whose score leads by 128 or more (e^-128 is 0 in float32), or it is uniform over a power of
two of instances. For float64, which knows e^-128, it is 1024 instead.

The scores alone, without a softmax: any activation and a dropout of one half, whose factor is a power of two. Their
softmax, taken for itself: uniform over a power of two of instances, the others 1024 below.

Other values are multiples of one power of two; results in half precision are rounded once, from float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ercn.ops._arguments import DIFFERENTIABLE

BLOCK_ELEMENTS = 1 << 26  # of T, in a block of the affinity's expected results: 256 MB


def _signs(generator: torch.Generator, *shape: int, density: float = 2 / 3) -> Tensor:
    """-1 and 1, each with a probability of density / 2, and 0."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return (uniform < density / 2).float() - (uniform >= 1 - density / 2).float()


def affinity(
    batch: int,
    channels: int,
    dim: int,
    pixels: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    seed: int = 0,
    value_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """value [B, C, N] in value_dtype, feat [B, D, N] in dtype, grad_out [B, C, N] in the dtype of the op's output."""
    generator = torch.Generator(device).manual_seed(seed)
    feat = _signs(generator, batch, dim, pixels, density=128 / max(dim, 192))
    value, grad_out = (_signs(generator, batch, channels, pixels) for _ in range(2))
    if channels > 128 or dim > 256 and feat.abs().sum(1).max() > 256:
        raise ValueError("bfloat16 does not hold every integer above 256, which T or W would have")
    wide = torch.float64 if torch.float64 in (dtype, value_dtype) else torch.float32
    return value.to(value_dtype), feat.to(dtype), grad_out.to(wide)


@torch.no_grad()
def expected_affinity(
    value: Tensor, feat: Tensor, grad_out: Tensor | None = None
) -> dict[str, Tensor]:
    """out, and for a grad_out grad_value and grad_feat, of relu_affinity.

    Exact at every precision of float32 products: the factors of T have 2 bits, those of V·A, G·A and F·W 9.
    """
    v, f = value.float(), feat.float()
    g = None if grad_out is None else grad_out.float()
    maps = v if g is None else torch.cat([v, g], dim=1)
    products, grad_feat = torch.empty_like(maps), torch.empty_like(f)
    for image in range(len(f)):
        for columns in torch.arange(f.shape[2], device=f.device).split(max(1, BLOCK_ELEMENTS // max(1, f.shape[2]))):
            t = f[image].mT @ f[image][:, columns]  # [N, columns]
            if g is not None:
                w = v[image].mT @ g[image][:, columns] + g[image].mT @ v[image][:, columns]
                grad_feat[image][:, columns] = f[image] @ w.mul_(t > 0)
            products[image][:, columns] = maps[image] @ t.relu_()
    channels = value.shape[1]
    out_dtype = torch.float64 if torch.float64 in (value.dtype, feat.dtype) else torch.float32
    results = {"out": products[:, :channels].to(out_dtype)}
    if g is not None:
        results |= {"grad_value": products[:, channels:].to(value.dtype), "grad_feat": grad_feat.to(feat.dtype)}
    return results


def found_affinity(op: Callable, value: Tensor, feat: Tensor, grad_out: Tensor | None = None) -> dict[str, Tensor]:
    """Results of ``op(value, feat)`` under the names of ``expected_affinity``."""
    leaves = [x.detach().requires_grad_(grad_out is not None) for x in (value, feat)]
    out = op(*leaves)
    grads = {} if grad_out is None else zip(("grad_value", "grad_feat"), torch.autograd.grad(out, leaves, grad_out))
    return {"out": out.detach(), **dict(grads)}


@dataclass(frozen=True)
class Pool:
    """Arguments of gated_attention_pool, and the gradients of its outputs."""

    h: Tensor
    v_weight: Tensor
    v_bias: Tensor | None
    u_weight: Tensor | None
    u_bias: Tensor | None
    w_weight: Tensor
    w_bias: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    grad_pooled: Tensor
    grad_scores: Tensor

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The seven tensors that have gradients, in the order of gated_attention_pool."""
        return tuple(getattr(self, name) for name in DIFFERENTIABLE)


def _bags(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """For each bag the rows of h.view(-1, D) that are real instances."""
    if cu_seqlens is not None:
        return [torch.arange(a, b, device=h.device) for a, b in pairwise(cu_seqlens.tolist())]
    rows = torch.arange(h.shape[0] * h.shape[1], device=h.device).view(h.shape[:2])
    return [x if mask is None else x[keep] for x, keep in zip(rows, rows if mask is None else mask)]


def pool(
    instances: int | list[int],
    dim: int,
    hidden: int,
    heads: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    seed: int = 0,
    attention: str = "one_hot",
    bags: int = 1,
    layout: str = "rows",
    gated: bool = True,
    bias: bool = True,
    mask: Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
) -> Pool:
    """Arguments and upstream gradients whose attention is "one_hot" or "uniform".

    instances: of each of ``bags`` bags, h being [B, N, D]; or the lengths of ragged bags, h being [T, D].
    layout: "rows", or "channels_first", where h is the view of a channels-first map.
    mask: [B, N] bool, True = real; masked instances hold NaN.
    weights_dtype: that of the weights and of pooled, if it is not h's.

    Uniform attention wants powers of two: as many real instances in each bag, or none.
    """
    generator = torch.Generator(device).manual_seed(seed)
    scale = 1024.0 if dtype == torch.float64 else 128.0
    ragged = not isinstance(instances, int)
    mask = None if mask is None else mask.to(device)
    shape = (sum(instances),) if ragged else (bags, instances)
    lengths = torch.tensor([0, *instances], device=device).cumsum(0) if ragged else None
    h = _signs(generator, *shape, dim)
    flat = h.view(-1, dim)
    v, u = (scale * _signs(generator, hidden, dim) for _ in range(2))
    v_bias, u_bias = (scale * _signs(generator, hidden) for _ in range(2))
    w, w_bias = _signs(generator, heads, hidden), _signs(generator, heads)
    grad_pooled = _signs(generator, len(lengths) - 1 if ragged else bags, heads, dim)
    grad_scores = _signs(generator, *((heads, *shape) if ragged else (bags, heads, instances))) / 64
    members = _bags(h, mask, lengths)
    if attention == "one_hot":
        # A unit of each head is active at one instance of a bag only, by a channel that is 0 at all others.
        units, channels = (torch.randperm(k, generator=generator, device=device)[:heads] for k in (hidden, dim))
        lead = 2 * (2 * w.abs().sum(1).max() + scale)
        v[units], u[units], v_bias[units], u_bias[units], w[:, units] = 0, 0, 0, 0, 0
        v[units, channels] = scale
        w[torch.arange(heads, device=device), units] = torch.exp2(torch.log2(lead).ceil())
        flat[:, channels] = 0
        for bag in members:
            if len(bag) > 0:  # the last instance for the first head
                at = torch.randint(len(bag), (heads,), generator=generator, device=device)
                at[0] = len(bag) - 1
                flat[bag[at], channels] = 1
    elif attention == "uniform":
        w.zero_()
        # ĝ·h sums to 0 over a bag: every second channel is the previous one rolled, with the opposite gradient.
        grad_pooled[..., 1::2] = -grad_pooled[..., : dim - 1 : 2]
        grad_pooled[..., dim - dim % 2 :] = 0
        for i, bag in enumerate(members):
            if len(bag) & len(bag) - 1:
                raise ValueError(f"a bag has {len(bag)} real instances, not a power of two")
            flat[bag, 1::2] = flat[bag.roll(1), : dim - 1 : 2]
            (grad_scores[:, bag] if ragged else grad_scores[i]).mul_(64 / max(1, len(bag)))
    else:
        raise ValueError(f"attention must be one_hot or uniform; got {attention!r}")
    if mask is not None:
        h.masked_fill_(~mask.unsqueeze(-1), float("nan"))
    h = h.to(dtype)
    if layout == "channels_first":
        h = h.mT.contiguous().mT
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = (v, v_bias if bias else None, u if gated else None, u_bias if gated and bias else None, w)
    weights_dtype = weights_dtype or dtype
    weights = (None if x is None else x.to(weights_dtype) for x in (*weights, w_bias if bias else None))
    return Pool(h, *weights, mask, lengths, grad_pooled.to(weights_dtype), grad_scores.to(wide))


@torch.no_grad()
def expected_pool(p: Pool) -> dict[str, Tensor | None]:
    """pooled, scores, grad_h … grad_w_bias: by the signs of V h + b_V and U h + b_U, and by the largest scores."""
    h, v, v_bias, u, u_bias, w, w_bias = (None if x is None else x.double() for x in p.inputs)
    heads, dim = len(w), h.shape[-1]
    flat = h.reshape(-1, dim)
    upstream = p.grad_scores.double()
    upstream = upstream if p.cu_seqlens is not None else upstream.transpose(0, 1).flatten(1)  # [K, rows]
    scores = flat.new_full((heads, len(flat)), float("-inf"))
    pooled = flat.new_zeros(p.grad_pooled.shape)
    grads = [None if x is None else torch.zeros_like(x) for x in (flat, v, v_bias, u, u_bias, w, w_bias)]
    for i, bag in enumerate(_bags(h, p.mask, p.cu_seqlens)):
        if len(bag) == 0:
            continue
        x, grad = flat[bag], p.grad_pooled[i].double()  # [n, D], [K, D]
        t = (x @ v.mT + (0 if v_bias is None else v_bias)).sign()
        s = None if u is None else ((x @ u.mT + (0 if u_bias is None else u_bias)).sign() + 1) / 2
        gate = t if s is None else t * s
        score = w @ gate.mT + (0 if w_bias is None else w_bias[:, None])  # [K, n]
        best = (score == score.amax(1, keepdim=True)).double()
        attention = best / best.sum(1, keepdim=True)
        scores[:, bag], pooled[i] = score, attention @ x
        q = grad @ x.mT
        ds = attention * (q - (attention * q).sum(1, keepdim=True)) + upstream[:, bag]
        dg = ds.mT @ w
        dv = dg * (1 - t * t) * (1 if s is None else s)
        du = None if s is None else dg * t * s * (1 - s)
        grads[0][bag] = attention.mT @ grad + dv @ v + (0 if u is None else du @ u)
        sums = (dv.mT @ x, dv.sum(0), None if s is None else du.mT @ x, None if s is None else du.sum(0))
        for total, part in zip(grads[1:], (*sums, ds @ gate, ds.sum(1)), strict=True):
            if total is not None:
                total += part
    if p.cu_seqlens is None:
        scores = scores.view(heads, *h.shape[:2]).transpose(0, 1)
    grads[0] = grads[0].view(h.shape)
    return {"pooled": pooled.to(p.grad_pooled.dtype), "scores": scores.to(p.grad_scores.dtype), **_named(grads, p)}


def _named(grads: Sequence[Tensor | None], p: Pool) -> dict[str, Tensor | None]:
    pairs = zip(DIFFERENTIABLE, grads, p.inputs, strict=True)
    return {f"grad_{name}": None if x is None else x.to(given.dtype) for name, x, given in pairs}


@torch.no_grad()
def expected_scores(p: Pool, activation: str = "tanh", factors: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
    """scores and the gradients that p.grad_scores alone gives, by the activations' values at multiples of 128.

    factors: dropout's factors of the two branches, [rows, L] each.
    """
    h, v, v_bias, u, u_bias, w, w_bias = (None if x is None else x.double() for x in p.inputs)
    real = torch.ones(p.h.shape[:-1], dtype=torch.bool, device=h.device) if p.mask is None else p.mask
    real, x = real.flatten(), h.masked_fill(~real.unsqueeze(-1), 0).reshape(-1, h.shape[-1])
    ragged = p.cu_seqlens is not None
    ds = p.grad_scores.double() if ragged else p.grad_scores.double().transpose(0, 1).flatten(1)  # [K, rows]
    ds = ds.masked_fill(~real, 0)
    keep_t, keep_s = (1, 1) if factors is None else (factor.double() for factor in factors)
    x_v = x @ v.mT + (0 if v_bias is None else v_bias)
    t = x_v.sign() if activation == "tanh" else x_v.relu()
    slope = {"tanh": 1 - t * t, "relu": (x_v > 0).double(), "gelu": (x_v.sign() + 1) / 2}[activation]
    t, slope = t * keep_t, slope * keep_t
    dg = ds.mT @ w
    if u is None:
        gated, dv, du = t, dg * slope, None
    else:
        s = ((x @ u.mT + (0 if u_bias is None else u_bias)).sign() + 1) / 2
        gated, dv, du = t * s * keep_s, dg * slope * s * keep_s, dg * t * s * (1 - s) * keep_s
    scores = (w @ gated.mT + (0 if w_bias is None else w_bias[:, None])).masked_fill(~real, float("-inf"))
    if not ragged:
        scores = scores.view(len(w), *h.shape[:2]).transpose(0, 1)
    dh = (dv @ v + (0 if u is None else du @ u)).masked_fill(~real[:, None], 0)
    sums = (dv.mT @ x, dv.sum(0), None if u is None else du.mT @ x, None if u is None else du.sum(0), ds @ gated)
    grads = [None if x is None else grad for x, grad in zip(p.inputs, (dh.view(h.shape), *sums, ds.sum(1)))]
    return {"scores": scores.to(p.grad_scores.dtype), **_named(grads, p)}


@torch.no_grad()
def by_scores(p: Pool) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores of p's instances, and the expected pooled, grad_scores and grad_value (of h) of ``pool_by_scores``."""
    value = p.h.double().reshape(-1, p.h.shape[-1])
    heads = len(p.w_weight)
    scores = value.new_full((heads, len(value)), float("nan"))
    grads = torch.zeros_like(scores), torch.zeros_like(value)
    pooled = value.new_zeros(p.grad_pooled.shape)
    for i, bag in enumerate(_bags(p.h, p.mask, p.cu_seqlens)):
        if len(bag) == 0:
            continue
        x, grad = value[bag], p.grad_pooled[i].double()
        count = 1 << len(bag).bit_length() - 1
        attention = torch.zeros(heads, len(bag), dtype=torch.float64, device=x.device)
        for k in range(heads):  # other instances for each head
            attention[k, (torch.arange(count, device=x.device) + k) % len(bag)] = 1 / count
        scores[:, bag], pooled[i] = 1024 * ((attention > 0).double() - 1), attention @ x
        q = grad @ x.mT
        grads[0][:, bag] = attention * (q - (attention * q).sum(1, keepdim=True))
        grads[1][bag] = attention.mT @ grad
    scores, grad_scores = (x.to(p.grad_scores.dtype) for x in (scores, grads[0]))
    if p.cu_seqlens is None:
        scores, grad_scores = (x.view(heads, *p.h.shape[:2]).transpose(0, 1) for x in (scores, grad_scores))
    grad_value = grads[1].view(p.h.shape).to(p.h.dtype)
    return scores, {"pooled": pooled.to(p.h.dtype), "grad_scores": grad_scores, "grad_value": grad_value}


def found_pool(op: Callable, p: Pool) -> dict[str, Tensor | None]:
    """Results of ``op(*inputs, mask=mask, cu_seqlens=cu_seqlens)`` under the names of ``expected_pool``."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in p.inputs]
    outputs = op(*leaves, mask=p.mask, cu_seqlens=p.cu_seqlens)
    upstream = (p.grad_pooled, p.grad_scores)
    grads = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream))
    names = (f"grad_{name}" for name in DIFFERENTIABLE)
    found = {name: None if leaf is None else next(grads) for name, leaf in zip(names, leaves, strict=True)}
    return {"pooled": outputs[0].detach(), "scores": outputs[1].detach(), **found}


def differences(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> str | None:
    """None where all of ``expected`` was found, bit for bit except the sign of 0; else what differs."""
    sentences = []
    for name, right in expected.items():
        got = found[name]
        if right is None or got is None:
            if right is not got:
                sentences.append(f"{name} is {'absent' if got is None else 'there'}, and should not be")
        elif got.shape != right.shape or got.dtype != right.dtype:
            kinds = (f"{x.dtype} {list(x.shape)}" for x in (got, right))
            sentences.append("{} is {}, not {}".format(name, *kinds))
        elif not torch.equal(got, right):
            at = (got != right).nonzero()
            few = [(index, got[tuple(index)].item(), right[tuple(index)].item()) for index in at[:3].tolist()]
            listed = ", ".join(f"{a} instead of {b} at {index}" for index, a, b in few)
            sentences.append(f"{len(at)} of {got.numel()} elements of {name} differ: {listed}")
    return "; ".join(sentences) or None
