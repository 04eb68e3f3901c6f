"""Measures tile sizes on the GPU at hand and writes its rows of ``table.py``.

    python -m ercn.kernels.tune                        # every kernel, the table in place
    python -m ercn.kernels.tune --kernels forward triangle --out table.py

Every candidate that compiles, fits on chip and does not spill is timed at the shape its row serves (16,384 pixels or
instances, random data); the fastest is kept. Then dense tiles and the triangle are compared to set where the triangle
begins. Nobody runs this implicitly: what it writes is reviewed, tested and committed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ercn.kernels import affinity, attention_pool, configs
from ercn.kernels.table import TABLE

HEADER = '''"""Tile sizes by architecture, kernel, dtype and largest D (0: any), as ``ercn.kernels.tune`` writes them.

A row holds the fields of the kernel's config in ``configs.py``, num_warps and num_stages first.
"""
'''
DIMS = {"half": (64, 128, 192, 256, 0), "float32": (64, 128, 0)}
STREAMED = 512  # the D at which rows for any D are timed
CHANNELS, PIXELS = 22, 128**2
INSTANCES, POOL_DIM, HIDDEN = 1 << 16, 1024, 256
KERNELS = ("forward", "triangle", "backward", "pool", "row_grad", "weight_grad")
DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
BACKWARD_CHANNELS = {"half": 256, "float32": 128}  # of grad_feat per program where D does not fit


def candidates(kernel: str, kind: str, dim: int) -> Iterator[tuple[int, ...]]:
    """Rows to try, for one kernel, dtype class and largest D (0: any)."""
    warps_and_stages = list(itertools.product((4, 8), (1, 2, 3, 4)))
    if kernel in ("forward", "triangle"):
        tiles = itertools.product((64, 128), (32, 64, 128), (32, 64), (1, 2))
        for (block_m, block_n, block_d, row_tiles), (warps, stages) in itertools.product(tiles, warps_and_stages):
            if row_tiles * block_m % block_n == 0:
                yield warps, stages, block_m, block_n, block_d, row_tiles, dim > 0
    elif kernel == "backward":
        tiles = itertools.product((32, 64, 128), (32, 64, 128), (32, 64))
        for (block_m, block_n, block_d), (warps, stages) in itertools.product(tiles, warps_and_stages):
            yield warps, stages, block_m, block_n, block_d, 0 if dim else BACKWARD_CHANNELS[kind] // block_d
    else:
        tiles = itertools.product((64, 128), (64, 128, 256), (32, 64))
        for (block_m, block_n, block_k), (warps, stages) in itertools.product(tiles, warps_and_stages):
            yield warps, stages, block_m, block_n, block_k


def _workload(kernel: str, dtype: torch.dtype, dim: int) -> Callable[[], object]:
    """A call that spends its time in the kernel, through the rows of the table in force."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    if kernel in ("forward", "triangle", "backward"):
        dim = dim or STREAMED
        value, feat = randn(1, CHANNELS, PIXELS, dtype=torch.float32), randn(1, dim, PIXELS) / dim**0.5
        if kernel == "backward":
            return lambda: affinity.relu_affinity_backward(value, value, feat, True)
        return lambda: affinity.relu_affinity(value, feat)
    h, v, u, w = randn(1, INSTANCES, POOL_DIM), randn(HIDDEN, POOL_DIM), randn(HIDDEN, POOL_DIM), randn(1, HIDDEN)
    inputs = h, v / POOL_DIM**0.5, None, u / POOL_DIM**0.5, None, w, None, None, None, None, 0.0, "tanh"
    pooled, scores = attention_pool.gated_attention_pool(*inputs)
    if kernel == "pool":
        return lambda: attention_pool.gated_attention_pool(*inputs)
    needs = [kernel == "row_grad", kernel == "weight_grad", False, kernel == "weight_grad", False, False, False]
    return lambda: attention_pool.gated_attention_pool_backward(pooled, None, *inputs, scores, needs)


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call; inf where its kernels do not compile, do not fit or spill."""
    try:
        return float("inf") if _spills(call) else triton.testing.do_bench(call, return_mode="median")
    except (CompilationError, OutOfResources, PTXASError):
        return float("inf")


def _spills(call: Callable[[], object]) -> bool:
    """Whether a kernel that the call launches has registers in local memory."""
    kernels, run = [], triton.JITFunction.run
    with mock.patch.object(triton.JITFunction, "run", lambda *args, **named: kernels.append(run(*args, **named))):
        call()
    return any(kernel.n_spills for kernel in kernels)


def fastest(arch: str, kernel: str, kind: str, dim: int, rows: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The row with the smallest time, None if none runs. The table holds each row while it is timed."""
    table = TABLE[arch][kernel][kind]
    before, best, best_time = table[dim], None, float("inf")
    triangle = TABLE[arch]["triangle_from"]
    TABLE[arch]["triangle_from"] = {"dim": 0, "pixels": 0 if kernel == "triangle" else 1 << 31}
    try:
        call = _workload(kernel, DTYPES[kind], dim)
        for row in rows:
            table[dim] = row
            time = milliseconds(call)
            if time < best_time:
                best, best_time = row, time
    finally:
        table[dim], TABLE[arch]["triangle_from"] = before, triangle
    print(f"{arch} {kernel} {kind}, D up to {dim or 'any'}: {best} in {best_time:.4f} ms", flush=True)
    return best


