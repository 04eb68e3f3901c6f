"""Fused operators of weakly supervised imaging; everything here is differentiable and runs on every backend."""

from ercn.ops._backends import BackendStatus, backends, use_backend
from ercn.ops.affinity import affinity_propagate, relu_affinity
from ercn.ops.attention_pool import gated_attention_pool
from ercn.ops.refinement import edge_affinity, feature_affinity, pixel_adaptive_refinement, random_walk

__all__ = [
    "BackendStatus",
    "affinity_propagate",
    "backends",
    "edge_affinity",
    "feature_affinity",
    "gated_attention_pool",
    "pixel_adaptive_refinement",
    "random_walk",
    "relu_affinity",
    "use_backend",
]
