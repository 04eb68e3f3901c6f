"""Fused operators of weakly supervised imaging; everything here is differentiable and runs on every backend."""

from ercn.ops._backends import BackendStatus, backends, use_backend
from ercn.ops._decompositions import decompositions
from ercn.ops.affinity import affinity_propagate, relu_affinity
from ercn.ops.attention_pool import attention_scores, gated_attention_pool, pool_by_scores
from ercn.ops.refinement import edge_affinity, feature_affinity, pixel_adaptive_refinement, random_walk

__all__ = [
    "BackendStatus",
    "affinity_propagate",
    "attention_scores",
    "backends",
    "decompositions",
    "edge_affinity",
    "feature_affinity",
    "gated_attention_pool",
    "pixel_adaptive_refinement",
    "pool_by_scores",
    "random_walk",
    "relu_affinity",
    "use_backend",
]
