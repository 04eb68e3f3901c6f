"""Which tile sizes, how many programs, dense or triangle: pure functions of shape, dtype and architecture.

The sizes are in ``table.py``, which nothing changes in place. Nothing here looks at a clock: the same call takes the
same path in every process. Plans by the shipped table are kept, at most ``KEPT`` of each kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

from ercn.kernels.table import TABLE, BackwardConfig, ForwardConfig, GemmConfig, PoolConfig

# Bytes of partial sums that one launch of the triangle may leave for its combine.
MIRRORED_BYTES = 96 << 20
# Bytes of activation gradients that the pool's backward holds at a time; they should stay in the L2 cache.
WORKSPACE_BYTES = 16 << 20
MAX_BLOCK_C = 32
KEPT = 256

Table = Mapping[str, Mapping[str, Any]]
Config = ForwardConfig | BackwardConfig | PoolConfig | GemmConfig
kept = functools.lru_cache(maxsize=KEPT)


def cdiv(x: int, y: int) -> int:
    """x / y rounded up; Triton's own is for kernels too, and slow on the host."""
    return -(-x // y)


class Precision(NamedTuple):
    """How products are formed for inputs of one dtype.

    dot: Triton's input_precision for float32 factors; exact: the one that keeps float32. terms: bfloat16 terms of a
    computed factor. full: float32 accuracy in the affinity, so nothing is split; full_heads: in the products of the
    pool's heads and attention.
    """

    dot: str
    exact: str
    terms: int
    full: bool
    full_heads: bool

    @property
    def terms_dtype(self) -> torch.dtype:
        """Of the affinity's value and gradient maps as the kernels read them."""
        return torch.float32 if self.full else torch.bfloat16

    @property
    def product_dtype(self) -> torch.dtype:
        """Of a computed factor (W, or a gradient of the pool's branches) that meets an input."""
        return torch.bfloat16 if self.terms == 1 else torch.float32


def precision(dtype: torch.dtype, arch: str) -> Precision:
    """float32 follows ``torch.get_float32_matmul_precision()``; float16's range is too small for gradients."""
    return _precision(dtype, arch, torch.get_float32_matmul_precision() == "highest")


@kept
def _precision(dtype: torch.dtype, arch: str, highest: bool) -> Precision:
    amd, single = arch.startswith("gfx"), dtype == torch.float32
    exact = "ieee" if amd else "tf32x3"  # three TF32 products on NVIDIA's tensor cores
    if dtype == torch.bfloat16:
        return Precision("ieee", exact, terms=1, full=False, full_heads=False)
    full = single and highest
    fast = "ieee" if amd and arch != "gfx942" else "tf32"  # AMD has TF32 in CDNA 3 alone
    return Precision(exact if full else fast, exact, terms=2, full=full, full_heads=single)


def arch(device: torch.device) -> str:
    """Name of the device's architecture: sm_90, gfx942; "interpreter" on the CPU."""
    return "interpreter" if device.type == "cpu" else _gpu_arch(device.index)


@functools.cache
def _gpu_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# Consumer Blackwell has the shared memory of consumer Ampere and Ada, Orin that of A100.
_FAMILY = {"sm_87": "sm_80", "sm_120": "sm_86", "sm_121": "sm_86"}


def family(arch: str, table: Table = TABLE) -> str:
    """The architecture whose rows of the table serve ``arch``: itself, or the newest that is not newer."""
    arch = _FAMILY.get(arch, arch)
    if arch in table:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    return max((known for known in table if known.startswith("sm_") and _number(known) <= _number(arch)), key=_number)


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def rows(arch: str, kernel: str, dtype: torch.dtype, table: Table = TABLE) -> Mapping[int, Config]:
    """Configs of one kernel, by the largest D that each serves; 0 serves any."""
    return table[family(arch, table)][kernel + (" float32" if dtype == torch.float32 else " half")]


def row(arch: str, kernel: str, dtype: torch.dtype, dim: int, table: Table = TABLE) -> Config:
    known = rows(arch, kernel, dtype, table)
    least = 0
    for limit in known:
        if limit >= dim and not 0 < least <= limit:
            least = limit
    return known[least]


@kept
def channel_block(channels: int) -> int:
    """Channels of value in one product: a power of two that tensor cores take."""
    return min(MAX_BLOCK_C, max(16, next_power_of_2(channels)))


class ForwardPlan(NamedTuple):
    """slabs of ``slab`` columns each. band: groups of rows per launch of the triangle, 0 for dense tiles."""

    config: ForwardConfig
    slabs: int
    slab: int
    band: int


class BackwardPlan(NamedTuple):
    config: BackwardConfig
    slabs: int
    slab: int


class PoolPlan(NamedTuple):
    """Tiles of the pool's kernels. programs: how many a launch over the weights' gradients should have."""

    precision: Precision
    forward: PoolConfig
    backward: PoolConfig
    row_grad: GemmConfig
    weight_grad: GemmConfig
    programs: int


def use_triangle(dim: int, n: int, arch: str, table: Table = TABLE) -> bool:
    """Half the products of depth D against partial sums that travel: for deep features and many pixels.

    The thresholds come from counts (docs/triton.md) until a GPU has measured them.
    """
    least = table[family(arch, table)]["triangle_from"]
    return dim >= least["dim"] and n >= least["pixels"]


@kept
def slabs(n: int, step: int, programs: int, wanted: int) -> tuple[int, int]:
    """Cut n columns in slabs of a multiple of ``step`` so that ``programs`` rows of work become about ``wanted``."""
    count = min(max(1, cdiv(wanted, programs)), cdiv(n, step))
    slab = cdiv(cdiv(n, count), step) * step
    return cdiv(n, slab), slab


def _plan(build: Callable, table: Table, *key):
    """A plan by the shipped table is kept."""
    return build(*key) if table is TABLE else build.__wrapped__(*key, table)


def forward_plan(
    batch: int, channels: int, dim: int, n: int, dtype: torch.dtype, arch: str, table: Table = TABLE,
    triangle: bool | None = None,
) -> ForwardPlan:  # fmt: skip
    """triangle: None for what the table says."""
    return _plan(_forward_plan, table, batch, channels, dim, n, dtype, arch, triangle, MIRRORED_BYTES)


@kept
def _forward_plan(
    batch: int, channels: int, dim: int, n: int, dtype: torch.dtype, arch: str, triangle: bool | None,
    mirrored_bytes: int, table: Table = TABLE,
) -> ForwardPlan:  # fmt: skip
    triangle = use_triangle(dim, n, arch, table) if triangle is None else triangle
    config = row(arch, "triangle" if triangle else "forward", dtype, dim, table)
    wanted = table[family(arch, table)]["programs"]
    groups, blocks_c = cdiv(n, config.group), cdiv(channels, channel_block(channels))
    if not triangle:
        return ForwardPlan(config, *slabs(n, config.block_n, batch * groups * blocks_c, wanted), band=0)
    band = min(groups, max(1, mirrored_bytes // (4 * batch * channels * n)))
    # Half of a launch's programs lie below the diagonal, and those on it are shorter.
    return ForwardPlan(config, *slabs(n, config.group, batch * band * blocks_c, 4 * wanted), band)


def backward_plan(batch: int, dim: int, n: int, dtype: torch.dtype, arch: str, table: Table = TABLE) -> BackwardPlan:
    """dtype: of the products, ``Precision.product_dtype``."""
    return _plan(_backward_plan, table, batch, dim, n, dtype, arch)


@kept
def _backward_plan(
    batch: int, dim: int, n: int, dtype: torch.dtype, arch: str, table: Table = TABLE
) -> BackwardPlan:  # fmt: skip
    config = row(arch, "backward", dtype, dim, table)
    wanted = table[family(arch, table)]["programs"]
    return BackwardPlan(config, *slabs(n, config.block_n, batch * cdiv(n, config.block_m), wanted))


def pool_plan(dim: int, dtype: torch.dtype, arch: str, table: Table = TABLE) -> PoolPlan:
    """dtype: what h's and the weights' promote to."""
    return _plan(_pool_plan, table, dim, dtype, arch, precision(dtype, arch))


@kept
def _pool_plan(dim: int, dtype: torch.dtype, arch: str, form: Precision, table: Table = TABLE) -> PoolPlan:
    return PoolPlan(
        form,
        forward=row(arch, "pool", dtype, dim, table),
        backward=row(arch, "pool", form.product_dtype, dim, table),
        row_grad=row(arch, "row_grad", dtype, dim, table),
        weight_grad=row(arch, "weight_grad", dtype, dim, table),
        programs=table[family(arch, table)]["programs"],
    )


def weight_grad_splits(plan: PoolPlan, units: int, dim: int, rows: int) -> tuple[int, int]:
    """How many splits of how many rows each the gradients of ``units`` rows of weights are summed in."""
    config = plan.weight_grad
    programs = max(1, cdiv(units, config.block_m) * cdiv(dim, config.block_n))
    return slabs(max(rows, 1), config.block_k, programs, plan.programs)


def workspace_tiles(block_m: int, width: int, dtype: torch.dtype) -> int:
    """Tiles of rows whose activation gradients the workspace holds."""
    return max(1, WORKSPACE_BYTES // (block_m * max(width, 1) * dtype.itemsize))
