"""How DTensor shards the ops: over the batch of images or bags, of which each is computed on its own.

It is imported once torch.distributed.tensor is, which takes as long as the rest of ercn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

Rule = list[tuple[list, list]]  # (placements of outputs, placements of arguments)
BATCH = Shard(0)
_registered: set[torch._ops.OpOverload] = set()


def register(overload: torch._ops.OpOverload) -> None:
    rule = RULES.get(overload._schema.name.split("::")[-1])
    if rule is None or overload in _registered:
        return
    _registered.add(overload)
    outputs = len(overload._schema.returns)

    def acceptable(*args) -> Rule:
        whole = ([Replicate()] * outputs, [_unless_absent(Replicate(), x) for x in args])
        return [whole, *rule(*args)]

    register_sharding(overload)(acceptable)


def _unless_absent(placement, x):
    """Only tensors have placements."""
    return placement if hasattr(x, "placements") else None


def _affinity(value, feat, backend="") -> Rule:
    return [([BATCH], [BATCH, BATCH, None])]


def _affinity_backward(grad_out, value, feat, need_value, backend="") -> Rule:
    return [([BATCH if need_value else Replicate(), BATCH], [BATCH, BATCH, BATCH, None, None])]


def _inputs(h, *weights_and_rest) -> list | None:
    """Of the pool's inputs from h to the activation, bags sharded; None where the bags are not h's first dimension, or
    dropout numbers the instances of all of them."""
    *weights, mask, cu_seqlens, seed, _, _ = weights_and_rest
    if cu_seqlens is not None or seed is not None:
        return None
    return [BATCH, *(_unless_absent(Replicate(), x) for x in weights), _unless_absent(BATCH, mask), *(None,) * 4]


def _pool(*args) -> Rule:
    inputs = _inputs(*args[:12])
    return [] if inputs is None else [([BATCH, BATCH], [*inputs, *(None,) * (len(args) - 12)])]


def _scores(*args) -> Rule:
    inputs = _inputs(*args[:12])
    return [] if inputs is None else [([BATCH], [*inputs, *(None,) * (len(args) - 12)])]


def _pool_backward(grad_pooled, grad_scores, *args) -> Rule:
    inputs = _inputs(*args[:12])
    if inputs is None:
        return []
    needs, upstream = args[13], [_unless_absent(BATCH, x) for x in (grad_pooled, grad_scores)]
    given = [need and x is not None for need, x in zip(needs, args)]  # any other gradient is an empty tensor
    gradients = [BATCH if given[0] else Replicate(), *(Partial() if x else Replicate() for x in given[1:])]
    return [(gradients, [*upstream, *inputs, BATCH, *(None,) * (len(args) - 13)])]


def _by_scores(scores, value, mask, cu_seqlens, backend="") -> Rule:
    return [] if cu_seqlens is not None else [([BATCH], [BATCH, BATCH, _unless_absent(BATCH, mask), None, None])]


def _by_scores_backward(grad_pooled, scores, value, mask, cu_seqlens, needs, backend="") -> Rule:
    if cu_seqlens is not None:
        return []
    gradients = [BATCH if need else Replicate() for need in needs]
    return [(gradients, [BATCH, BATCH, BATCH, _unless_absent(BATCH, mask), None, None, None])]


RULES: dict[str, Callable[..., Rule]] = {
    "relu_affinity": _affinity,
    "relu_affinity_backward": _affinity_backward,
    "gated_attention_pool": _pool,
    "gated_attention_pool_backward": _pool_backward,
    "attention_scores": _scores,
    "pool_by_scores": _by_scores,
    "pool_by_scores_backward": _by_scores_backward,
}
