"""Checks of the operators on inputs with exact results."""

from __future__ import annotations

import functools

import torch

from ercn.benchmarks.exact import (
    affinity,
    differences,
    expected_affinity,
    expected_pool,
    found_affinity,
    found_pool,
    pool,
)
from ercn.ops import gated_attention_pool, relu_affinity


def real_instances(*counts, of):
    """A mask [B, of] with ``counts`` real instances in the bags, at every second place from the end."""
    order = [*range(of - 1, -1, -2), *range(of - 2, -1, -2)]
    mask = torch.zeros(len(counts), of, dtype=torch.bool)
    for row, count in zip(mask, counts):
        row[order[:count]] = True
    return mask


BAGS = {
    "rows": {"instances": 64, "bags": 3},
    "channels_first": {"instances": 128, "bags": 2, "layout": "channels_first"},
    "ragged": {"instances": [0, 128, 1, 64, 0, 2]},
    "masked": {"instances": 135, "mask": real_instances(128, 0, of=135), "bags": 2},
    "both": {"instances": 72, "mask": real_instances(64, 1, of=72), "bags": 2, "layout": "channels_first"},
}


def check_affinity(backend, *sizes, gradients=True, **kinds):
    value, feat, grad = affinity(*sizes, **kinds)
    arguments = (value, feat, grad if gradients else None)
    found = found_affinity(functools.partial(relu_affinity, backend=backend), *arguments)
    assert differences(found, expected_affinity(*arguments)) is None


def check_pool(backend, *sizes, **kinds):
    p = pool(*sizes, **kinds)
    found = found_pool(functools.partial(gated_attention_pool, backend=backend), p)
    assert differences(found, expected_pool(p)) is None
