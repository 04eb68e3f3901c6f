"""Half precision must keep small differences of large sums and stay finite where float16 would overflow."""

import pytest
import torch

from ercn.config import ModelConfig
from ercn.elements import resize
from ercn.models import ERCN

SMALL = ModelConfig(backbone="test_resnet", output_stride=8, embed_dim=8, pool_dim=8)


@pytest.mark.parametrize("cam_pool", ["relu", "softplus", "gem", "lse", "topk", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_adds_no_error_to_that_of_the_cam(cam_pool, dtype):
    model = ERCN(ModelConfig(**vars(SMALL) | {"cam_pool": cam_pool}))
    cam = (8 * torch.randn(2, 4, 33, 33)).to(dtype)
    pooled = model._pool_cam(cam)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), model.double()._pool_cam(cam.double()), rtol=1e-5, atol=1e-5)


def test_additive_evidence_of_one_element_is_finite_in_float16():
    """65 · 65 elements, one with all the attention: N a h exceeds 65504."""
    model = ERCN(ModelConfig(**vars(SMALL) | {"evidence": "additive"}))
    last = torch.full((1, model.pool.v_weight.shape[1], 65, 65), 30.0, dtype=torch.float16)
    attention = torch.zeros(1, 1, 65, 65, dtype=torch.float16)
    attention[..., 32, 32] = 100
    with torch.autocast("cpu", torch.float16):
        cam = model._cam(last, attention)
    expected = model.double()._cam(last.double(), attention.double())
    assert cam.isfinite().all() and expected.abs().max() > 1000
    torch.testing.assert_close(cam.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("corners", [True, False])
def test_autocast_does_not_round_what_is_resized(corners):
    x = torch.rand(1, 2, 33, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = resize(x, (9, 8), corners, antialias=True)
    assert torch.equal(out, resize(x, (9, 8), corners, antialias=True))
