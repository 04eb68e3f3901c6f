"""What the machine can do at most, measured: the rate of a large product in each dtype, and of a copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ercn.benchmarks.cases import DTYPES
from ercn.benchmarks.timing import interleave, summary

NOTE = (
    "large-GEMM rate: torch.matmul of two normal {size}×{size} matrices into memory that exists; copy: reading and "
    "writing {copy_mb} MB. Medians of interleaved runs"
)
SIZE = {"cpu": 4096, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def ceilings(device: str, dtypes: Iterable[str], *, size: int | None = None, rounds: int = 5) -> dict[str, object]:
    """{"gemm_gflops": {dtype: …}, "copy_gbps": …, "note": …}."""
    size = size or SIZE[device]
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(size, size, generator=generator) for _ in range(2)]
    rates = {}
    for name in sorted(set(dtypes)):
        a, b = (x.to(device, DTYPES[name]) for x in wide)
        out = torch.zeros_like(a)
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        times = interleave({"gemm": _gemm(a, b, out)}, device, seconds=0, min_rounds=rounds + 1)["gemm"]
        torch.set_float32_matmul_precision("highest")
        rates[name] = 2 * size**3 / summary(times[1:])[0] / 1e6
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, device, seconds=0, min_rounds=rounds + 1)["copy"]
    note = NOTE.format(size=size, copy_mb=COPY_BYTES[device] >> 20)
    return {"gemm_gflops": rates, "copy_gbps": 2 * COPY_BYTES[device] / summary(times[1:])[0] / 1e6, "note": note}


def _gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor):
    return lambda: torch.matmul(a, b, out=out)
