"""Arithmetic of the pool's CUDA kernels, on the host: stages of the slabs of h, tiles and splits of the backward's
products, the order of columns, and the random words of dropout."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from _pool import philox

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    built = tmp_path_factory.mktemp("pool_tiles") / "pool_tiles.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover"]
    source = ROOT / "tests" / "cuda" / "_pool_tiles.cpp"
    subprocess.run([*command, "-I", ROOT / "csrc" / "cuda", source, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.loaded.restype = library.released.restype = library.dropped.restype = ctypes.c_bool
    return library


@pytest.mark.parametrize("passes", range(1, 6))
def test_slabs_are_in_their_stages(native, passes):
    """Two segments through the ring: loads go to released stages, uses find their slab, and none is left."""
    ring = native.row_slabs()
    for slabs in range(1, 41):
        loads = [native.slab(slabs, p, i) for p in range(passes) for i in range(slabs) if native.loaded(p, i)]
        assert len(loads) == slabs + (passes - 1) * max(0, slabs - ring)
        queue, held, free = loads * 2, {}, [True] * ring
        for _segment, p in itertools.product(range(2), range(passes)):
            assert sorted(native.slab(slabs, p, i) for i in range(slabs)) == list(range(slabs))
            for i in range(slabs):
                while queue and free[queue[0] % ring]:  # as far ahead as the producer can be
                    slab = queue.pop(0)
                    free[slab % ring], held[slab % ring] = False, slab
                slab = native.slab(slabs, p, i)
                assert held.get(slab % ring) == slab
                if native.released(slabs, p, passes - 1, i):
                    free[slab % ring] = True
                    del held[slab % ring]
        assert not queue and not held


def test_tiles_and_splits_cover_the_outputs(native):
    found = np.empty(4, np.int32)
    for v, u in itertools.product((False, True), repeat=2):
        for hidden, dim, slots, processors in itertools.product(
            (64, 128, 192, 512), (64, 256, 320, 2048), (1, 7, 256), (1, 132)
        ):
            native.tiling(v, u, hidden, dim, ctypes.c_int64(slots), processors, ctypes.c_void_p(found.ctypes.data))
            first, units, tiles, splits = found.tolist()
            assert units == (v + u) * hidden and first == (0 if v else hidden)
            assert tiles == -(-units // 128) * -(-dim // 256)
            assert splits <= slots and (splits >= 1) == (tiles > 0)
            assert tiles * splits <= max(tiles, processors)


def test_every_unit_has_a_column_in_each_branch(native):
    found = np.empty(2, np.int32)
    for hidden, gated in itertools.product((1, 64, 65, 130), (False, True)):
        columns = []
        for column in range(native.columns(hidden, gated)):
            native.column(hidden, gated, column, ctypes.c_void_p(found.ctypes.data))
            columns.append(tuple(found.tolist()))
        units = len(columns) // (2 if gated else 1)
        assert units >= hidden and sorted(columns) == list(itertools.product(range(1 + gated), range(units)))
        # An accumulator tile of 64 columns has four of 8 units of V, and beside them the same units of U.
        for tile in (columns[i : i + 64] for i in range(0, len(columns) * gated, 64)):
            v, u = tile[:32], tile[32:]
            assert [unit for _, unit in v] == [unit for _, unit in u] and {branch for branch, _ in v} == {0}


def test_random_words_are_philox(native):
    generator = np.random.default_rng(0)
    found = np.empty(4, np.uint32)
    for seed, instance in generator.integers(0, 2**64, (20, 2), np.uint64).tolist() + [[0, 0], [2**64 - 1, 2**32]]:
        for unit in (0, 5, 16, 63, 64, 200):
            native.words(
                ctypes.c_uint64(seed), ctypes.c_uint64(instance), unit, ctypes.c_void_p(found.ctypes.data)
            )
            counter = instance % 2**32, instance >> 32, unit // 64 * 16 + unit % 16, 0
            key = seed % 2**32, seed >> 32
            assert found.tolist() == philox(np.array(counter), np.array(key)).tolist()
            assert native.word(unit) == unit // 16 % 4


def test_a_branch_is_dropped_where_its_bits_are_below_the_threshold(native):
    edges = (0, 1, 32767, 32768, 65535)
    for threshold, low, high in itertools.product((1, 32768, 65535, 65536), edges, edges):
        limit = ctypes.c_uint32((threshold << 16) - 1)
        word = ctypes.c_uint32(high << 16 | low)
        assert native.dropped(False, word, limit) == (low < threshold)
        assert native.dropped(True, word, limit) == (low < threshold or high < threshold)
