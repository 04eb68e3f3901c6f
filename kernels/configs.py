"""Which tile sizes, how many programs, dense or triangle: pure functions of shape, dtype and architecture.

The numbers themselves are in ``table.py``, written by ``python -m ercn.kernels.tune``. Nothing here looks at a clock:
the same call takes the same path in every process. Plans are kept, at most ``KEPT`` of each kind, by all that they
depend on, the row of the table included: one that the tuning tool changes makes another plan.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton import next_power_of_2

from ercn.kernels.table import TABLE

# Bytes of partial sums that one launch of the triangle may leave for its combine.
MIRRORED_BYTES = 96 << 20
# Bytes of activation gradients that the pool's backward holds at a time; they should stay in the L2 cache.
WORKSPACE_BYTES = 16 << 20
MAX_BLOCK_C = 32
KEPT = 256

kept = functools.lru_cache(maxsize=KEPT)


def cdiv(x: int, y: int) -> int:
    """x / y rounded up; Triton's own is for kernels too, and slow on the host."""
    return -(-x // y)


@dataclass(frozen=True)
class Launch:
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ForwardConfig(Launch):
    """Affinity forward: a program owns row_tiles tiles of block_m pixels and meets block_n columns a step.

    resident: the features of its rows stay on chip; else they are read again for every step, block_d channels a time.
    """

    block_m: int
    block_n: int
    block_d: int
    row_tiles: int
    resident: bool

    @property
    def group(self) -> int:
        return self.row_tiles * self.block_m


@dataclass(frozen=True)
class BackwardConfig(Launch):
    """Affinity backward: a program owns block_m pixels.

    chunks: blocks of block_d channels of grad_feat that it sums; 0 for all of D, with the features on chip.
    """

    block_m: int
    block_n: int
    block_d: int
    chunks: int


@dataclass(frozen=True)
class PoolConfig(Launch):
    """Projections of the pool: block_m instances, block_l hidden units, block_d channels a step."""

    block_m: int
    block_l: int
    block_d: int


@dataclass(frozen=True)
class GemmConfig(Launch):
    """Products of the pool's backward: block_m × block_n outputs, block_k a step."""

    block_m: int
    block_n: int
    block_k: int


@dataclass(frozen=True)
class Precision:
    """How products are formed for inputs of one dtype.

    full: float32 accuracy throughout, so nothing is split. dot: Triton's input_precision for float32 factors.
    a_terms: bfloat16 terms of the affinity where it meets value. product_dtype: of a computed factor (W, or a
    gradient of the pool's branches) that meets an input.
    """

    full: bool
    dot: str
    a_terms: int
    product_dtype: torch.dtype

    @property
    def terms_dtype(self) -> torch.dtype:
        return torch.float32 if self.full else torch.bfloat16


def precision(dtype: torch.dtype, arch: str) -> Precision:
    """float32 follows ``torch.get_float32_matmul_precision()``; float16's range is too small for gradients."""
    return _precision(dtype, arch, torch.get_float32_matmul_precision() == "highest")


@kept
def _precision(dtype: torch.dtype, arch: str, highest: bool) -> Precision:
    if dtype == torch.bfloat16:
        return Precision(False, "ieee", 1, torch.bfloat16)
    full = dtype == torch.float32 and highest
    fast = "ieee" if arch.startswith("gfx") and arch != "gfx942" else "tf32"  # AMD has TF32 in CDNA 3 alone
    return Precision(full, exact(arch) if full else fast, 2, torch.float32)


def exact(arch: str) -> str:
    """Triton's input_precision that keeps float32: three TF32 products on NVIDIA's tensor cores."""
    return "ieee" if arch.startswith("gfx") else "tf32x3"


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


def family(arch: str) -> str:
    """The architecture whose rows of the table serve ``arch``: itself, or the newest that is not newer."""
    arch = _FAMILY.get(arch, arch)
    if arch in TABLE:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    return max((known for known in TABLE if known.startswith("sm_") and _number(known) <= _number(arch)), key=_number)


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def rows(arch: str, kernel: str, dtype: torch.dtype) -> dict[int, tuple[int, ...]]:
    """Fields of one kernel's configs, by the largest D that each serves; 0 serves any."""
    return TABLE[family(arch)][kernel]["float32" if dtype == torch.float32 else "half"]


def row(arch: str, kernel: str, dtype: torch.dtype, dim: int) -> tuple[int, ...]:
    known = rows(arch, kernel, dtype)
    least = 0
    for limit in known:
        if limit >= dim and not 0 < least <= limit:
            least = limit
    return known[least]


@kept
def channel_block(channels: int) -> int:
    """Channels of value in one product: a power of two that tensor cores take."""
    return min(MAX_BLOCK_C, max(16, next_power_of_2(channels)))


@dataclass(frozen=True)
class ForwardPlan:
    """slabs of ``slab`` columns each. band: groups of rows per launch of the triangle, 0 for dense tiles."""

    config: ForwardConfig
    slabs: int
    slab: int
    band: int


@dataclass(frozen=True)
class BackwardPlan:
    config: BackwardConfig
    slabs: int
    slab: int


def use_triangle(dim: int, n: int, arch: str) -> bool:
    """Half the products of depth D against partial sums that travel: for deep features and many pixels.

    The thresholds come from counts (docs/triton.md) until a GPU has measured them.
    """
    least = TABLE[family(arch)]["triangle_from"]
    return dim >= least["dim"] and n >= least["pixels"]


def slabs(n: int, step: int, programs: int, wanted: int) -> tuple[int, int]:
    """Cut n columns in slabs of a multiple of ``step`` so that ``programs`` rows of work become about ``wanted``."""
    count = min(max(1, cdiv(wanted, programs)), cdiv(n, step))
    slab = cdiv(cdiv(n, count), step) * step
    return cdiv(n, slab), slab


def forward_plan(batch: int, channels: int, dim: int, n: int, dtype: torch.dtype, arch: str) -> ForwardPlan:
    triangle = use_triangle(dim, n, arch)
    fields = row(arch, "triangle" if triangle else "forward", dtype, dim)
    return _forward_plan(batch, channels, n, triangle, fields, TABLE[family(arch)]["programs"], MIRRORED_BYTES)


@kept
def _forward_plan(
    batch: int, channels: int, n: int, triangle: bool, fields: tuple[int, ...], wanted: int, mirrored_bytes: int
) -> ForwardPlan:
    config = ForwardConfig(*fields)
    groups, blocks_c = cdiv(n, config.group), cdiv(channels, channel_block(channels))
    if not triangle:
        return ForwardPlan(config, *slabs(n, config.block_n, batch * groups * blocks_c, wanted), band=0)
    band = min(groups, max(1, mirrored_bytes // (4 * batch * channels * n)))
    # Half of a launch's programs lie below the diagonal, and those on it are shorter.
    return ForwardPlan(config, *slabs(n, config.group, batch * band * blocks_c, 4 * wanted), band)


def backward_plan(batch: int, dim: int, n: int, dtype: torch.dtype, arch: str) -> BackwardPlan:
    return _backward_plan(batch, n, row(arch, "backward", dtype, dim), TABLE[family(arch)]["programs"])


@kept
def _backward_plan(batch: int, n: int, fields: tuple[int, ...], wanted: int) -> BackwardPlan:
    config = BackwardConfig(*fields)
    return BackwardPlan(config, *slabs(n, config.block_n, batch * cdiv(n, config.block_m), wanted))


@dataclass(frozen=True)
class WeightGradPlan:
    """splits of ``step`` rows each."""

    config: GemmConfig
    splits: int
    step: int


def pool_config(dim: int, dtype: torch.dtype, arch: str) -> PoolConfig:
    return _config(PoolConfig, row(arch, "pool", dtype, dim))


def gemm_config(kernel: str, dtype: torch.dtype, arch: str) -> GemmConfig:
    return _config(GemmConfig, row(arch, kernel, dtype, 0))


@kept
def _config(kind: type[Launch], fields: tuple[int, ...]) -> Launch:
    return kind(*fields)


def workspace_tiles(block_m: int, width: int, dtype: torch.dtype) -> int:
    """Tiles of rows whose activation gradients the workspace holds."""
    return max(1, WORKSPACE_BYTES // (block_m * max(width, 1) * dtype.itemsize))


def weight_grad_plan(units: int, dim: int, rows: int, dtype: torch.dtype, arch: str) -> WeightGradPlan:
    return _weight_grad_plan(
        units, dim, rows, gemm_config("weight_grad", dtype, arch), TABLE[family(arch)]["programs"]
    )


@kept
def _weight_grad_plan(units: int, dim: int, rows: int, config: GemmConfig, wanted: int) -> WeightGradPlan:
    programs = max(1, cdiv(units, config.block_m) * cdiv(dim, config.block_n))
    return WeightGradPlan(config, *slabs(max(rows, 1), config.block_k, programs, wanted))
