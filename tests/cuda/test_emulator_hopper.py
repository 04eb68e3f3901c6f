"""The emulator's wgmma, TMA and barriers against torch, and the undefined behaviour that it catches."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from _cuda_emulator import DEVICE, EMULATOR, caller, library
from _ops import randn

NOTHING, WAIT, FENCE, PROXY_FENCE, BARRIER, COMMIT = range(6)


@pytest.fixture(scope="module")
def probes():
    return caller(library("probes_hopper", [EMULATOR / "probes_hopper.cpp"]))


def operands(n, k, dtype, a_mn=False, b_mn=False):
    """A [64, K] and B [N, K] as the kernel reads them, and their product."""
    a, b = randn(64, k, seed=1, dtype=dtype), randn(n, k, seed=2, dtype=dtype)
    stored = [x.mT.contiguous() if mn else x for x, mn in ((a, a_mn), (b, b_mn))]
    return *stored, torch.full((64, n), torch.nan), a.float() @ b.float().mT


@pytest.mark.parametrize("a_from", ["rows", "columns", "registers"])
@pytest.mark.parametrize("b_mn", [False, True], ids=["b_rows", "b_columns"])
@pytest.mark.parametrize("n", [8, 96, 256])
def test_warpgroup_product(probes, n, b_mn, a_from):
    a_mn, registers = a_from == "columns", a_from == "registers"
    a, b, d, exact = operands(n, 64, torch.bfloat16, a_mn, b_mn)
    assert probes("wgmma_bf16", n, a_mn, b_mn, registers, a, b, d, NOTHING) is None
    torch.testing.assert_close(d, exact, rtol=1e-5, atol=1e-4)


def test_warpgroup_product_of_float16(probes):
    a, b, d, exact = operands(192, 64, torch.float16, b_mn=True)
    assert probes("wgmma_fp16", a, b, d) is None
    torch.testing.assert_close(d, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("without", [WAIT, BARRIER], ids=["wait", "barrier"])
def test_product_that_is_not_waited_for_is_nan(probes, without):
    a, b, d, _ = operands(96, 64, torch.bfloat16)
    probes("wgmma_bf16", 96, False, False, False, a, b, d, without)
    assert d.isnan().any()


@pytest.mark.parametrize(
    "without, says",
    [
        (FENCE, "wgmma without a wgmma_fence since the last wgmma_commit"),
        (PROXY_FENCE, "which was stored to without a fence_proxy_async after it"),
        (COMMIT, "did not wait for its last wgmma"),
    ],
)
def test_product_without_its_fences_is_named(probes, without, says):
    a, b, d, _ = operands(96, 64, torch.bfloat16)
    assert says in probes("wgmma_bf16", 96, False, False, False, a, b, d, without)


def test_ring_of_stages(probes):
    x = randn(7, 8, 32, seed=3, dtype=torch.float32)
    for seed in range(8):
        probes("set_seed", ctypes.c_uint64(seed))
        y = torch.zeros(32)
        assert probes("ring_of_stages", x, 7, y, NOTHING) is None
        torch.testing.assert_close(y, x.sum((0, 1)))


def test_ring_that_does_not_wait_is_caught(probes):
    x = randn(7, 8, 32, seed=3, dtype=torch.float32)
    overrun = probes("ring_of_stages", x, 7, torch.zeros(32), WAIT)
    assert "more arrivals than the barrier counts" in overrun
    y = torch.zeros(32)
    probes("ring_of_stages", x, 7, y, BARRIER)
    assert y.isnan().any()


def test_ring_that_is_never_emptied_deadlocks(probes):
    message = probes("ring_of_stages", randn(7, 8, 32, dtype=torch.float32), 7, torch.zeros(32), COMMIT)
    assert "threads 13 wait for parity 0 of the mbarrier at offset 2064" in message
    assert "threads 32-63 wait for parity 1 of the mbarrier at offset 2048" in message
    assert "mbarrier at offset 2064 is in phase 0, lacks 32 of 32 arrivals and 0 bytes" in message


@pytest.mark.parametrize("corner", [(0, 0, 0), (16, 3, 1), (-8, -3, -1), (40, 20, 9)], ids=str)
def test_box_of_a_tensor(probes, corner):
    depth, rows, columns = 3, 11, 48
    x = randn(depth, rows, columns, seed=4, dtype=torch.float16)
    y = torch.full((2, 8, 32), torch.nan, dtype=torch.float16)
    assert probes("box", x, columns, rows, depth, *corner, y) is None
    padded = torch.nn.functional.pad(x, (8, 80, 8, 40, 8, 20))
    c0, c1, c2 = (c + 8 for c in corner)
    expected = padded[c2 : c2 + 2, c1 : c1 + 8, c0 : c0 + 32]
    offsets = torch.arange(1024)
    stored = offsets ^ ((offsets >> 7 & 7) << 4)
    assert torch.equal(y.view(-1).view(torch.uint8)[stored], expected.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "address, columns, stride, box, says",
    [
        (64, 64, 128, 64, None),
        (72, 64, 128, 64, "the address must be a multiple of 16"),
        (64, 63, 126, 64, "strides must be multiples of 16"),
        (64, 0, 128, 64, "sizes must be from 1"),
        (64, 512, 1024, 512, "sides of the box must be from 1 to 256"),
        (64, 64, 128, 33, "dimension 0 of the box must be a multiple of 16 bytes"),
        (64, 256, 512, 128, "dimension 0 of the box must fit the swizzle"),
    ],
)
def test_tensor_maps_that_the_driver_refuses(probes, address, columns, stride, box, says):
    message = probes("encode", *(ctypes.c_int64(x) for x in (address, columns, stride)), box)
    assert message is None if says is None else says in message


def test_stored_matrices_load_again(probes):
    x = torch.arange(128, dtype=torch.int32) * 65537
    y = torch.zeros_like(x)
    assert probes("there_and_back", x, y) is None
    assert torch.equal(x, y)


@pytest.mark.parametrize("by_shuffle", [False, True], ids=["by_thread", "by_shuffle"])
def test_shuffle_where_lanes_have_parted_is_named(by_shuffle):
    """Where the triangle stores mirrored sums, only lanes with an existing channel read their warp's index.

    by_shuffle compiles the kernel with an index by a shuffle of all lanes, which is undefined there.
    """
    flags = ("-DERCN_INDEX_BY_SHUFFLE",) if by_shuffle else ()
    name = "probes_affinity_by_shuffle" if by_shuffle else "probes_affinity"
    triangle = caller(library(name, [EMULATOR / "probes_affinity.cpp"], flags))
    feat, terms = randn(384, 64, dtype=torch.bfloat16), randn(48, 384, dtype=torch.bfloat16)
    direct, mirrored = torch.full((2, 24, 256), torch.nan), torch.full((2, 22, 128), torch.nan)
    failure = triangle("affinity_triangle", feat, terms, 384, 22, direct, mirrored)
    if by_shuffle:
        assert "whose other lanes are in" in failure and "uniform_warp_index" in failure
        return
    assert failure is None
    a = torch.relu(feat.float() @ feat.float().mT).bfloat16().float()
    value = terms[:24].float() + terms[24:].float()
    torch.testing.assert_close(direct[0], value @ a[:, :256], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mirrored[0], value[:22, :256] @ a[:256, 256:], rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_layouts_are_those_of_cute():
    """Fragments of mma and wgmma and swizzled operands, against CuTe's, which others wrote from the same documents."""
    sys.path.insert(0, str(DEVICE))
    import toolchain

    if reason := toolchain.obstacle():
        pytest.skip(reason)
    toolkit = toolchain.toolkit()[1] / "include"
    flags = ("-O0", f"-isystem{toolchain.cutlass()}", f"-isystem{toolkit}", f"-isystem{toolkit / 'cccl'}")
    differ = caller(library("against_cute", [EMULATOR / "against_cute.cpp"], flags))
    assert differ("layouts_differ") is None
