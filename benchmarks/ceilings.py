"""Measured peak rates of the machine: multiply-adds in registers (CPU), a large matrix product, a copy."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ercn.benchmarks.cases import DTYPES
from ercn.benchmarks.settings import precision
from ercn.benchmarks.timing import interleave, summary
from ercn.ops import _extension

NOTE = (
    "large-GEMM rate: torch.matmul of two normal {size}×{size} matrices into memory that exists; copy: reading and "
    "writing {copy_mb} MB. Medians of interleaved runs. fma: independent multiply-adds in registers, on every "
    "thread at once, the best of {rounds} runs"
)
SIZE = {"cpu": 4096, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def ceilings(device: str, dtypes: Iterable[str], *, size: int | None = None, rounds: int = 5) -> dict[str, Any]:
    """{"gemm_gflops": {dtype: …}, "fma_gflops": {dtype: …}, "copy_gbps": …, "note": …}; no "fma" on GPUs."""
    size = size or SIZE[device]
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(size, size, generator=generator) for _ in range(2)]
    rates = {}
    for name in sorted(set(dtypes)):
        a, b = (x.to(device, DTYPES[name]) for x in wide)
        out = torch.zeros_like(a)
        with precision(name):
            times = interleave({"gemm": _gemm(a, b, out)}, device, seconds=0, min_rounds=rounds + 1)["gemm"]
        rates[name] = 2 * size**3 / summary(times[1:])[0] / 1e6
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, device, seconds=0, min_rounds=rounds + 1)["copy"]
    return {
        "gemm_gflops": rates,
        "fma_gflops": {name: _fma(name, rounds) for name in rates} if device == "cpu" and not _extension.load() else {},
        "copy_gbps": 2 * COPY_BYTES[device] / summary(times[1:])[0] / 1e6,
        "note": NOTE.format(size=size, copy_mb=COPY_BYTES[device] >> 20, rounds=rounds),
    }


def peak_gflops(ceilings: dict[str, Any], dtype: str) -> float | None:
    """The peak rate of a dtype: multiply-adds, or the large product where those were not measured."""
    return ceilings["fma_gflops"].get(dtype) or ceilings["gemm_gflops"].get(dtype)


def describe(ceilings: dict[str, Any]) -> str:
    """The ceilings in one line."""
    rates = [
        f"{title} {', '.join(f'{dtype} {rate:,.0f}' for dtype, rate in ceilings[key].items())} GFLOP/s"
        for key, title in (("fma_gflops", "multiply-adds"), ("gemm_gflops", "large matrix product"))
        if ceilings[key]
    ]
    return "; ".join([*rates, f"copy {ceilings['copy_gbps']:.1f} GB/s"])


def _fma(dtype: str, rounds: int) -> float:
    threads, rate = torch.get_num_threads(), torch.ops.ercn_native.multiply_add_rate
    with ThreadPoolExecutor(threads) as pool:
        runs = [sum(pool.map(lambda _: rate(dtype, 0.05), range(threads))) for _ in range(rounds)]
    return max(runs) / 1e9


def _gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor):
    return lambda: torch.matmul(a, b, out=out)
