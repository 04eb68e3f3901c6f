"""csrc/cuda/affinity/sm90/tile_scheduler.h: tiles of the triangle, shares of work, and where partial sums lie."""

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
TILE = 128


class TileScheduler(ctypes.Structure):
    _fields_ = [("images", ctypes.c_int64), ("columns", ctypes.c_int), ("first_row_block", ctypes.c_int)]
    _fields_ += [("row_blocks", ctypes.c_int), ("step", ctypes.c_int), ("workers", ctypes.c_int64)]


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    built = tmp_path_factory.mktemp("scheduler") / "scheduler.so"
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover"]
    source = ROOT / "tests" / "cuda" / "_affinity_scheduler.cpp"
    subprocess.run([*command, "-I", ROOT / "csrc" / "cuda", source, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    for name in ("tiles", "slots", "worker", "begin", "width", "offset"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def scheduler(native, images, columns, step, workers, first_row_block=0, row_blocks=None):
    """Every row block of every image, or some of them; no more workers than tiles."""
    if row_blocks is None:
        row_blocks = (-(-columns // step) if step else columns) - first_row_block
    s = TileScheduler(images, columns, first_row_block, row_blocks, step, 1)
    s.workers = min(workers, native.tiles(s))
    return s


def walk(native, s, first=0, count=None):
    count = native.tiles(s) - first if count is None else count
    found = np.empty((count, 5), np.int64)
    native.walk(s, ctypes.c_int64(first), ctypes.c_int(count), ctypes.c_void_p(found.ctypes.data))
    return found


def shares(native, s):
    return np.array([native.begin(s, ctypes.c_int64(w)) for w in range(s.workers + 1)])


def pair(native, function, s, *arguments):
    found = (ctypes.c_int64 * 3)()
    getattr(native, function)(s, *arguments, found)
    return list(found)


SMALL = [
    (images, columns, step, first, row_blocks)
    for images, columns, step in itertools.product((1, 2, 3), range(1, 10), (0, 1, 2))
    for every in [-(-columns // step) if step else columns]
    for first in range(every)
    for row_blocks in range(1, every - first + 1)
]


def test_sequence_is_every_tile_from_left_to_right(native):
    for images, columns, step, first, row_blocks in SMALL:
        s = scheduler(native, images, columns, step, 1, first, row_blocks)
        rows = range(first, first + row_blocks)
        expected = [(b, g, c) for b in range(images) for g in rows for c in range(step * g, columns)]
        found = walk(native, s)
        assert [tuple(row[:3]) for row in found] == expected
        assert [pair(native, "tile", s, ctypes.c_int64(p)) for p in range(len(expected))] == [list(e) for e in expected]
        starts = [i == 0 or expected[i][:2] != expected[i - 1][:2] for i in range(len(expected))]
        assert found[:, 3].tolist() == starts


def test_every_pair_of_tiles_is_formed_once(native):
    """Over all bands, each ordered pair once: directly for a row block, mirrored for the columns beyond it."""
    for columns, step in itertools.product(range(1, 13), (1, 2)):
        row_blocks = -(-columns // step)
        for band in range(1, row_blocks + 1):
            times = np.zeros((row_blocks * step, columns), int)
            for first in range(0, row_blocks, band):
                s = scheduler(native, 1, columns, step, 1, first, min(band, row_blocks - first))
                for _, row_block, column, _, _ in walk(native, s):
                    rows = range(row_block * step, (row_block + 1) * step)
                    times[rows, column] += 1
                    if column >= native.first_column(s, int(row_block + 1)):
                        times[column, [row for row in rows if row < columns]] += 1
            assert (times[:columns] == 1).all()


def test_shares_are_equal_and_know_their_worker(native):
    for images, columns, step, first, row_blocks in SMALL:
        for workers in (1, 2, 3, 5, 8, 13):
            s = scheduler(native, images, columns, step, workers, first, row_blocks)
            bounds = shares(native, s)
            assert bounds[0] == 0 and bounds[-1] == native.tiles(s)
            sizes = np.diff(bounds)
            assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
            owners = [native.worker(s, ctypes.c_int64(p)) for p in range(native.tiles(s))]
            assert owners == np.repeat(np.arange(s.workers), sizes).tolist()


def test_slots_of_segments_are_distinct_and_without_gaps_in_a_group(native):
    for images, columns, step, first, row_blocks in SMALL:
        for workers in (1, 2, 3, 5, 8, 13):
            s = scheduler(native, images, columns, step, workers, first, row_blocks)
            found = walk(native, s)
            owner = np.repeat(np.arange(s.workers), np.diff(shares(native, s)))
            spans = {}
            for (image, row_block, _, _, slot), worker in zip(found.tolist(), owner.tolist()):
                spans.setdefault(slot, set()).add((worker, image, row_block))
            assert all(len(owners) == 1 for owners in spans.values())  # one worker, one row block
            assert 0 <= min(spans) and max(spans) < native.slots(s)
            for image, row_block in itertools.product(range(images), range(first, first + row_blocks)):
                own = sorted({slot for slot, owners in spans.items() if next(iter(owners))[1:] == (image, row_block)})
                low, high, _ = pair(native, "slots_of_row_block", s, ctypes.c_int64(image), row_block)
                assert own == list(range(low, high + 1))


def test_mirrored_sums_lie_apart_and_in_bounds(native):
    channels = 3
    for columns, rows, images in itertools.product((1, 2, 3, 5), (TILE, 2 * TILE), (1, 2)):
        step, row_blocks = rows // TILE, -(-columns * TILE // rows)
        for first, count in itertools.combinations(range(row_blocks + 1), 2):
            s = scheduler(native, images, columns, step, 4, first, count - first)
            width = native.width(ctypes.c_int64(columns * TILE), rows, first)
            assert width == max(0, columns * TILE - (first + 1) * rows)
            taken = set()
            for image, row_block, column, _, _ in walk(native, s).tolist():
                if column < native.first_column(s, row_block + 1):
                    continue
                for channel in range(channels):
                    at = native.offset(
                        s, ctypes.c_int64(width), rows, channels, row_block, ctypes.c_int64(image), channel,
                        ctypes.c_int64(column * TILE),
                    )  # fmt: skip
                    assert at % 4 == 0 and at not in taken  # 16 bytes
                    taken.add(at)
                    assert 0 <= at and at + TILE <= s.row_blocks * images * channels * width
                    assert at // width == (at + TILE - 1) // width  # a tile does not leave its row


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    images=st.integers(1, 2000), columns=st.integers(1, 8192), step=st.integers(0, 2), workers=st.integers(1, 200),
    data=st.data(),
)  # fmt: skip
def test_large_schedules(native, images, columns, step, workers, data):
    """2^20 pixels, thousands of images: positions, tiles, workers and slots agree wherever they are probed."""
    every = -(-columns // step) if step else columns
    first = data.draw(st.integers(0, every - 1))
    s = scheduler(native, images, columns, step, workers, first, data.draw(st.integers(1, every - first)))
    total = native.tiles(s)
    per_image = sum(columns - step * g for g in range(first, first + s.row_blocks))
    assert total == images * per_image
    bounds = shares(native, s)
    assert bounds[0] == 0 and bounds[-1] == total and np.diff(bounds).max() - np.diff(bounds).min() <= 1
    position = data.draw(st.integers(0, total - 1))
    image, row_block, column = pair(native, "tile", s, ctypes.c_int64(position))
    above = sum(columns - step * g for g in range(first, row_block))
    assert 0 <= image < images and first <= row_block < first + s.row_blocks and step * row_block <= column < columns
    assert position == image * per_image + above + column - step * row_block
    owner = native.worker(s, ctypes.c_int64(position))
    assert bounds[owner] <= position < bounds[owner + 1]
    low, high, _ = pair(native, "slots_of_row_block", s, ctypes.c_int64(image), row_block)
    slot = owner + image * s.row_blocks + row_block - first
    assert 0 <= low <= slot <= high < native.slots(s)
    if position + 1 < total:
        after = pair(native, "tile", s, ctypes.c_int64(position + 1))
        assert walk(native, s, position, 2)[1, :3].tolist() == after


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    maps=st.integers(1, 1 << 14), columns=st.integers(1, 8192), rows=st.sampled_from([TILE, 2 * TILE]),
    megabytes=st.integers(1, 512),
)  # fmt: skip
def test_bands_cover_all_groups_within_their_memory(native, maps, columns, rows, megabytes):
    limit, pixels, first = megabytes << 20, columns * TILE, 0
    row_blocks = -(-pixels // rows)
    for _ in range(20):
        if first == row_blocks:
            break
        arguments = ctypes.c_int64(limit), ctypes.c_int64(maps), ctypes.c_int64(pixels), rows, first
        count = native.band(*arguments)
        each = 4 * maps * native.width(ctypes.c_int64(pixels), rows, first)
        assert 1 <= count <= row_blocks - first
        assert count == 1 or count * each <= limit
        assert count == row_blocks - first or (count + 1) * each > limit
        first += count


def test_tiles_of_the_kernels(native):
    assert native.pixels_of_tile() == TILE
    assert [native.rows_of_row_block(d) for d in (64, 128, 192, 256)] == [256, 256, 256, 128]
    for channels in range(1, 33):
        padded = native.padded(channels)
        assert padded >= channels and padded in (8, 24, 32)
