"""An output or scratch that a compiled operator leaves unwritten shows in the tests."""

from pathlib import Path

import _cuda_emulator
import pytest
import torch
from _uninitialised import from_cpp, native_operators


@pytest.fixture(scope="module")
def unwritten():
    source = Path(__file__).with_name("unwritten.cpp")
    torch.ops.load_library(_cuda_emulator.operators_with("unwritten", [source]))
    return torch.ops.ercn_unwritten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_output_is_nan(unwritten, dtype):
    like = torch.ones(1, dtype=dtype)
    assert from_cpp(unwritten.output)(like).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_scratch_is_huge(unwritten):
    huge = torch.full((4000,), 0x7F, dtype=torch.uint8).view(torch.float32)
    assert torch.equal(from_cpp(unwritten.scratch)(torch.ones(1)), huge)


def test_every_compiled_operator_is_watched():
    for name in native_operators():
        assert hasattr(getattr(torch.ops.ercn_native, name), "__wrapped__"), name
