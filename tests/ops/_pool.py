"""Attention pooling in plain torch with the random bits of its dropout by NumPy, its inputs and its checks."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from _gpu_backends import BACKENDS, DEVICE, EMULATED, here
from _ops import assert_within_budget, error, generator, randn
from torch.nn.functional import gelu, linear

from ercn.ops import _backends, gated_attention_pool, triton

GPU_ON_CPU = EMULATED or triton.INTERPRETED  # this process tests one GPU backend on the CPU
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": gelu}


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 of counters [..., 4] and keys [..., 2], uint64 below 2^32."""
    c, k = (x.astype(np.uint64) for x in (counter, key))
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = c[..., 0] * np.uint64(0xD2511F53), c[..., 2] * np.uint64(0xCD9E8D57)
        rows = (second >> half) ^ c[..., 1] ^ k[..., 0], second & word, (first >> half) ^ c[..., 3] ^ k[..., 1], first
        c = np.stack([x & word for x in rows], -1)
        k = (k + np.array([0x9E3779B9, 0xBB67AE85], np.uint64)) & word
    return c


def kept(seed: int, p: float, instances: torch.Tensor, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which units of V's and U's branch are kept, each [*instances.shape, hidden]; here every unit has a counter."""
    i, unit = np.broadcast_arrays(instances.numpy().astype(np.uint64)[..., None], np.arange(hidden, dtype=np.uint64))
    u64 = np.uint64
    column = unit // u64(64) * u64(16) + unit % u64(16)
    counter = np.stack([i & u64(0xFFFFFFFF), i >> u64(32), column, np.zeros_like(i)], -1)
    words = philox(counter, np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint64))
    bits = np.take_along_axis(words, (unit // u64(16) % u64(4)).astype(np.int64)[..., None], -1)[..., 0]
    threshold = round(p * 65536)
    return tuple(torch.from_numpy(x >= threshold) for x in (bits & u64(0xFFFF), bits >> u64(16)))


def factors(seed: torch.Tensor | None, p: float, instances: torch.Tensor, units: torch.Tensor):
    """The factors of both branches in float64, hidden units in the order ``units``; None without dropout."""
    if seed is None:
        return None
    scale = 65536 / max(65536 - round(p * 65536), 1)
    return tuple(x[..., units].double() * scale for x in kept(int(seed), p, instances, len(units)))


def inputs(b, n, d, hidden, heads=1, gated=True, bias=True, dtype=torch.float64):
    """h [B, N, D] (b=None: [N, D]) and the weights, scaled so that tanh and sigmoid are not saturated."""
    h = randn(*(() if b is None else (b,)), n, d, seed=1, dtype=dtype)
    v, u = (randn(hidden, d, seed=s, dtype=dtype) / max(d, 1) ** 0.5 for s in (2, 3))
    bv, bu, bw = (randn(k, seed=s, dtype=dtype) if bias else None for s, k in ((4, hidden), (5, hidden), (6, heads)))
    w = randn(heads, hidden, seed=7, dtype=dtype)
    return [h, v, bv, u if gated else None, bu if gated else None, w, bw]


def scores_of(h, v, bv, u, bu, w, bw, *, mask=None, activation="tanh", dropped=None):
    """h [B, N, D] -> [B, K, N]; dropped: the ``factors`` of dropout."""
    gate = ACTIVATIONS[activation](linear(h, v, bv))
    if dropped is not None:
        gate = gate * dropped[0].to(gate)
    if u is not None:
        s = torch.sigmoid(linear(h, u, bu))
        gate = gate * (s if dropped is None else s * dropped[1].to(s))
    scores = linear(gate, w, bw).mT
    return scores if mask is None else scores.masked_fill(~mask[:, None], float("-inf"))


def pooled_of(scores, value, mask=None):
    if mask is None:
        return torch.softmax(scores, -1) @ value
    a = torch.softmax(scores.masked_fill(~mask[:, None], float("-inf")), -1).masked_fill(~mask[:, None], 0)
    return a @ value.masked_fill(~mask[..., None], 0)


def twin(h, *weights, mask=None, cu_seqlens=None, activation="tanh", seed=None, dropout_p=0.0, units=None):
    """(pooled, scores) of any layout in the dtype of the arguments, as published code computes them.

    units: order in which the hidden units are summed.
    """
    hidden = len(weights[0])
    units = torch.arange(hidden) if units is None else units
    *rows, w, w_bias = weights
    weights = *(None if x is None else x[units] for x in rows), w[:, units], w_bias
    if cu_seqlens is None:
        bags = h if h.dim() == 3 else h[None]
        numbers = torch.arange(bags.shape[0] * bags.shape[1]).view(bags.shape[:2])
        mask = None if mask is None else mask.view(bags.shape[:2])
        dropped = factors(seed, dropout_p, numbers, units)
        scores = scores_of(bags, *weights, mask=mask, activation=activation, dropped=dropped)
        results = pooled_of(scores, bags, mask), scores
        return results if h.dim() == 3 else tuple(x[0] for x in results)
    dropped = factors(seed, dropout_p, torch.arange(len(h)), units)
    dropped = None if dropped is None else [x[None] for x in dropped]
    scores = scores_of(h[None], *weights, activation=activation, dropped=dropped)
    bounds = cu_seqlens.tolist()
    pooled = [pooled_of(scores[..., a:b], h[None, a:b]) for a, b in itertools.pairwise(bounds)]
    return torch.cat(pooled), scores[0]


def least_lucky(results, hidden, exact):
    """``results(twin)``, each with its largest error over eight orders of the hidden units. The softmax amplifies the
    errors of scores, and one order of their sums may be exact by chance."""
    orders = [torch.randperm(hidden, generator=generator(i)) for i in range(8)]
    found = zip(*(results(functools.partial(twin, units=units)) for units in orders))
    return [max(each, key=lambda x, truth=truth: error(x, truth)) for each, truth in zip(found, exact, strict=True)]


def backends_for(op: str, *args) -> list[str]:
    """The backends of this process that take ``args``, on any device."""
    names = [*BACKENDS] if GPU_ON_CPU else ["cpu", "reference", *BACKENDS]
    rows = [_backends.named(name, "backend") for name in names]
    return [row.name for row in rows if (row.launcher.unavailable() or row.launcher.can_run(op, *args)) is None]


def device_of(backend: str) -> str:
    return "cpu" if backend in ("cpu", "reference") else DEVICE


def leaf(x):
    return None if x is None else x.detach().clone().requires_grad_()


def gradients(outputs, leaves, grads):
    return torch.autograd.grad(outputs, [x for x in leaves if x is not None], grads)


def budget(ours, plain, exact, channels=False):
    for mine, torchs, truth in zip(ours, plain, exact, strict=True):
        assert_within_budget(mine.cpu(), torchs.cpu(), truth.cpu(), channels)


def pool_results(function, arguments, cast, mask=None, **kwargs):
    """(pooled, scores, gradients…), scores of masked instances as 0."""
    leaves = [None if x is None else leaf(x.to(cast)) for x in arguments]
    pooled, scores = function(*leaves, mask=mask, **kwargs)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], 0)
    seeds = [here(randn(*t.shape, seed=s)).to(t.dtype) for s, t in ((8, pooled), (9, scores))]
    return pooled, scores, *gradients((pooled, scores), leaves, seeds)


def assert_pool(arguments, mask=None, dtype=None):
    arguments = [here(x) for x in arguments]
    mask, dtype = here(mask), dtype or arguments[0].dtype
    ours = pool_results(gated_attention_pool, arguments, dtype, mask)
    exact = pool_results(twin, arguments, torch.float64, mask)
    plain = least_lucky(lambda one: pool_results(one, arguments, dtype, mask), len(arguments[1]), exact)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    budget(ours, plain, exact)
