"""The decompositions of the operators: the same results, only operators of torch, any number of pictures."""

import doctest

import pytest
import torch
from torch import nn

from ercn import ops
from ercn.config import ModelConfig
from ercn.models import ERCN, ERCNOutput
from ercn.nn import GatedAttentionPool, PixelAdaptiveRefinement
from ercn.ops import _decompositions

FORMS = ops.decompositions()


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, equal_nan=False, **tolerance)


def test_every_forward_operator_that_returns_tensors_has_one():
    names = {name.removeprefix("ercn::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("ercn::")}
    overloads = [getattr(torch.ops.ercn, name).default for name in names if not name.endswith("_backward")]
    tensors = [op for op in overloads if any(a.type.kind() == "TensorType" for a in op._schema.arguments)]
    assert set(tensors) == set(FORMS)


@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_affinity(block, dtype, monkeypatch):
    monkeypatch.setattr(_decompositions, "_BLOCK_ELEMENTS", block)
    value, feat = torch.randn(2, 3, 40), torch.randn(2, 5, 40).to(dtype)
    args = value, feat, "reference"
    expected = torch.ops.ercn.relu_affinity(*args)
    close(FORMS[torch.ops.ercn.relu_affinity.default](*args), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pool(activation, gated, masked, dropout):
    pool = GatedAttentionPool(6, 70, 2, gated=gated)
    h = torch.randn(3, 9, 6)
    mask = torch.rand(3, 9) < 0.6 if masked else None
    if masked:
        mask[1] = False
    seed = torch.tensor([5]) if dropout else None
    weights = (pool.v_weight, pool.v_bias, pool.u_weight, pool.u_bias, pool.w_weight, pool.w_bias)
    args = (h, *weights, mask, None, seed, dropout, activation, "reference")
    with torch.no_grad():
        pooled, scores = torch.ops.ercn.gated_attention_pool(*args)
        close(FORMS[torch.ops.ercn.gated_attention_pool.default](*args), (pooled, scores), rtol=1e-5, atol=1e-6)
        close(FORMS[torch.ops.ercn.attention_scores.default](*args), scores, rtol=1e-5, atol=1e-6)
        by_scores = FORMS[torch.ops.ercn.pool_by_scores.default](scores, h, mask, None, "reference")
        close(by_scores, pooled, rtol=1e-5, atol=1e-6)


def test_ragged_bags_are_refused():
    pool = GatedAttentionPool(4, 4)

    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = pool

        def forward(self, h, cu_seqlens):
            return self.pool(h, cu_seqlens=cu_seqlens)

    program = torch.export.export(Ragged(), (torch.randn(5, 4), torch.tensor([0, 2, 5])))
    with pytest.raises(NotImplementedError, match="ragged bags"):
        program.run_decompositions(FORMS)


def test_refinement():
    layer = PixelAdaptiveRefinement((1, 30), steps=4)
    image = torch.randn(2, 3, 8, 11)
    image[:, :, :4, :6] = 0.25  # flat: all neighbours have the same weight
    cam = torch.rand(2, 2, 8, 11, dtype=torch.float64)
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (cam, image), dynamic_shapes=({0: batch}, {0: batch}))
    plain = program.run_decompositions(FORMS)
    assert not [node for node in plain.graph.nodes if "ercn" in str(node.target)]
    found = plain.module()(cam[:1].repeat(3, 1, 1, 1), image[:1].repeat(3, 1, 1, 1))
    close(found, layer(cam, image)[:1].repeat(3, 1, 1, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("radius", [2, 5])
def test_walk_and_par(radius):
    value, image = torch.rand(2, 3, 9, 12), torch.randn(2, 3, 9, 12)
    affinity = ops.edge_affinity(torch.rand(2, 1, 9, 12), radius)
    affinity[:, 0, :, -1] = float("nan")  # beyond the border, not read
    args = value, affinity, radius, 8.0, 6, "reference"
    close(FORMS[torch.ops.ercn.random_walk.default](*args), torch.ops.ercn.random_walk(*args), rtol=1e-5, atol=1e-5)
    args = value, image, [1, 30], 4, "par", "reference"
    op = torch.ops.ercn.pixel_adaptive_refinement
    close(FORMS[op.default](*args), op(*args), rtol=1e-5, atol=1e-5)


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(_decompositions).attempted and not doctest.testmod(_decompositions).failed


def test_the_network_exports_for_any_number_of_pictures_and_is_saved_with_its_output(tmp_path):
    config = ModelConfig(backbone="test_resnet", embed_dim=8, pool_dim=8, pamr_reach=0.02, pamr_steps=2)
    torch.manual_seed(0)
    model = ERCN(config).eval()
    image = torch.randn(3, 3, 65, 65)
    with torch.no_grad():
        program = torch.export.export(model, (image[:2],), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})
        torch.export.save(program, tmp_path / "model.pt2")
        found, expected = torch.export.load(tmp_path / "model.pt2").module()(image), model(image)
    assert isinstance(found, ERCNOutput)
    for name, value in expected._asdict().items():
        close(getattr(found, name), value, rtol=1e-5, atol=1e-5)
