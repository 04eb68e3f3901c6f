"""Measures tile sizes on the GPU at hand and writes its rows of ``table.py``.

    python -m ercn.kernels.tune                        # every kernel, the table in place
    python -m ercn.kernels.tune --kernels forward triangle --out table.py

Every candidate that compiles, fits on chip and does not spill is timed at the shape its row serves (16,384 pixels or
instances, random data); the fastest is kept. Then dense tiles and the triangle are compared to set where the triangle
begins. Nobody runs this implicitly: what it writes is reviewed, tested and committed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ercn.kernels import affinity, attention_pool, configs
from ercn.kernels.configs import Config, Table
from ercn.kernels.table import TABLE, BackwardConfig, ForwardConfig, GemmConfig, PoolConfig

FILE = Path(__file__).with_name("table.py")
DIMS = {"half": (64, 128, 192, 256, 0), "float32": (64, 128, 0)}
STREAMED = 512  # the D at which rows for any D are timed
CHANNELS, PIXELS = 22, 128**2
INSTANCES, POOL_DIM, HIDDEN = 1 << 16, 1024, 256
KERNELS = {
    "forward": ForwardConfig, "triangle": ForwardConfig, "backward": BackwardConfig,
    "pool": PoolConfig, "row_grad": GemmConfig, "weight_grad": GemmConfig,
}  # fmt: skip
DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
ROWS = [f"{kernel} {kind}" for kernel in KERNELS for kind in DTYPES]  # their names in an architecture's block
BACKWARD_CHANNELS = {"half": 256, "float32": 128}  # of grad_feat per program where D does not fit


def candidates(kernel: str, kind: str, dim: int) -> Iterator[Config]:
    """Configs to try, for one kernel, dtype class and largest D (0: any)."""
    warps_and_stages = list(itertools.product((4, 8), (1, 2, 3, 4)))
    if kernel in ("forward", "triangle"):
        tiles = itertools.product((64, 128), (32, 64, 128), (32, 64), (1, 2))
        for (block_m, block_n, block_d, row_tiles), (warps, stages) in itertools.product(tiles, warps_and_stages):
            if row_tiles * block_m % block_n == 0:
                yield ForwardConfig(block_m, block_n, block_d, warps, stages, row_tiles, resident=dim > 0)
    elif kernel == "backward":
        tiles = itertools.product((32, 64, 128), (32, 64, 128), (32, 64))
        for (block_m, block_n, block_d), (warps, stages) in itertools.product(tiles, warps_and_stages):
            chunks = 0 if dim else BACKWARD_CHANNELS[kind] // block_d
            yield BackwardConfig(block_m, block_n, block_d, warps, stages, chunks)
    else:
        tiles = itertools.product((64, 128), (64, 128, 256), (32, 64))
        for tile, (warps, stages) in itertools.product(tiles, warps_and_stages):
            yield KERNELS[kernel](*tile, warps, stages)


def with_row(table: Table, arch: str, kernel: str, kind: str, dim: int, row: Config) -> Table:
    """The table with one row replaced; what two architectures share is replaced for the one alone."""
    block = table[arch] | {f"{kernel} {kind}": table[arch][f"{kernel} {kind}"] | {dim: row}}
    return table | {arch: block}


def workload(kernel: str, dtype: torch.dtype, dim: int) -> Callable[[Table], Callable[[], object]]:
    """A function that turns a tile table into a call whose time is the kernel's."""
    device = torch.device("cuda", torch.cuda.current_device())
    arch, generator = configs.arch(device), torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    if kernel in ("forward", "triangle", "backward"):
        dim = dim or STREAMED
        value, feat = randn(1, CHANNELS, PIXELS, dtype=torch.float32), randn(1, dim, PIXELS) / dim**0.5

        def affinity_call(table: Table) -> Callable[[], object]:
            if kernel == "backward":
                product_dtype = configs.precision(dtype, arch).product_dtype
                plan = configs.backward_plan(1, dim, PIXELS, product_dtype, arch, table)
                return lambda: affinity.relu_affinity_backward(value, value, feat, True, plan)
            plan = configs.forward_plan(1, CHANNELS, dim, PIXELS, dtype, arch, table, kernel == "triangle")
            return lambda: affinity.relu_affinity(value, feat, plan)

        return affinity_call
    h, v, u, w = randn(1, INSTANCES, POOL_DIM), randn(HIDDEN, POOL_DIM), randn(HIDDEN, POOL_DIM), randn(1, HIDDEN)
    inputs = h, v / POOL_DIM**0.5, None, u / POOL_DIM**0.5, None, w, None, None, None, None, 0.0, "tanh"
    pooled, scores = attention_pool.gated_attention_pool(*inputs)
    needs = [kernel == "row_grad", kernel == "weight_grad", False, kernel == "weight_grad", False, False, False]

    def pool_call(table: Table) -> Callable[[], object]:
        plan = configs.pool_plan(POOL_DIM, dtype, arch, table)
        if kernel == "pool":
            return lambda: attention_pool.gated_attention_pool(*inputs, plan=plan)
        backward = attention_pool.gated_attention_pool_backward
        return lambda: backward(pooled, None, *inputs, scores, needs, plan=plan)

    return pool_call


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


