"""The compiled library: its build information, ABI and schemas, and the reason if it is absent."""

import ast
import multiprocessing
import platform
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.utils.flop_counter
from torch.utils.data import DataLoader

from ercn.ops import _extension, _library, affinity_propagate, gated_attention_pool, relu_affinity

reason = _extension.load()
built = pytest.mark.skipif(reason is not None, reason=str(reason))


@built
def test_build_info():
    info = _extension.cpu_info()["build"]
    assert set(info) == {"compiler", "cpp_standard", "flags", "build_type", "torch_target_version"}
    assert info["torch_target_version"] == "2.10"
    assert "-O3" in info["flags"]
    assert info["cpp_standard"] >= 201703


@built
def test_cpu_features_agree_with_the_kernel():
    features = _extension.cpu_info()["features"]
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
    features, isas = _extension.cpu_info()["features"], _extension.cpu_info()["isas"]
    assert isas == ["portable", "avx2", "avx512", "avx512_bf16"][: len(isas)]
    assert ("avx512" in isas) == all(features.get(f"avx512{part}") for part in ("f", "bw", "dq", "vl"))
    assert ("avx512_bf16" in isas) == (features.get("avx512_bf16", False) and "avx512" in isas)


@built
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_multiply_add_rate(dtype):
    assert 1e6 < torch.ops.ercn_native.multiply_add_rate(dtype, 0.001) < 1e15


def multiply_adds(function: str, machine_code: str) -> tuple[int, int]:
    """The number of vector multiply-adds in the longest loop of a function, and of the registers they accumulate in."""
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
    """The rate counts a number of multiply-adds for each step; the loop has as many instructions with different sums.
    If a compiler merged equal chains of a dtype, the rate would be several times too high.
    """
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    listing = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _extension.path()]
    code = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    for isa, chains in (("avx2", 12), ("avx512", 24), ("avx512_bf16", 24)):
        for dtype in ("float", "double"):
            assert multiply_adds(f"double ercn::{isa}::multiply_add<{dtype}>", code) == (chains, chains)
    assert multiply_adds("ercn::avx512_bf16::multiply_add_bf16", code) == (24, 24)


@built
def test_only_the_stable_abi_is_used():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = ["nm", "--dynamic", "--undefined-only", "--demangle", _extension.path()]
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
    here = [Maps()[index] for index in range(4)]  # the threads of this process have run before the fork
    loader = DataLoader(Maps(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(here, loader, strict=True))


def test_load_is_cached():
    assert _extension.load() is _extension.load()


def test_an_absent_library_gives_the_recorded_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(_extension, "RECORD", tmp_path / "_build.json")
    absent = _extension.load.__wrapped__
    assert "not installed" in absent()
    _extension.RECORD.write_text('{"reasons": {"libercn": "no C++ compiler: \'c++\' was not found"}}')
    assert absent() == "libercn was not built: no C++ compiler: 'c++' was not found"
    assert absent("libercn_cuda") == (
        "libercn_cuda was not built: the build succeeded, but for another platform; install again"
    )


def test_a_library_that_cannot_load_gives_the_loaders_message(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "PACKAGE", tmp_path)
    _extension.path().parent.mkdir()
    _extension.path().write_bytes(b"no library")
    words = r"libercn failed to load: .*libercn\.\w+: (file too short|invalid ELF header|.*not a .*)"
    assert re.match(words, _extension.load.__wrapped__())


WITHOUT_THE_LIBRARY = """
import torch
from ercn.ops import _extension
_extension.load = lambda name="libercn": f"{name} was not built: it is not wanted"
import ercn.ops
from ercn.ops import _library
print({str(overload._schema) for overload in _library.DEFINED})
x = torch.ones(1, 1, 2, requires_grad=True)
ercn.ops.relu_affinity(x, x).sum().backward()
assert torch.equal(x.grad, torch.full((1, 1, 2), 6.0)), x.grad
"""


@built
def test_schemas_in_python_are_those_of_the_library():
    """Python defines the schemas without the library, and the operators run."""
    command = [sys.executable, "-c", WITHOUT_THE_LIBRARY]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    in_python = ast.literal_eval(told.stdout)
    assert in_python == {str(overload._schema) for overload in _library.DEFINED} and len(in_python) >= 4
    in_cpp = {name for name in in_python if _has_kernel(name.partition("(")[0], "CPU")}
    assert {"ercn::relu_affinity", "ercn::relu_affinity_backward"} <= {name.partition("(")[0] for name in in_cpp}


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@built
def test_only_libraries_of_torch_are_needed():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    for name in ("libercn", "libercn_cuda"):
        if not _extension.path(name).exists():
            continue
        listing = subprocess.run(["readelf", "-d", _extension.path(name)], capture_output=True, text=True, check=True)
        needed = re.findall(r"NEEDED.*\[(.*)\]", listing.stdout)
        assert "libtorch_cpu.so" in needed and not [file for file in needed if re.search("python|c10", file)]
        symbols = subprocess.run(["nm", "-D", _extension.path(name)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r" _?Py[A-Z_]", symbols)


def test_every_device_has_the_operators():
    for overload in _library.DEFINED:
        for key in ("BackendSelect", "CompositeExplicitAutograd"):
            assert _has_kernel(overload._schema.name, key)


def test_the_dispatcher_sees_what_runs_at_once():
    """Modes and the profiler see the op although its kernel can be called without the dispatcher."""
    x = torch.ones(1, 1, 2)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        relu_affinity(x, x)
    assert flops.get_total_flops() == 2 * 2 * 2 * 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        relu_affinity(x, x)
    assert "ercn::relu_affinity" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("need", [False, True])
def test_traces_hold_the_operators(need, tmp_path):
    """torch.jit.trace and make_fx record the op: for other inputs the trace returns what a call returns."""
    from torch.fx.experimental.proxy_tensor import make_fx

    weights = (torch.randn(3, 4), None, torch.randn(3, 4), None, torch.randn(1, 3), None)
    mask = torch.tensor([[True, True, False, True, True]])

    def calls(h):
        pooled, scores = gated_attention_pool(h, *weights, mask=mask)
        return pooled, scores, affinity_propagate(h.mT, h.mT), relu_affinity(h.mT, h.mT)

    x, other = torch.randn(1, 5, 4, requires_grad=need), torch.randn(1, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it makes sizes constants, and is deprecated
        trace = torch.jit.trace(calls, (x,))
    torch.jit.save(trace, str(tmp_path / "trace.pt"))
    for traced in (trace, torch.jit.load(str(tmp_path / "trace.pt")), make_fx(calls)(x)):
        for ours, expected in zip(traced(other), calls(other)):
            torch.testing.assert_close(ours, expected)


def test_a_library_of_other_sources_is_refused():
    """As with a stale library in an editable checkout."""
    with pytest.raises(ImportError, match=r"libercn was built from other sources, where ercn::relu_affinity\(Tensor v"):
        _library.define('relu_affinity(Tensor value, str backend="") -> Tensor', fake=torch.clone)


def test_tensors_that_stand_for_others():
    """A kernel must not read the memory of a lazy negation or of a tensor that old-style vmap wraps."""
    x = torch.arange(1.0, 4.0).view(1, 1, 3)
    negated = torch._neg_view(x)
    assert torch.equal(relu_affinity(negated, x), -relu_affinity(x, x))
    leaf = x.clone().requires_grad_()
    grads = torch.stack([x, 2 * x])
    (batched,) = torch.autograd.grad(relu_affinity(leaf, x), leaf, grads, is_grads_batched=True)
    assert torch.equal(batched, torch.stack([relu_affinity(g, x) for g in grads]))
