"""The compiled extension: what it says of itself, its ABI, and why it is absent where it is."""

import multiprocessing
import platform
import re
import shutil
import subprocess

import pytest
import torch
from torch.utils.data import DataLoader

from ercn.ops import _extension, relu_affinity

reason = _extension.load()
built = pytest.mark.skipif(reason is not None, reason=str(reason))


@built
def test_build_info():
    from ercn import _C

    info = _C.build_info()
    assert set(info) == {"compiler", "cpp_standard", "flags", "build_type", "torch_target_version", "pybind11"}
    assert info["torch_target_version"] == "2.10"
    assert "-O3" in info["flags"]
    assert info["cpp_standard"] >= 201703


@built
def test_cpu_features_agree_with_the_kernel():
    from ercn import _C

    features = _C.cpu_features()
    assert features and all(type(value) is bool for value in features.values())
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split(":")[1].split() for line in file if line.startswith("flags")), None)
    except FileNotFoundError:
        flags = None
    if flags is None:
        pytest.skip("no x86 flags in /proc/cpuinfo to compare with")
    assert {name for name, present in features.items() if present} == set(features) & set(flags)


@built
def test_isas_follow_from_the_features():
    from ercn import _C

    features, isas = _C.cpu_features(), _C.cpu_isas()
    assert isas == ["portable", "avx2", "avx512", "avx512_bf16"][: len(isas)]
    assert ("avx512" in isas) == all(features.get(f"avx512{part}") for part in ("f", "bw", "dq", "vl"))
    assert ("avx512_bf16" in isas) == (features.get("avx512_bf16", False) and "avx512" in isas)


@built
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_multiply_add_rate(dtype):
    from ercn import _C

    assert 1e6 < _C.multiply_add_rate(dtype, 0.001) < 1e15


def multiply_adds(function: str, machine_code: str) -> tuple[int, int]:
    """How many vector multiply-adds the longest loop of a function has, and how many registers they add to."""
    listing, _, _ = machine_code.partition(f"{function}(long)>:\n")[2].partition("\n\n")
    lines = [line.split(None, 1) for line in listing.splitlines()]
    at = {address: i for i, (address, _) in enumerate(lines)}
    jumps = [(i, re.match(r"j\w+ +([0-9a-f]+)", text)) for i, (_, text) in enumerate(lines)]
    loops = [lines[at[f"{jump[1]}:"] : i] for i, jump in jumps if jump and at.get(f"{jump[1]}:", i) < i]
    body = [text for _, text in max(loops, key=len)]
    targets = [text.rpartition(",")[2] for text in body if re.match(r"(vfn?madd\d+p[sd]|vdpbf16ps) ", text)]
    return len(targets), len(set(targets))


@built
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it reads x86 machine code")
def test_multiply_add_rates_are_those_of_independent_operations():
    """The rate counts so many multiply-adds a step: as many instructions are there, each with a sum of its own. Where
    a compiler merges the equal chains of a dtype, its rate would be several times the truth.
    """
    from ercn import _C

    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    listing = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _C.__file__]
    code = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    for isa, chains in (("avx2", 12), ("avx512", 24), ("avx512_bf16", 24)):
        for dtype in ("float", "double"):
            assert multiply_adds(f"double ercn::{isa}::multiply_add<{dtype}>", code) == (chains, chains)
    assert multiply_adds("ercn::avx512_bf16::multiply_add_bf16", code) == (24, 24)


@built
def test_only_the_stable_abi_is_used():
    from ercn import _C

    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = ["nm", "--dynamic", "--undefined-only", "--demangle", _C.__file__]
    symbols = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert "torch_parallel_for" in symbols
    assert not [line for line in symbols.splitlines() if "at::" in line or "c10::" in line or "torch::" in line]


class Maps(torch.utils.data.Dataset):
    """Items that need the kernels, computed by the workers of a DataLoader."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        value, feat = (torch.randn(1, rows, 200, generator=generator) for rows in (2, 3))
        return relu_affinity(value, feat, backend="cpu")


@built
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    here = [Maps()[index] for index in range(4)]  # this process's threads have run before the fork
    loader = DataLoader(Maps(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(here, loader, strict=True))


def test_load_is_cached():
    assert _extension.load() is _extension.load()


def test_an_absent_extension_gives_the_recorded_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "find_spec", lambda name: None)
    monkeypatch.setattr(_extension, "RECORD", tmp_path / "_build.json")
    absent = _extension.load.__wrapped__
    assert "not installed" in absent()
    _extension.RECORD.write_text('{"reasons": {"ercn._C": "no C++ compiler: \'c++\' was not found"}}')
    assert absent() == "ercn._C was not built: no C++ compiler: 'c++' was not found"


def test_an_extension_that_cannot_load_gives_the_loaders_message(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(_extension, "find_spec", lambda name: object())
    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    assert _extension.load.__wrapped__() == "ercn._C failed to load: undefined symbol: torch_parallel_for"