def triangle_from(arch: str) -> dict[str, int]:
    """The least D (at 128² pixels) and the fewest pixels (at D 192) from which on the triangle wins in bfloat16."""

    def wins(dim: int, side: int) -> bool:
        generator = torch.Generator("cuda").manual_seed(0)
        value = torch.randn(1, CHANNELS, side**2, device="cuda", generator=generator)
        feat = torch.randn(1, dim, side**2, device="cuda", generator=generator).bfloat16()
        times = []
        for pixels in (1 << 31, 0):
            TABLE[arch]["triangle_from"] = {"dim": 0, "pixels": pixels}
            times.append(milliseconds(lambda: affinity.relu_affinity(value, feat)))
        return times[1] < times[0]

    before = TABLE[arch]["triangle_from"]
    try:
        dims, sides = (32, 64, 96, 128, 192, 256), (32, 48, 64, 96, 128)
        losing_dims = [dim for dim in dims if not wins(dim, 128)]
        losing_sides = [side for side in sides if not wins(192, side)]
    finally:
        TABLE[arch]["triangle_from"] = before
    never = 1 << 31
    least = min((dim for dim in dims if dim > max(losing_dims, default=0)), default=never)
    fewest = min((side**2 for side in sides if side > max(losing_sides, default=0)), default=never)
    return {"dim": least, "pixels": fewest}


def render(table: dict) -> str:
    """The text of ``table.py``."""
    lines = [HEADER, "TABLE = {"]
    for arch, kernels in table.items():
        lines.append(f'    "{arch}": {{')
        for name, value in kernels.items():
            if name not in KERNELS:
                lines.append(f'        "{name}": {value!r},'.replace("'", '"'))
                continue
            lines.append(f'        "{name}": {{')
            for kind, rows in value.items():
                lines.append(f'            "{kind}": {{')
                lines += [f"                {dim}: {row!r}," for dim, row in rows.items()]
                lines.append("            },")
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="which to tune (all)")
    default = Path(__file__).parent / "table.py"
    parser.add_argument("--out", type=Path, default=default, help="file to write (the table in place)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU that torch can use")
    arch = configs.arch(torch.device("cuda", torch.cuda.current_device()))
    if arch not in TABLE:
        TABLE[arch] = copy.deepcopy(TABLE[configs.family(arch)])
    TABLE[arch]["programs"] = 2 * torch.cuda.get_device_properties("cuda").multi_processor_count
    for kernel, kind in itertools.product(options.kernels, DTYPES):
        for dim in DIMS[kind] if kernel in ("forward", "triangle", "backward") else (0,):
            if row := fastest(arch, kernel, kind, dim, candidates(kernel, kind, dim)):
                TABLE[arch][kernel][kind][dim] = row
            options.out.write_text(render(TABLE), encoding="utf-8")
    TABLE[arch]["triangle_from"] = triangle_from(arch)
    options.out.write_text(render(TABLE), encoding="utf-8")


if __name__ == "__main__":
    main()
