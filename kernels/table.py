"""Tile sizes of the affinity and the pool: change them here, a row for each kernel, dtype and largest D.

A "guess" is chosen by what the compilers report (shared memory, registers, spills), never timed on a GPU. ``python -m
ercn.kernels.tune`` measures the rows of the GPU at hand and rewrites this file below the types. What several
architectures share is written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class ForwardConfig(NamedTuple):
    """Affinity forward: a program owns row_tiles tiles of block_m pixels and meets block_n columns a step.

    resident: the features of its rows stay on chip; else they are read again for every step, block_d channels a time.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    row_tiles: int = 1
    resident: bool = True

    @property
    def group(self) -> int:
        return self.row_tiles * self.block_m


class BackwardConfig(NamedTuple):
    """Affinity backward: a program owns block_m pixels and meets block_n columns a step.

    chunks: blocks of block_d channels of grad_feat that it sums; 0 for all of D, with the features on chip.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    chunks: int = 0


class PoolConfig(NamedTuple):
    """Projections of the pool: block_m instances, block_l hidden units, block_d channels a step."""

    block_m: int
    block_l: int
    block_d: int
    num_warps: int
    num_stages: int


class GemmConfig(NamedTuple):
    """Products of the pool's backward: block_m × block_n outputs, block_k a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# programs: about how many a launch should have, two for each multiprocessor. triangle_from: the least D and the fewest
# pixels of the affinity's triangle. Rows: by the largest D that they serve, 0 for any; "half" is bfloat16 and float16.
TABLE: dict[str, dict[str, Any]] = {}

