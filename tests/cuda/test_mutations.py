"""Deliberate faults in the emulated CUDA kernels: each one fails a check that the unchanged kernels pass.

A copy of csrc/cuda holds all of them, each behind a switch; few sizes of the changed files are compiled. One process,
mutation_case.py, sets the switches in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import _cuda_emulator
import pytest

TESTS = Path(__file__).parent
COPY = _cuda_emulator.BUILD / "mutations" / "cuda"

# Compiled with the mutations, the Hopper affinity for D = 64 and at most 24 channels only; other objects are reused.
SOURCES = ["affinity/sm90/affinity.cu", "affinity/sm90/forward.cu", "affinity/sm90/backward.cu",
           "affinity/generic/prepare.cu", "pool/driver.cu", "pool/sm90/gradients.cu"]  # fmt: skip
SIZES = (
    "affinity/sm90/launch.h",
    (
        "if (padded_channels == 8) return run(element, d, std::integral_constant<int, 8>());",
        "return run(element, d, std::integral_constant<int, 32>());",
        "if (dim == 128) return with_channels(element, std::integral_constant<int, 128>());",
        "if (dim == 192) return with_channels(element, std::integral_constant<int, 192>());",
        "return with_channels(element, std::integral_constant<int, 256>());",
    ),
)


@dataclass(frozen=True)
class Mutation:
    """In ``file``, ``right`` becomes ``wrong``: a statement if it ends in ;, else an expression."""

    file: str
    right: str
    wrong: str
    check: str = "forward"

    def switched(self, number: int) -> str:
        if self.right.endswith(";"):
            return f"if (ercn_mutation == {number}) {{ {self.wrong} }} else {{ {self.right} }}"
        return f"(ercn_mutation == {number} ? ({self.wrong}) : ({self.right}))"


MUTATIONS = {
    "one pixel left out at the ragged end": Mutation(
        "affinity/sm90/prepare.h", "real && n0 + i < p.pixels", "real && n0 + i < p.pixels - 1"
    ),
    "one tile lost": Mutation("affinity/sm90/forward.h", "add(out[kRowTiles - 1], sums);", ""),
    "one tile added twice": Mutation("affinity/sm90/backward.h", "part == 0", "part < 2", "backward"),
    "a partial sum lost": Mutation("affinity/sm90/combine.h", "g < above", "g < above - 1"),
    "a partial sum added twice": Mutation(
        "affinity/sm90/combine.h",
        "add(sum, p.mirrored + mirrored_offset(s, p.width, p.rows, p.block_channels, from, b, c, n));",
        "for (int k = 0; k < 2 - (g > 0); ++k)"
        " add(sum, p.mirrored + mirrored_offset(s, p.width, p.rows, p.block_channels, from, b, c, n));",
    ),
    "a block's barrier removed": Mutation("affinity/sm90/combine.h", "arch::sync_threads();", "", "backward"),
    "the barrier before A is written removed": Mutation(
        "affinity/sm90/forward.h", "arch::named_barrier(1, kConsumers * kWarpgroup);", ""
    ),
    "the barrier after A is written removed": Mutation(
        "affinity/sm90/forward.h", "arch::named_barrier(2, kConsumers * kWarpgroup);", ""
    ),
    "a proxy fence removed": Mutation("affinity/sm90/forward.h", "arch::fence_proxy_async();", ""),
    "a wait for a copy removed": Mutation("affinity/sm90/forward.h", "terms.wait_full();", ""),
    "a stale stage read": Mutation(
        "affinity/sm90/forward.h",
        "shared + Tiles::kTermColumns + terms.index * Tiles::kTermBytes",
        "shared + Tiles::kTermColumns + (terms.index + 1) % Tiles::kTermStages * Tiles::kTermBytes",
    ),
    "a wait for products removed": Mutation("affinity/sm90/forward.h", "if (r > 0) arch::wgmma_wait<1>();", ""),
    "the warp's index by a shuffle of all lanes, under a branch": Mutation(
        "affinity/sm90/epilogue.h", "arch::warp_index() % 4 * 16", "arch::uniform_warp_index() % 4 * 16"
    ),
    "TF32 words not rounded": Mutation("affinity/generic/prepare.cu", "arch::round_tf32(x)", "x", "tf32"),
    "a stage released before its products are done": Mutation(
        "pool/sm90/gemm.h", "arch::wgmma_wait<1>();", "", "pool"
    ),
    "the sums of earlier chunks lost": Mutation("pool/driver.cu", "first > 0", "false", "pool"),
    "the sums of slots without a segment unwritten": Mutation(
        "pool/driver.cu", "torch::stable::zero_(parts)", "parts", "pool"
    ),
}


def mutated_sources() -> list[Path]:
    """SOURCES in a copy of csrc/cuda, without arch/, that holds every mutation."""
    files = [path for path in _cuda_emulator.DEVICE.rglob("*.*") if path.parent.name != "arch"]
    texts = {str(path.relative_to(_cuda_emulator.DEVICE)): path.read_text() for path in files}

    def replace(file, right, wrong):
        assert texts[file].count(right) == 1, f"{file} does not have {right!r} once"
        texts[file] = texts[file].replace(right, wrong)

    for size in SIZES[1]:
        replace(SIZES[0], size, "")
    for number, mutation in enumerate(MUTATIONS.values(), 1):
        replace(mutation.file, mutation.right, mutation.switched(number))
    for path, text in texts.items():
        copy = COPY / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:  # what did not change is not compiled again
            copy.write_text(text)
    for copy in COPY.rglob("*.*"):
        if str(copy.relative_to(COPY)) not in texts:
            copy.unlink()
    return [COPY / source for source in SOURCES]


@pytest.fixture(scope="module")
def found() -> dict[int, str | None]:
    """The checks' sentence for each mutation, by its number; 0 is none."""
    sources = mutated_sources()
    anew = set(map(_cuda_emulator.object_name, sources))
    names = [name for name in map(_cuda_emulator.object_name, _cuda_emulator.operator_sources()) if name not in anew]
    folder = _cuda_emulator.operators().parent
    flags = (f"-include{TESTS / 'emulator' / 'mutation.h'}", f"-I{COPY}")
    built = _cuda_emulator.operators_with("mutated", sources, flags, tuple(str(folder / name) for name in names))
    checks = [(number, mutation.check) for number, mutation in enumerate(MUTATIONS.values(), 1)]
    checks = [*((0, check) for check in sorted({check for _, check in checks})), *checks]
    command = [sys.executable, TESTS / "mutation_case.py", built, json.dumps(checks)]
    result = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    found = {}
    for line in result.stdout.splitlines():
        number, sentence = json.loads(line)
        found[number] = found.get(number) or sentence
    return found


@pytest.mark.slow
def test_kernels_without_a_mutation_pass(found):
    assert found[0] is None


@pytest.mark.slow
@pytest.mark.parametrize("number, name", list(enumerate(MUTATIONS, 1)), ids=str)
def test_mutation_is_found(found, number, name):
    assert found[number] is not None, f"no check saw: {name}"
