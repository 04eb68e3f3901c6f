"""Names of the kernels and counts of their launches: on a GPU, or interpreted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from _gpu_backends import BACKENDS, DEVICE, here

if "triton" not in BACKENDS:
    pytest.skip("triton cannot be used in this process", allow_module_level=True)

from ercn import kernels
from ercn.ops import relu_affinity

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def test_every_kernel_in_the_source_is_named():
    folder = Path(kernels.__file__).parent
    written = {
        f"{path.stem}.{name}"
        for path in folder.glob("*.py")
        for name in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"affinity.forward_kernel", "attention_pool.forward_kernel"} < written == set(kernels.kernels())


def test_launches_are_counted_within_the_block_only():
    value, feat = here(torch.ones(1, 2, 5)), here(torch.ones(1, 3, 5))
    relu_affinity(value, feat, backend="triton")
    with kernels.counting_launches() as counts:
        out = relu_affinity(value, feat, backend="triton")
        relu_affinity(value, feat, backend="triton")
    relu_affinity(value, feat, backend="triton")
    assert counts == {"affinity.split_kernel": 2, "affinity.forward_kernel": 2}
    assert torch.equal(out, torch.full_like(out, 15))
