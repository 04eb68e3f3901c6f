"""An output or scratch that a compiled operator leaves unwritten shows in every test."""

from pathlib import Path

import _cuda_emulator
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def planted():
    source = Path(__file__).with_name("_unwritten.cpp")
    torch.ops.load_library(_cuda_emulator.operators_with("unwritten", [source]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_output_is_nan(dtype):
    assert torch.ops.ercn_native.unwritten_output(torch.ones(1, dtype=dtype)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("call", ["packet", "overload", "redispatch"])
def test_every_way_to_call(call):
    operator, x = torch.ops.ercn_native.unwritten_output, torch.ones(1)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    ways = {"packet": operator, "overload": operator.default}
    ways["redispatch"] = lambda x: operator.default.redispatch(keys, x)
    assert ways[call](x).isnan().all()


def test_scratch_is_huge():
    huge = torch.full((4000,), 0x7F, dtype=torch.uint8).view(torch.float32)
    assert torch.equal(torch.ops.ercn_native.unwritten_scratch(torch.ones(1)), huge)
