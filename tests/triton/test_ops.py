"""Tile plans of the Triton kernels that small inputs do not reach: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from _affinity import dense, off_kink
from _affinity import gradients as affinity_gradients
from _gpu_backends import BACKENDS, DEVICE, here
from _ops import layouts, randn
from _pool import assert_pool, budget, inputs

if "triton" not in BACKENDS:
    pytest.skip("triton cannot be used in this process", allow_module_level=True)

from ercn.kernels import affinity as affinity_kernels
from ercn.kernels import configs
from ercn.ops import use_backend

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

# Every path with small tiles: several slabs, row tiles and bands, a band that ends inside the map, features streamed.
FORWARD = configs.ForwardConfig(
    num_warps=4, num_stages=1, block_m=16, block_n=16, block_d=16, row_tiles=1, resident=True
)
PLANS = {
    "dense": configs.ForwardPlan(FORWARD, slabs=1, slab=101, band=0),
    "dense slabs": configs.ForwardPlan(FORWARD, slabs=3, slab=48, band=0),
    "dense row tiles": configs.ForwardPlan(FORWARD._replace(row_tiles=2), slabs=2, slab=64, band=0),
    "dense streamed": configs.ForwardPlan(FORWARD._replace(resident=False), slabs=1, slab=101, band=0),
    "triangle": configs.ForwardPlan(FORWARD, slabs=1, slab=101, band=99),
    "triangle slabs": configs.ForwardPlan(FORWARD, slabs=4, slab=32, band=99),
    "triangle bands": configs.ForwardPlan(FORWARD, slabs=3, slab=48, band=2),
    "triangle row tiles": configs.ForwardPlan(FORWARD._replace(row_tiles=2), slabs=2, slab=64, band=3),
    "triangle streamed": configs.ForwardPlan(FORWARD._replace(resident=False), slabs=2, slab=64, band=4),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_forward_plans(plan, finite_products):
    value, feat = randn(2, 3, 101, seed=1), randn(2, 40, 101, seed=2, dtype=torch.float32).double()
    ours = affinity_kernels.relu_affinity(here(value.float()), here(layouts(feat.float())["strided"]), plan)
    budget([ours], [dense(value.float(), feat.float())], [dense(value.float().double(), feat)])


@pytest.mark.parametrize("chunks", [0, 2], ids=["resident", "streamed"])
@pytest.mark.parametrize("slabs", [1, 3])
def test_backward_plans(chunks, slabs, finite_products):
    config = configs.BackwardConfig(num_warps=4, num_stages=1, block_m=16, block_n=16, block_d=16, chunks=chunks)
    plan = configs.BackwardPlan(config, slabs, slab=112 // slabs // 16 * 16 + 16 * (slabs > 1))
    value, grad, feat = randn(2, 3, 101, seed=1), randn(2, 3, 101, seed=3), off_kink(2, 40, 101).float().double()
    padded = layouts(feat.float())["strided"]
    single = [x.float() for x in (grad, value)]
    ours = affinity_kernels.relu_affinity_backward(*(here(x) for x in single), here(padded), True, plan)
    plain = affinity_gradients(dense, *single, feat.float())
    budget(ours, plain, affinity_gradients(dense, *(x.double() for x in single), feat))


def test_pool_workspace_in_several_pieces(monkeypatch):
    monkeypatch.setattr(configs, "WORKSPACE_BYTES", 1)
    with use_backend("triton"):
        assert_pool(inputs(2, 75, 20, 17, heads=2, dtype=torch.float32))


@pytest.mark.gpu
def test_tool_measures_candidates():
    from ercn.kernels import tune
    from ercn.kernels.table import TABLE

    arch = configs.family(configs.arch(torch.device("cuda", 0)))
    before = repr(TABLE)
    rows = [configs.row(arch, "forward", torch.bfloat16, 64), configs.ForwardConfig(64, 32, 32, 4, 2)]
    assert tune.fastest(TABLE, arch, "forward", "half", 64, rows) in rows
    assert repr(TABLE) == before
