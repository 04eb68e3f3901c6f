"""csrc/cuda/pool/segments.h: segments of bags, the slots of their partial sums, splits of sums."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
SEGMENT_ROWS = 64


class Bags(ctypes.Structure):
    _fields_ = [("cu_seqlens", ctypes.c_void_p), ("wide", ctypes.c_bool)]
    _fields_ += [(name, ctypes.c_int64) for name in ("count", "n", "rows")]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    built = tmp_path_factory.mktemp("segments") / "segments.so"
    source = ROOT / "tests" / "cuda" / "_segments.cpp"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run([*command, "-I", ROOT / "csrc" / "cuda", source, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    for name in ("slots", "score", "row", "chunk"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def dense(count, n):
    return Bags(None, False, count, n, count * n), None


def ragged(lengths, dtype=np.int32):
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(dtype)
    return Bags(bounds.ctypes.data, dtype == np.int64, len(lengths), 0, int(bounds[-1])), bounds


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def segments(native, bags, first=0, last=None):
    last = native.slots(bags) if last is None else last
    found = np.empty((last - first, 4), np.int64)
    native.segments(bags, ctypes.c_int64(first), ctypes.c_int64(last), pointer(found))
    return found


def slots_of_bags(native, bags):
    found = np.empty((bags.count, 2), np.int64)
    native.slots_of_bags(bags, pointer(found))
    return found


def check(native, bags, lengths):
    """Every row lies in one segment of its own bag; a bag's slots are those that combine adds, and in order."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    found, of_bags = segments(native, bags), slots_of_bags(native, bags)
    held = np.zeros(len(found), bool)
    for bag, (first, count) in enumerate(of_bags):
        assert count == -(-lengths[bag] // SEGMENT_ROWS) and first >= 0 and first + count <= len(found)
        assert not held[first : first + count].any(), "a slot of two bags"
        held[first : first + count] = True
        own, in_bag = found[first : first + count], SEGMENT_ROWS * np.arange(count)
        assert (own[:, 0] == bag).all() and (own[:, 2] == in_bag).all() and (own[:, 1] == starts[bag] + in_bag).all()
        assert (own[:, 3] == np.minimum(SEGMENT_ROWS, lengths[bag] - in_bag)).all()
    assert (found[~held, 3] == 0).all(), "a segment that no bag adds"
    assert (~held).sum() <= (len(lengths) if bags.cu_seqlens else 0)


LENGTHS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 200]


def test_dense_bags_exhaustively(native):
    for count, n in itertools.product(range(5), [*LENGTHS, 784, 3136]):
        check(native, dense(count, n)[0], [n] * count)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ragged_bags_exhaustively(native, dtype):
    for count in range(5):
        for lengths in itertools.product(LENGTHS[:: 1 if count < 4 else 2], repeat=count):
            bags, _keep = ragged(lengths, dtype)
            check(native, bags, lengths)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.one_of(st.integers(0, 130), st.integers(0, 5000)), max_size=70))
def test_ragged_bags_property(native, lengths):
    bags, _keep = ragged(lengths)
    check(native, bags, lengths)


def test_rows_beyond_int32(native):
    lengths = [3 << 31, 1, (1 << 31) + 5]
    bags, _keep = ragged(lengths, np.int64)
    of_bags = slots_of_bags(native, bags)
    assert of_bags[:, 1].tolist() == [-(-n // 64) for n in lengths]
    assert (of_bags[1:, 0] >= of_bags[:-1].sum(axis=1)).all() and of_bags[-1].sum() <= native.slots(bags)
    first = int(of_bags[2, 0])
    assert segments(native, bags, first, first + 1).tolist() == [[2, (3 << 31) + 1, 0, 64]]
    last = first + int(of_bags[2, 1]) - 1
    assert segments(native, bags, last, last + 1)[0, 3] == 5
    offsets = native.score(bags, ctypes.c_int64(first), ctypes.c_int64(1), ctypes.c_int64(2))
    assert offsets == sum(lengths) + lengths[0] + 1
    assert native.row(bags, ctypes.c_int64(first), ctypes.c_int64(0), ctypes.c_int64(1024)) == 1024 * ((3 << 31) + 1)
    bags, _ = dense(3, 1 << 31)
    slot = 2 * (1 << 25) + 1
    assert segments(native, bags, slot, slot + 1).tolist() == [[2, (1 << 32) + 64, 64, 64]]


@pytest.mark.parametrize("bounds", [[0, 90, 30, 100], [-70, 5, 200, 400], [100, 0, 0, 0], [5, 6, 7, 8]], ids=str)
def test_no_offsets_leave_the_list(native, bounds):
    """Whatever cu_seqlens holds, rows and slots stay inside the memory that the sizes promise."""
    array = np.array(bounds, np.int32)
    bags = Bags(array.ctypes.data, False, 3, 0, 100)
    found, of_bags = segments(native, bags), slots_of_bags(native, bags)
    assert ((found[:, 3] >= 0) & (found[:, 3] <= SEGMENT_ROWS)).all()
    rows = found[found[:, 3] > 0]
    assert (rows[:, 1] >= 0).all() and (rows[:, 1] + rows[:, 3] <= 100).all()
    assert (of_bags >= 0).all() and (of_bags.sum(axis=1) <= len(found)).all()


def test_splits_exhaustively(native):
    found = np.empty(2, np.int64)
    for count, parts in itertools.product(range(20), range(1, 9)):
        end, sizes = 0, set()
        for part in range(parts):
            native.split(*(ctypes.c_int64(x) for x in (count, parts, part)), pointer(found))
            assert found[0] == end
            end = found[1]
            sizes.add(int(found[1] - found[0]))
        assert end == count and max(sizes) - min(sizes) <= 1


def test_chunks_are_pairs_that_fit_a_third_of_the_cache(native):
    """And so short that what tensor cores truncate, 2^-25 of a sum of one sign every 16 rows (8 in TF32), stays below
    the rounding of their factors: half an ulp is 2^-12 in fp16, 2^-11 in TF32.
    """
    for columns, element_bytes, cache in itertools.product(
        (0, 128, 256, 1024, 8192), (2, 4), (1 << 20, 50 << 20, 126 << 20)
    ):
        per_slot = SEGMENT_ROWS * columns * element_bytes
        slots = native.chunk(ctypes.c_int64(per_slot), ctypes.c_int64(cache))
        steps, rounding = slots * SEGMENT_ROWS / (32 // element_bytes), {2: 2**-12, 4: 2**-11}[element_bytes]
        assert slots >= 2 and slots % 2 == 0 and steps * 2**-25 < rounding / 3
        if slots > 2:
            assert slots * per_slot <= cache // 3
        if slots < 512:
            assert cache // 3 < (slots + 2) * per_slot
