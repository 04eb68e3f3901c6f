"""MoCo v2: the loss against its formula, negatives, the queue, and the momentum encoder."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ercn.config import PretrainConfig
from ercn.training.pretraining import Contrastive, KeyQueue, momentum_of


def steps(*pictures, dim=5, seed=0):
    """Queries and keys [B, dim] of each step's pictures."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (*(torch.randn(len(p), dim, generator=draw, dtype=torch.float64) for _ in range(2)), torch.tensor(p))
        for p in pictures
    ]


def info_nce(query, key, picture, kept, temperature):
    """The loss in Python floats; ``kept``: earlier keys and their pictures."""
    keys = [(k, int(p)) for k, p in zip(F.normalize(key, dim=1), picture)]
    total = 0.0
    for q, (own, i) in zip(F.normalize(query, dim=1), keys):
        positive = math.exp((q @ own).item() / temperature)
        negative = sum(math.exp((q @ k).item() / temperature) for k, p in [*kept, *keys] if p != i)
        total -= math.log(positive / (positive + negative))
    return total / len(query), keys


@pytest.mark.parametrize("size", [0, 2, 5, 100])
def test_the_loss_is_info_nce_without_own_keys(size):
    queue, kept = KeyQueue(size, 5, 0.3).double(), []
    for query, key, picture in steps([0, 1, 2], [3, 0, 1], [4], [1, 4, 2, 0]):  # own keys are in the queue from step 2
        query.requires_grad_()
        loss = queue(query, key, picture)
        expected, own = info_nce(query, key, picture, kept, 0.3)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        loss.backward()
        assert query.grad.isfinite().all()
        kept = (kept + own)[-size:] if size else []
    assert queue.pictures[queue.pictures >= 0].tolist() == [p for _, p in kept]
    for stored, (own, _) in zip(queue.keys[size - len(kept) :], kept):
        torch.testing.assert_close(stored, own)


def test_old_keys_of_a_query_s_own_picture_do_not_count():
    (_, old, _), (query, key, _) = steps([0, 1, 2], [0, 1, 2])
    for pictures, heard in (([0, 1, 2], False), ([7, 8, 9], True)):
        losses = []
        for stored in (old, -old):
            queue = KeyQueue(1, 5, 0.2).double()
            queue(query[:1], stored[:1], torch.tensor(pictures[:1]))
            losses.append(queue(query[:1], key[:1], torch.tensor([0])).item())
        assert (losses[0] != losses[1]) is heard


def test_slots_without_a_key_are_no_negatives():
    """A single query has no negatives, so no gradient."""
    query, key, picture = steps([3])[0]
    query.requires_grad_()
    loss = KeyQueue(64, 5, 0.2).double()(query, key, picture)
    loss.backward()
    assert loss.item() == 0 and (query.grad == 0).all()


def test_the_queue_is_in_the_state_dict_and_gives_the_keys_no_gradient():
    queue, copy = KeyQueue(4, 5, 0.2).double(), KeyQueue(4, 5, 0.2).double()
    first, (query, key, picture) = steps([0, 1, 2], [2, 3])
    queue(*first)
    copy.load_state_dict(queue.state_dict())
    key.requires_grad_()
    query.requires_grad_()
    loss = queue(query, key, picture)
    assert torch.equal(loss, copy(query, key, picture))
    loss.backward()
    assert key.grad is None and query.grad.abs().max() > 0 and not queue.keys.requires_grad


def test_the_loss_is_exact_under_autocast():
    query, key, picture = (x.float() if x.is_floating_point() else x for x in steps([0, 1, 2, 3])[0])
    plain = KeyQueue(4, 5, 0.1)(query, key, picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(KeyQueue(4, 5, 0.1)(query, key, picture), plain)


def test_the_momentum_encoder_follows_within_a_tenth_of_the_run():
    assert [momentum_of(steps) for steps in (1, 10, 40, 1000, 10**6)] == [0, 0, 0.75, 0.99, 0.999]
    for momentum, expected in ((None, 0.75), (0.5, 0.5), (1.0, 1.0)):
        module = Contrastive(PretrainConfig(backbone="test_resnet", method="moco_v2", momentum=momentum), 4)
        module.trainer = SimpleNamespace(world_size=1, num_training_batches=8, max_epochs=5)
        with torch.no_grad():
            for online, old in zip(module.online.parameters(), module.momentum.parameters()):
                online.fill_(1)
                old.fill_(0)
        module._keys(torch.randn(2, 3, 64, 64), 0)
        moved = torch.cat([p.flatten() for p in module.momentum.parameters()])
        torch.testing.assert_close(moved, torch.full_like(moved, 1 - expected))


def test_settings_that_cannot_be_are_named():
    for momentum in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"momentum must be at least 0 and at most 1; got {momentum}"):
            PretrainConfig(momentum=momentum)
