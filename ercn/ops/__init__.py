"""Fused operators of weakly supervised imaging; everything here is differentiable and runs on every backend."""

from ercn.ops._backends import BackendStatus, backends, use_backend
from ercn.ops.affinity import affinity_propagate, relu_affinity
from ercn.ops.attention_pool import gated_attention_pool
from ercn.ops.refinement import pixel_adaptive_refinement

__all__ = [
    "BackendStatus",
    "affinity_propagate",
    "backends",
    "gated_attention_pool",
    "pixel_adaptive_refinement",
    "relu_affinity",
    "use_backend",
]