def fastest(
    table: Table, arch: str, kernel: str, kind: str, dim: int, rows: Iterable[Config]
) -> Config | None:  # fmt: skip
    """The row with the smallest time in the table's place for it, None if none runs."""
    call = workload(kernel, DTYPES[kind], dim)
    times = {row: milliseconds(call(with_row(table, arch, kernel, kind, dim, row))) for row in rows}
    best = min(times, key=times.get, default=None)
    time = times.get(best, float("inf"))
    print(f"{arch} {kernel} {kind}, D up to {dim or 'any'}: {best} in {time:.4f} ms", flush=True)
    return best if time < float("inf") else None


def triangle_from(table: Table) -> dict[str, int]:
    """The least D (at 128² pixels) and the fewest pixels (at D 192) from which on the triangle wins in bfloat16."""
    device = torch.device("cuda", torch.cuda.current_device())

    def wins(dim: int, side: int) -> bool:
        generator = torch.Generator(device).manual_seed(0)
        value = torch.randn(1, CHANNELS, side**2, device=device, generator=generator)
        feat = torch.randn(1, dim, side**2, device=device, generator=generator).bfloat16()
        sizes = 1, CHANNELS, dim, side**2, feat.dtype, configs.arch(device), table
        plans = [configs.forward_plan(*sizes, triangle) for triangle in (False, True)]
        dense, triangle = (milliseconds(lambda plan=plan: affinity.relu_affinity(value, feat, plan)) for plan in plans)
        return triangle < dense

    dims, sides, never = (32, 64, 96, 128, 192, 256), (32, 48, 64, 96, 128), 1 << 31
    losing_dim = max((dim for dim in dims if not wins(dim, 128)), default=0)
    losing_side = max((side for side in sides if not wins(192, side)), default=0)
    return {
        "dim": min((dim for dim in dims if dim > losing_dim), default=never),
        "pixels": min((side**2 for side in sides if side > losing_side), default=never),
    }


def render(table: Table) -> str:
    """The text of ``table.py``: its own down to the table, then the rows.

    A row that the next larger D has too is left out. An architecture is written as its differences to the earlier one
    with which it shares most blocks; a block that another one has is named.
    """
    head, mark, _ = FILE.read_text(encoding="utf-8").partition("\nTABLE: dict[str, dict[str, Any]] = {}\n")
    lines = [head + mark]
    earlier: dict[str, dict[str, Any]] = {}
    for arch, block in table.items():
        block = {name: shortest(x) if name in ROWS else x for name, x in block.items()}
        shared = {other: sum(x[name] == block[name] for name in ROWS) for other, x in earlier.items()}
        base = max(shared, key=shared.get, default=None)
        base = base if shared.get(base) else None
        lines.append(f'TABLE["{arch}"] = ' + (f'TABLE["{base}"] | {{' if base else "{"))
        for name, rows in block.items():
            first = next((other for other, x in earlier.items() if name in ROWS and x[name] == rows), None)
            inside = [f"{dim}: {_text(row)}" for dim, row in rows.items()] if name in ROWS else []
            if base and earlier[base][name] == rows:
                continue
            if first:
                lines.append(f'    "{name}": TABLE["{first}"]["{name}"],')
            elif len(inside) > 1:
                lines += [f'    "{name}": {{', *(f"        {row}," for row in inside), "    },"]
            else:
                lines.append(f'    "{name}": ' + (f"{{{inside[0]}}}," if inside else f"{json.dumps(rows)},"))
        lines.append("}")
        earlier[arch] = block
    return "\n".join([*lines, ""])


def shortest(rows: Mapping[int, Config]) -> dict[int, Config]:
    """The rows without those that the next larger D has too, in ascending order with 0, any D, at last."""
    dims = sorted(rows, key=lambda dim: dim or float("inf"))
    return {dim: rows[dim] for dim, after in zip(dims, [*dims[1:], None]) if rows[dim] != rows.get(after)}


def _text(row: Config) -> str:
    """The row as a constructor call: three sizes by position, then the fields that differ from their defaults."""
    fields = [(name, x) for name, x in row._asdict().items() if row._field_defaults.get(name) != x]
    values = [*(str(x) for _, x in fields[:3]), *(f"{name}={x}" for name, x in fields[3:])]
    return f"{type(row).__name__}({', '.join(values)})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="which to tune (all)")
    parser.add_argument("--out", type=Path, default=FILE, help="file to write (the table in place)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU that torch can use")
    arch = configs.arch(torch.device("cuda", torch.cuda.current_device()))
    gpu = torch.cuda.get_device_properties("cuda")
    reason = f"{', '.join(options.kernels)} measured on {gpu.name}, Triton {triton.__version__}; the rest is a guess"
    table = TABLE | {
        arch: TABLE[configs.family(arch)] | {"reason": reason, "programs": 2 * gpu.multi_processor_count}
    }
    for kernel, kind in itertools.product(options.kernels, DTYPES):
        for dim in DIMS[kind] if kernel in ("forward", "triangle", "backward") else (0,):
            if row := fastest(table, arch, kernel, kind, dim, candidates(kernel, kind, dim)):
                table = with_row(table, arch, kernel, kind, dim, row)
            options.out.write_text(render(table), encoding="utf-8")
    table |= {arch: table[arch] | {"triangle_from": triangle_from(table)}}
    options.out.write_text(render(table), encoding="utf-8")


if __name__ == "__main__":
    main()
