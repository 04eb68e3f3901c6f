"""The public API as a type checker sees it: ``make lint`` checks this file with ``mypy --strict``."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

from ercn.nn import GatedAttentionPool, PixelAdaptiveRefinement, PixelCorrelation
from ercn.ops import (
    BackendStatus,
    affinity_propagate,
    attention_scores,
    backends,
    edge_affinity,
    feature_affinity,
    gated_attention_pool,
    pixel_adaptive_refinement,
    pool_by_scores,
    random_walk,
    relu_affinity,
    use_backend,
)


def ops(map_: Tensor, h: Tensor, v: Tensor, w: Tensor, generator: torch.Generator) -> None:
    assert_type(relu_affinity(map_, map_, backend="cpu"), Tensor)
    assert_type(affinity_propagate(map_, map_, steps=2), Tensor)
    pooled = gated_attention_pool(h, v, None, v, None, w, None, dropout_p=0.25, generator=generator)
    assert_type(pooled, tuple[Tensor, Tensor])
    assert_type(attention_scores(h, v, None, None, None, w, None), Tensor)
    assert_type(pool_by_scores(pooled[1], h), Tensor)
    assert_type(pixel_adaptive_refinement(map_, map_, dilations=(1, 2)), Tensor)
    assert_type(random_walk(map_, edge_affinity(map_)), Tensor)
    assert_type(feature_affinity(map_), Tensor)
    with use_backend("reference"):
        assert_type(backends(), list[BackendStatus])
    relu_affinity(map_)  # type: ignore[call-arg]
    relu_affinity(map_, map_, backend=0)  # type: ignore[arg-type]


def layers(map_: Tensor, state_dict: dict[str, Tensor]) -> None:
    pool = assert_type(GatedAttentionPool.from_state_dict(state_dict, dropout=0.0), GatedAttentionPool)
    assert_type(pool.forward(map_), tuple[Tensor, Tensor])
    assert_type(pool.scores(map_), Tensor)
    assert_type(pool.to_state_dict("CLAM"), dict[str, Tensor])
    assert_type(PixelCorrelation((256, 512)).forward(map_, [map_, map_]), Tensor)
    assert_type(PixelAdaptiveRefinement(form="par").forward(map_, map_), Tensor)
    GatedAttentionPool(16, gated="yes")  # type: ignore[arg-type]
