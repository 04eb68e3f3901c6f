"""csrc/cuda/sm90/pool_tiles.h: which slabs of h are in shared memory when, and how the backward's products are cut."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    built = tmp_path_factory.mktemp("pool_tiles") / "pool_tiles.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover"]
    source = ROOT / "tests" / "_pool_tiles.cpp"
    subprocess.run([*command, "-I", ROOT / "csrc" / "cuda", source, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.loaded.restype = library.released.restype = ctypes.c_bool
    return library


@pytest.mark.parametrize("passes", range(1, 6))
def test_slabs_are_where_they_are_looked_for(native, passes):
    """Plays the ring for two segments: loads go to places that were given up, uses find their slab, nothing is left."""
    ring = native.row_slabs()
    for slabs in range(1, 41):
        loads = [native.slab(slabs, p, i) for p in range(passes) for i in range(slabs) if native.loaded(p, i)]
        assert len(loads) == slabs + (passes - 1) * max(0, slabs - ring)
        queue, held, free = loads * 2, {}, [True] * ring
        for _segment, p in itertools.product(range(2), range(passes)):
            assert sorted(native.slab(slabs, p, i) for i in range(slabs)) == list(range(slabs))
            for i in range(slabs):
                while queue and free[queue[0] % ring]:  # as far ahead as the loading thread can be
                    slab = queue.pop(0)
                    free[slab % ring], held[slab % ring] = False, slab
                slab = native.slab(slabs, p, i)
                assert held.get(slab % ring) == slab
                if native.released(slabs, p, passes - 1, i):
                    free[slab % ring] = True
                    del held[slab % ring]
        assert not queue and not held


def test_shares_of_weights_cover_the_outputs(native):
    found = np.empty(4, np.int32)
    for v, u in itertools.product((False, True), repeat=2):
        for hidden, dim, slots, processors in itertools.product(
            (64, 128, 192, 512), (64, 256, 320, 2048), (1, 7, 256), (1, 132)
        ):
            native.shares(v, u, hidden, dim, ctypes.c_int64(slots), processors, ctypes.c_void_p(found.ctypes.data))
            first, units, blocks, splits = found.tolist()
            assert units == (v + u) * hidden and first == (0 if v else hidden)
            assert blocks == -(-units // 128) * -(-dim // 256)
            assert splits <= slots and (splits >= 1) == (blocks > 0)
            assert blocks * splits <= max(blocks, processors)
