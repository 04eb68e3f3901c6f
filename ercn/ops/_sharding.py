"""The DTensor rules of the ops: they shard over the batch of images or bags, each of which is computed independently.

This module is imported only once torch.distributed.tensor is, whose import takes as long as the rest of ercn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ercn.ops._arguments import DIFFERENTIABLE, PoolArguments

Rule = list[tuple[list[Any], list[Any]]]  # (placements of outputs, placements of arguments)
BATCH = Shard(0)
_registered: set[torch._ops.OpOverload] = set()


def register(overload: torch._ops.OpOverload) -> None:
    rule = RULES.get(overload._opname)
    if rule is None or overload in _registered:
        return
    _registered.add(overload)
    outputs = len(overload._schema.returns)

    def acceptable(*args: Any) -> Rule:
        whole = ([Replicate()] * outputs, [_unless_absent(Replicate(), x) for x in args])
        return [whole, *rule(*args)]

    register_sharding(overload)(acceptable)


def _unless_absent(placement: Any, x: Any) -> Any:
    """Only tensors have placements."""
    return placement if hasattr(x, "placements") else None


def _affinity(value: Any, feat: Any, backend: str = "") -> Rule:
    return [([BATCH], [BATCH, BATCH, None])]


def _affinity_backward(grad_out: Any, value: Any, feat: Any, need_value: bool, backend: str = "") -> Rule:
    return [([BATCH if need_value else Replicate(), BATCH], [BATCH, BATCH, BATCH, None, None])]


def _inputs(p: PoolArguments) -> list[Any] | None:
    """The placements of the pool's arguments with sharded bags; None if the bags are not h's first dimension, or if
    dropout numbers the instances of all bags."""
    if p.cu_seqlens is not None or p.seed is not None:
        return None
    placements = dict.fromkeys(PoolArguments._fields)
    placements |= {name: _unless_absent(Replicate(), getattr(p, name)) for name in DIFFERENTIABLE}
    return list((placements | {"h": BATCH, "mask": _unless_absent(BATCH, p.mask)}).values())


def _pool(*args: Any, outputs: int = 2) -> Rule:
    p, rest = PoolArguments.split(args)
    inputs = _inputs(p)
    return [] if inputs is None else [([BATCH] * outputs, [*inputs, *(None for _ in rest)])]


def _scores(*args: Any) -> Rule:
    return _pool(*args, outputs=1)


def _pool_backward(grad_pooled: Any, grad_scores: Any, *args: Any) -> Rule:
    p, (_, needs, *backend) = PoolArguments.split(args)
    inputs = _inputs(p)
    if inputs is None:
        return []
    upstream = [_unless_absent(BATCH, x) for x in (grad_pooled, grad_scores)]
    # The gradient of h is sharded, those of the weights are sums over the bags; any other is an empty tensor.
    given = [need and getattr(p, name) is not None for name, need in zip(DIFFERENTIABLE, needs)]
    gradients = [BATCH if given[0] else Replicate(), *(Partial() if x else Replicate() for x in given[1:])]
    return [(gradients, [*upstream, *inputs, BATCH, None, *(None for _ in backend)])]


def _by_scores(scores: Any, value: Any, mask: Any, cu_seqlens: Any, backend: str = "") -> Rule:
    return [] if cu_seqlens is not None else [([BATCH], [BATCH, BATCH, _unless_absent(BATCH, mask), None, None])]


def _by_scores_backward(
    grad_pooled: Any, scores: Any, value: Any, mask: Any, cu_seqlens: Any, needs: list[bool], backend: str = ""
) -> Rule:
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
