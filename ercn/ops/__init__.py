"""Fused operators of weakly supervised imaging; everything here is differentiable and runs on every backend."""

from ercn.ops._backends import BackendStatus, backends, use_backend
from ercn.ops._decompositions import decompositions
from ercn.ops.affinity import affinity_propagate, relu_affinity
from ercn.ops.attention_pool import attention_scores, gated_attention_pool, pool_by_scores

__all__ = [
    "BackendStatus",
    "affinity_propagate",
    "attention_scores",
    "backends",
    "decompositions",
    "gated_attention_pool",
    "pool_by_scores",
    "relu_affinity",
    "use_backend",
]
