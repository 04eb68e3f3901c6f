"""The emulator of csrc/cuda/arch against torch, and the undefined behaviour that it catches."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys

import pytest
import torch
from _cuda_emulator import EMULATOR, caller, library
from _ops import randn


@pytest.fixture(scope="module")
def probes():
    return caller(library("probes", [EMULATOR / "probes.cpp"]))


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_warp_product_of_matrices_from_shared_memory(probes, dtype, columns):
    a, b = randn(16, 16, seed=1, dtype=dtype), randn(8, 16, seed=2, dtype=dtype)
    d = torch.zeros(16, 8)
    stored = b.mT.contiguous() if columns else b
    assert probes(f"multiply_{'bf16' if dtype == torch.bfloat16 else 'fp16'}", a, stored, columns, d) is None
    torch.testing.assert_close(d, a.float() @ b.float().mT, rtol=1e-5, atol=1e-5)


def test_tf32_product_reads_the_upper_19_bits(probes):
    a, b, d = randn(16, 8, seed=1, dtype=torch.float32), randn(8, 8, seed=2, dtype=torch.float32), torch.zeros(16, 8)
    assert probes("multiply_tf32", a, b, d) is None
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    torch.testing.assert_close(d, cut[0] @ cut[1], rtol=1e-5, atol=1e-5)


def test_conversions_round_as_torch_does(probes):
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    ties = torch.arange(0, 2**16, dtype=torch.int64) << 12  # halves of the last bit of all three types
    x = torch.cat([bits, ties, -ties]).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 6e-8, 2.9e-8])])
    for kind, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        ours = torch.empty_like(x)
        probes("convert", kind, len(x), x, ours)
        torch.testing.assert_close(ours, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    ours = torch.empty_like(x)
    probes("convert", 2, len(x), x, ours)
    finite = x.isfinite() & (x.abs() < 3e38)
    assert ((ours.view(torch.int32)[finite] & 0x1FFF) == 0).all()
    normal = finite & (x.abs() > 1e-30)
    assert ((ours - x)[normal].abs() <= x[normal].abs() * 2**-11).all()


def test_shuffles(probes):
    x, y = randn(32, seed=3, dtype=torch.float32), torch.zeros(32)
    assert probes("reduce", x, y) is None
    torch.testing.assert_close(y, x.sum().expand(32))


def test_copies_arrive_after_wait_and_barrier(probes):
    x = randn(64, 4, seed=4, dtype=torch.float32)
    for seed in range(4):
        probes("set_seed", ctypes.c_uint64(seed))
        y = torch.zeros(64, 4)
        assert probes("copy", x, y, True, True, True) is None
        assert torch.equal(x, y)
        assert probes("copy", x, y, True, True, False) is None
        assert (y == 0).all(), "copies that are not valid are zeros"
    for waits, meets in itertools.product([True, False], repeat=2):
        if not (waits and meets):
            y = torch.zeros(64, 4)
            assert probes("copy", x, y, waits, meets, True) is None
            assert y.isnan().any(), f"waits {waits}, meets {meets}: should have been seen"


def test_shared_memory_starts_as_nan(probes):
    y = torch.zeros(32)
    assert probes("shared_starts_as_nan", y) is None
    assert y.isnan().all()


@pytest.mark.parametrize(
    "name, says",
    [
        ("deadlock", "threads 0-31 wait for barrier 0 of 64 threads\n  threads 32-63 wait for barrier 3 of 64 threads"),
        ("mixed_instructions", "of a warp whose other lanes are in"),
        ("beyond_shared", "ldmatrix: 16 bytes at offset 512 of shared memory, which has 512"),
    ],
)
def test_undefined_behaviour_is_named(probes, name, says):
    assert says in probes(name)


def test_misaligned_copy_is_named(probes):
    assert "cp_async" in probes("misaligned", torch.zeros(256))


BEYOND = """
import sys
import torch
from _cuda_emulator import EMULATOR, caller, library
probes = caller(library("probes", [EMULATOR / "probes.cpp"]))
probes("write_beyond", torch.zeros(32), sys.argv[1] == "shared")
"""


@pytest.mark.skipif("-fsanitize=address" not in os.environ.get("ERCN_CXXFLAGS", ""), reason="make sanitize runs it")
@pytest.mark.parametrize("memory", ["shared", "global"])
def test_address_sanitizer_sees_a_write_beyond(memory):
    command = [sys.executable, "-c", BEYOND, memory]
    result = subprocess.run(command, cwd=EMULATOR.parent, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr and "write_beyond" in result.stderr
