"""The test of each rank of test_sharding.py: the ops on DTensors against the ops on whole tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from _ops import randn

from ercn.ops import affinity_propagate, attention_scores, gated_attention_pool, pool_by_scores, relu_affinity


def cases():
    """(function, its tensors, how many of the first are sharded over the batch)"""
    value, feat = randn(4, 3, 10, seed=1), randn(4, 5, 10, seed=2)
    yield relu_affinity, (value, feat), 2
    yield relu_affinity, (value.unflatten(2, (2, 5)), feat.unflatten(2, (2, 5))), 2
    yield lambda v, f: affinity_propagate(v, f, steps=2), (value, feat), 2
    h, scores = randn(4, 6, 5, seed=3), randn(4, 2, 6, seed=4)
    weights = [randn(*shape, seed=i) for i, shape in enumerate([(3, 5), (3,), (3, 5), (3,), (2, 3), (2,)])]
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    yield lambda mask, *x: gated_attention_pool(*x, mask=mask)[0], (mask, h, *weights), 2
    yield lambda *x: gated_attention_pool(*x)[1], (h, *weights), 1
    yield lambda h, v, w: gated_attention_pool(h, v, None, None, None, w, None)[0], (h, weights[0], weights[4]), 1
    yield attention_scores, (h, *weights), 1
    yield pool_by_scores, (scores, h), 2
    yield lambda mask, *x: pool_by_scores(*x, mask=mask), (mask, scores, h), 3


def check(rank: int, world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,))
    for number, (function, tensors, sharded) in enumerate(cases()):
        placements = [Shard(0) if i < sharded else Replicate() for i in range(len(tensors))]
        tensors = [x.detach().clone() for x in tensors]
        given = [distribute_tensor(x, mesh, [placement]) for x, placement in zip(tensors, placements)]
        plain = [x.clone().requires_grad_() if x.is_floating_point() else x for x in tensors]
        given = [x.requires_grad_() if x.is_floating_point() else x for x in given]
        with CommDebugMode() as communication:
            out = function(*given)
        assert out.placements == (Shard(0),), f"case {number}: {out.placements}"
        assert communication.get_total_counts() == 0, f"case {number}: {communication.get_comm_counts()}"
        expected = function(*plain)
        torch.testing.assert_close(out.full_tensor(), expected)
        upstream = randn(*expected.shape, seed=7)
        leaves = [x for x in plain if x.requires_grad]
        exact = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
        ours = [x for x in given if x.requires_grad]
        grads = torch.autograd.grad(out, ours, distribute_tensor(upstream, mesh, [Shard(0)]), allow_unused=True)
        for a, e in zip(grads, exact):
            assert (a is None) == (e is None)
            if a is not None:
                torch.testing.assert_close(a.full_tensor(), e)
    ragged_bags_and_dropout_are_whole(mesh, distribute_tensor, Replicate, Shard)
    dist.destroy_process_group()


def ragged_bags_and_dropout_are_whole(mesh, distribute_tensor, Replicate, Shard) -> None:
    """Every rank has all bags if they are not h's first dimension, or if instances are numbered across them."""
    h, v, w = randn(8, 5, seed=1), randn(3, 5, seed=2), randn(2, 3, seed=3)
    bounds = torch.tensor([0, 3, 8])
    whole = [distribute_tensor(x, mesh, [Replicate()]) for x in (v, w, bounds)]
    split = distribute_tensor(h, mesh, [Shard(0)])
    pooled, scores = gated_attention_pool(split, whole[0], None, None, None, whole[1], None, cu_seqlens=whole[2])
    expected = gated_attention_pool(h, v, None, None, None, w, None, cu_seqlens=bounds)
    for a, e in zip((pooled, scores), expected):
        assert a.placements == (Replicate(),)
        torch.testing.assert_close(a.full_tensor(), e)