TABLE["interpreter"] = {
    "reason": "small, so that tests reach several tiles, slabs and the triangle",
    "programs": 6,
    "triangle_from": {"dim": 9, "pixels": 120},
    "forward half": {
        64: ForwardConfig(32, 64, 32, num_warps=4, num_stages=1),
        0: ForwardConfig(32, 32, 32, num_warps=4, num_stages=1, resident=False),
    },
    "forward float32": {
        64: ForwardConfig(32, 32, 16, num_warps=4, num_stages=1),
        0: ForwardConfig(32, 32, 32, num_warps=4, num_stages=1, resident=False),
    },
    "triangle half": {
        64: ForwardConfig(32, 32, 32, num_warps=4, num_stages=1),
        0: ForwardConfig(32, 32, 64, num_warps=4, num_stages=1, resident=False),
    },
    "triangle float32": {
        64: ForwardConfig(16, 32, 16, num_warps=4, num_stages=1, row_tiles=2),
        0: ForwardConfig(32, 32, 64, num_warps=4, num_stages=1, resident=False),
    },
    "backward half": {
        64: BackwardConfig(32, 32, 32, num_warps=4, num_stages=1),
        0: BackwardConfig(32, 32, 64, num_warps=4, num_stages=1, chunks=2),
    },
    "backward float32": {
        64: BackwardConfig(32, 64, 16, num_warps=4, num_stages=1),
        0: BackwardConfig(32, 32, 64, num_warps=4, num_stages=1, chunks=2),
    },
    "pool half": {0: PoolConfig(32, 32, 32, num_warps=4, num_stages=1)},
    "pool float32": {0: PoolConfig(32, 32, 16, num_warps=4, num_stages=1)},
    "row_grad half": {0: GemmConfig(32, 32, 32, num_warps=4, num_stages=1)},
    "row_grad float32": {0: GemmConfig(16, 32, 32, num_warps=4, num_stages=1)},
    "weight_grad half": {0: GemmConfig(32, 32, 32, num_warps=4, num_stages=1)},
    "weight_grad float32": {0: GemmConfig(32, 32, 32, num_warps=4, num_stages=1)},
}
TABLE["sm_80"] = {
    "reason": "guess",
    "programs": 216,
    "triangle_from": {"dim": 160, "pixels": 8192},
    "forward half": {
        128: ForwardConfig(128, 128, 64, num_warps=8, num_stages=2),
        256: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        0: ForwardConfig(128, 128, 64, num_warps=8, num_stages=3, resident=False),
    },
    "forward float32": {
        64: ForwardConfig(64, 32, 64, num_warps=4, num_stages=2),
        0: ForwardConfig(64, 32, 32, num_warps=4, num_stages=2, resident=False),
    },
    "triangle half": {
        64: ForwardConfig(64, 32, 64, num_warps=4, num_stages=2),
        128: ForwardConfig(128, 32, 64, num_warps=8, num_stages=2),
        192: ForwardConfig(64, 64, 64, num_warps=4, num_stages=2),
        256: ForwardConfig(64, 32, 64, num_warps=4, num_stages=2),
        0: ForwardConfig(128, 32, 64, num_warps=8, num_stages=3, resident=False),
    },
    "triangle float32": {0: ForwardConfig(32, 32, 32, num_warps=4, num_stages=2, resident=False)},
    "backward half": {
        64: BackwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        128: BackwardConfig(64, 32, 64, num_warps=4, num_stages=2),
        256: BackwardConfig(32, 32, 64, num_warps=4, num_stages=2),
        0: BackwardConfig(32, 32, 64, num_warps=4, num_stages=2, chunks=4),
    },
    "backward float32": {
        64: BackwardConfig(64, 16, 64, num_warps=8, num_stages=2),
        0: BackwardConfig(64, 16, 32, num_warps=8, num_stages=2, chunks=2),
    },
    "pool half": {0: PoolConfig(128, 64, 32, num_warps=8, num_stages=4)},
    "pool float32": {0: PoolConfig(64, 32, 32, num_warps=8, num_stages=2)},
    "row_grad half": {0: GemmConfig(128, 128, 32, num_warps=8, num_stages=3)},
    "row_grad float32": {0: GemmConfig(64, 64, 32, num_warps=4, num_stages=3)},
    "weight_grad half": {0: GemmConfig(128, 128, 32, num_warps=8, num_stages=3)},
    "weight_grad float32": {0: GemmConfig(64, 64, 32, num_warps=4, num_stages=3)},
}
TABLE["sm_86"] = TABLE["sm_80"] | {
    "programs": 168,
    "forward half": {
        128: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        256: ForwardConfig(64, 32, 64, num_warps=4, num_stages=2),
        0: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3, resident=False),
    },
    "triangle half": {
        192: ForwardConfig(64, 32, 64, num_warps=4, num_stages=2),
        256: ForwardConfig(32, 32, 64, num_warps=4, num_stages=2),
        0: ForwardConfig(128, 32, 64, num_warps=8, num_stages=2, resident=False),
    },
    "pool half": {0: PoolConfig(128, 32, 64, num_warps=8, num_stages=2)},
}
TABLE["sm_90"] = {
    "reason": "guess",
    "programs": 264,
    "triangle_from": {"dim": 160, "pixels": 8192},
    "forward half": {
        128: ForwardConfig(128, 128, 64, num_warps=8, num_stages=3),
        256: ForwardConfig(128, 128, 64, num_warps=8, num_stages=2),
        0: ForwardConfig(128, 128, 64, num_warps=8, num_stages=3, resident=False),
    },
    "forward float32": {
        64: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3),
        128: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        0: ForwardConfig(64, 32, 32, num_warps=4, num_stages=2, resident=False),
    },
    "triangle half": {
        64: ForwardConfig(128, 128, 64, num_warps=8, num_stages=3),
        128: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        192: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3),
        256: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        0: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3, resident=False),
    },
    "triangle float32": {
        64: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3),
        128: ForwardConfig(64, 32, 32, num_warps=4, num_stages=2),
        0: ForwardConfig(64, 32, 32, num_warps=4, num_stages=2, resident=False),
    },
    "backward half": {
        192: BackwardConfig(128, 64, 64, num_warps=8, num_stages=3),
        256: BackwardConfig(64, 64, 64, num_warps=8, num_stages=3),
        0: BackwardConfig(128, 64, 64, num_warps=8, num_stages=3, chunks=2),
    },
    "backward float32": {
        64: BackwardConfig(128, 32, 64, num_warps=8, num_stages=2),
        0: BackwardConfig(128, 32, 32, num_warps=8, num_stages=2, chunks=4),
    },
    "pool half": {0: PoolConfig(128, 64, 64, num_warps=8, num_stages=3)},
    "pool float32": {0: PoolConfig(128, 32, 32, num_warps=8, num_stages=3)},
    "row_grad half": {0: GemmConfig(128, 128, 64, num_warps=8, num_stages=3)},
    "row_grad float32": {0: GemmConfig(128, 128, 32, num_warps=8, num_stages=3)},
    "weight_grad half": {0: GemmConfig(128, 128, 64, num_warps=8, num_stages=3)},
    "weight_grad float32": {0: GemmConfig(128, 128, 32, num_warps=8, num_stages=3)},
}
TABLE["sm_100"] = TABLE["sm_90"] | {
    "programs": 296,
    "forward half": {
        128: ForwardConfig(128, 128, 64, num_warps=8, num_stages=3),
        256: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        0: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3, resident=False),
    },
    "forward float32": {
        64: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3),
        128: ForwardConfig(64, 32, 32, num_warps=4, num_stages=2),
        0: ForwardConfig(128, 32, 64, num_warps=8, num_stages=3, resident=False),
    },
    "triangle half": {
        128: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        192: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3),
        256: ForwardConfig(128, 64, 64, num_warps=8, num_stages=2),
        0: ForwardConfig(128, 64, 64, num_warps=8, num_stages=3, resident=False),
    },
    "triangle float32": TABLE["sm_80"]["triangle float32"],
    "backward half": {
        64: BackwardConfig(128, 32, 64, num_warps=8, num_stages=3),
        192: BackwardConfig(128, 32, 64, num_warps=8, num_stages=3, chunks=2),
        256: BackwardConfig(64, 32, 64, num_warps=4, num_stages=2),
        0: BackwardConfig(64, 64, 64, num_warps=4, num_stages=3, chunks=4),
    },
    "backward float32": {
        64: BackwardConfig(64, 32, 64, num_warps=8, num_stages=2),
        0: BackwardConfig(128, 32, 32, num_warps=8, num_stages=2, chunks=4),
    },
}
TABLE["gfx942"] = {
    "reason": "guess",
    "programs": 608,
    "triangle_from": {"dim": 160, "pixels": 8192},
    "forward half": {
        64: ForwardConfig(128, 64, 64, num_warps=8, num_stages=1),
        256: ForwardConfig(64, 32, 64, num_warps=4, num_stages=1),
        0: ForwardConfig(128, 64, 64, num_warps=8, num_stages=1, resident=False),
    },
    "forward float32": {
        64: ForwardConfig(64, 32, 64, num_warps=4, num_stages=1),
        128: ForwardConfig(32, 32, 32, num_warps=4, num_stages=1),
        0: ForwardConfig(64, 64, 32, num_warps=4, num_stages=1, resident=False),
    },
    "triangle half": {
        192: ForwardConfig(64, 32, 64, num_warps=4, num_stages=1),
        256: ForwardConfig(32, 32, 64, num_warps=4, num_stages=1),
        0: ForwardConfig(64, 32, 64, num_warps=4, num_stages=1, resident=False),
    },
    "triangle float32": {
        64: ForwardConfig(64, 32, 64, num_warps=4, num_stages=1),
        128: ForwardConfig(32, 32, 32, num_warps=4, num_stages=1),
        0: ForwardConfig(64, 64, 32, num_warps=4, num_stages=1, resident=False),
    },
    "backward half": {
        128: BackwardConfig(64, 32, 64, num_warps=4, num_stages=1),
        256: BackwardConfig(32, 32, 64, num_warps=4, num_stages=1),
        0: BackwardConfig(64, 32, 64, num_warps=4, num_stages=1, chunks=4),
    },
    "backward float32": {
        64: BackwardConfig(32, 32, 64, num_warps=4, num_stages=1),
        128: BackwardConfig(32, 16, 32, num_warps=4, num_stages=1),
        0: BackwardConfig(32, 32, 64, num_warps=4, num_stages=1, chunks=2),
    },
    "pool half": {0: PoolConfig(128, 64, 64, num_warps=8, num_stages=2)},
    "pool float32": {0: PoolConfig(128, 64, 32, num_warps=8, num_stages=2)},
    "row_grad half": {0: GemmConfig(128, 128, 32, num_warps=8, num_stages=2)},
    "row_grad float32": {0: GemmConfig(128, 64, 32, num_warps=8, num_stages=2)},
    "weight_grad half": {0: GemmConfig(128, 128, 32, num_warps=8, num_stages=2)},
    "weight_grad float32": {0: GemmConfig(128, 64, 32, num_warps=8, num_stages=2)},
}
