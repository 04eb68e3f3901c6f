"""The CUDA library without a GPU: that it is built, its symbols and its machine code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ercn.ops import _extension

reason = _extension.load("libercn_cuda")
built = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.mark.skipif(shutil.which("nvcc") is None or torch.version.cuda is None, reason="no CUDA toolkit, or CPU torch")
def test_it_is_built_where_there_is_a_toolkit():
    assert reason is None, f"{reason}; ERCN_BUILD=cuda shows why"


@built
def test_operators_and_kernels_are_registered():
    names = ["attention_scores"]
    for op in ("relu_affinity", "gated_attention_pool", "pool_by_scores"):
        names += [op, f"{op}_backward"]
    for name in names:  # as Python calls them, and for processes without it
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ercn_native::{name}_cuda", "CUDA")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ercn::{name}", "CUDA")
    names = [kernel["name"] for kernel in _extension.cuda_kernels()]
    assert len(names) == len(set(names)) and all(name.startswith("ercn::") for name in names)
    assert all(kernel["launches"] == 0 for kernel in _extension.cuda_kernels()) or torch.cuda.is_available()


@built
def test_build_info():
    info = _extension.cuda_info()
    assert set(info) == {"cuda", "archs", "flags"}
    assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_attributes_need_a_device():
    with pytest.raises(RuntimeError, match="CUDA|driver"):
        _extension.cuda_kernels(attributes=True)


RUNTIME = """
#include <cstring>
static int calls = 0, pending = 0;
extern "C" int cudaGetLastError() { return pending = 0; }
extern "C" int cudaFuncGetAttributes(void* attributes, const void*) {
  if (pending) return pending;
  std::memset(attributes, 0, 40);
  return pending = calls++ % 2 ? 98 : 0;
}
"""


@built
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_kernels_without_code_for_the_device_are_reported_as_absent(tmp_path):
    """On a runtime without code for every other kernel, which keeps an error until cudaGetLastError."""
    (tmp_path / "runtime.cpp").write_text(RUNTIME)
    shim = tmp_path / "runtime.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", shim, tmp_path / "runtime.cpp"], check=True)
    code = (
        "import json; from ercn.ops import _extension; _extension.load('libercn_cuda'); "
        "print(json.dumps(_extension.cuda_kernels(attributes=True)))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=os.environ | {"LD_PRELOAD": str(shim)}, capture_output=True, text=True, check=True
    )
    records = json.loads(result.stdout)
    assert all("registers" in kernel and "absent" not in kernel for kernel in records[::2])
    assert all("registers" not in kernel and "function" in kernel["absent"] for kernel in records[1::2])
    assert [kernel["name"] for kernel in records] == [kernel["name"] for kernel in _extension.cuda_kernels()]


@built
def test_only_the_stable_abi_is_used():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listing = ["nm", "--dynamic", "--undefined-only", "--demangle", _extension.path("libercn_cuda")]
    symbols = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert "cudaSetDevice" in symbols  # autograd's thread has no context otherwise, which tensor maps need
    assert not [line for line in symbols.splitlines() if "at::" in line or "c10::" in line or "torch::" in line]
    # The driver's functions are looked up at run time: there may be no driver.
    assert not re.search(r"\bcu[A-Z]\w+", symbols)


@dataclass(frozen=True)
class Function:
    """One kernel of one architecture. resources: REG, STACK, SHARED, LOCAL. sass: lines of machine code."""

    name: str
    arch: int
    resources: dict[str, int]
    sass: tuple[str, ...]

    def main_loop(self) -> list[str]:
        """The instructions of the loops that have a product: from a backward branch's target to the branch."""
        lines, loop = self.sass, set()
        at = {address(line): i for i, line in enumerate(lines)}
        for i, line in enumerate(lines):
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
            if target and (first := at.get(int(target[1], 16))) is not None and first < i:
                body = range(first, i + 1)
                if any("MMA" in lines[k] for k in body):
                    loop.update(body)
        return [lines[k] for k in sorted(loop)]


def address(line: str) -> int:
    return int(re.search(r"/\*([0-9a-f]+)\*/", line)[1], 16)


def tool(*command: str | Path) -> str:
    folder = Path(find_spec("triton").submodule_search_locations[0], "backends", "nvidia", "bin")
    return subprocess.run([folder / "cuobjdump", *command], capture_output=True, text=True, check=True).stdout


@cache
def functions() -> list[Function]:
    """Every kernel of every architecture in the library."""
    if find_spec("triton") is None:
        pytest.skip("cuobjdump comes with Triton, which is not installed")
    resources: dict[tuple[int, str], dict[str, int]] = {}
    arch = 0
    for line in tool("--dump-resource-usage", _extension.path("libercn_cuda")).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            resources[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    all_functions, arch, name, sass = [], 0, "", []

    def finish():
        if sass:
            all_functions.append(Function(name, arch, resources[arch, name], tuple(sass)))

    for line in tool("--dump-sass", _extension.path("libercn_cuda")).splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            finish()
            arch, sass = int(found[1]), []
        elif found := re.match(r"\s*Function : (\S+)", line):
            finish()
            name, sass = found[1], []
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S.*;", line):
            sass.append(line.strip())
    finish()
    return all_functions


def named(pattern: str) -> list[Function]:
    found = [f for f in functions() if re.search(pattern, f.name)]
    assert found, f"no kernel matches {pattern}"
    return found


@built
@pytest.mark.slow
def test_kernels_are_there_for_every_architecture():
    kernels = {re.sub(r"\s", "", kernel["name"]) for kernel in _extension.cuda_kernels()}
    archs = {int(arch.replace(".", "").rstrip("af")) for arch in _extension.cuda_info()["archs"].split(",")}
    assert {f.arch for f in functions()} == archs
    assert max(sum(f.arch == arch for f in functions()) for arch in archs) == len(kernels)


@built
@pytest.mark.slow
def test_nothing_is_in_local_memory():
    for f in functions():
        assert f.resources["STACK"] == 0 and f.resources["LOCAL"] == 0, f"{f.name} sm_{f.arch}: {f.resources}"
        assert not [line for line in f.sass if re.search(r"\b(STL|LDL)\b", line)], f"{f.name} sm_{f.arch} spills"


@built
@pytest.mark.slow
def test_no_warp_waits_for_lanes_that_took_another_branch():
    """No collective of a whole warp is where lanes may diverge: BRA.DIV to a WARPSYNC.COLLECTIVE."""
    for f in functions():
        found = [line for line in f.sass if "WARPSYNC.COLLECTIVE" in line or "BRA.DIV" in line]
        assert not found, f"{f.name} sm_{f.arch}: {found[0]}"


@built
@pytest.mark.slow
def test_static_shared_memory_is_not_used():
    # cuobjdump also counts the 1 KiB that the system keeps in every block from sm_90 on.
    assert all(f.resources["SHARED"] <= 1024 for f in functions())


@built
@pytest.mark.slow
@pytest.mark.parametrize("kernel", [r"NS_8affinity7ForwardI", r"NS_8affinity8BackwardI"])
def test_generic_affinity_is_made_of_tensor_core_products(kernel):
    for f in named(kernel):
        loop = f.main_loop()
        assert [line for line in loop if re.search(r"\bHMMA\b", line)], f"{f.name}: no product in its loop"
        assert [line for line in loop if "LDGSTS.E.BYPASS.128" in line], f"{f.name}: copies are not 16 bytes"
        assert [line for line in loop if "LDSM" in line], f"{f.name}: fragments are not loaded by ldmatrix"
        assert not [line for line in loop if re.search(r"\b(LDG|STG)\b", line)], f"{f.name}: its loop waits for memory"


@built
@pytest.mark.slow
def test_memory_bound_kernels_access_16_bytes():
    for f in named(r"NS_8affinity(12PackFeatures|13CombineSplits)I"):
        for access in ("LDG", "STG"):
            assert [line for line in f.sass if f"{access}.E.128" in line], f"{f.name}: no {access} of 16 bytes"


@built
@pytest.mark.slow
def test_dropout_and_activations_leave_three_blocks_of_the_generic_pool_on_a_multiprocessor():
    for f in named(r"4pool.*Pool(Forward|Branch)I"):
        exact = re.search(r"I[^E]*7Float32E", f.name)
        assert f.resources["REG"] * 128 * (2 if exact else 3) <= 65536, f"{f.name} sm_{f.arch}: {f.resources}"


@built
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["PoolForward", "PoolBranch"])
def test_a_draw_of_dropout_serves_four_units_on_hopper(kernel):
    """Philox's 20 products for each of 16 draws of a thread's 64 units, some of them shared in the first rounds."""
    for f in hopper(rf"4sm90.*{kernel}I"):
        products = [line for line in f.sass if re.search(r"IMAD\.(WIDE|HI)\.U32.*-(0x2daee0ad|0x326172a9)", line)]
        assert 256 <= len(products) <= 320, f"{f.name}: {len(products)}"


@built
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["PoolForward", "PoolBranch", "PoolRowGradient", "PoolWeightGradient", "PoolDots"])
def test_hopper_pool_is_made_of_wgmma_and_tma(kernel):
    """Wide products of whole warpgroups, copies by TMA, and stores of long rows by 16 bytes."""
    wide = kernel != "PoolDots"
    for f in named(rf"4sm90.*{kernel}I"):
        assert f.arch == 90
        sass = "\n".join(f.sass)
        assert re.search(r"\bHGMMA\.64x256x16" if wide else r"\bHGMMA\.64x8x16", sass), f"{f.name}: no product"
        other = re.search(r"\b(HMMA|LDGSTS)\b", sass)
        assert "UTMALDG" in sass and not other, f"{f.name}: another way to copy or multiply"
        assert "SYNCS" in sass and ("USETMAXREG" in sass) == wide, f"{f.name}: no barriers, or registers stay"
        stored = "STG.E.128" if kernel in ("PoolBranch", "PoolRowGradient", "PoolWeightGradient") else ""
        assert stored in sass and ("LDG.E.128" in sass or kernel not in ("PoolWeightGradient", "PoolDots")), f.name


@built
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["7ForwardI", "8BackwardI"], ids=["forward", "backward"])
def test_hopper_affinity_is_made_of_wgmma_and_tma(kernel):
    found = hopper(f"sm908affinity{kernel}")
    assert len(found) == 24  # two dtypes, four D, three P
    for f in found:
        loop, sass = f.main_loop(), "\n".join(f.sass)
        products, waits = sass.count("HGMMA"), sass.count("WARPGROUP.DEPBAR")
        assert waits < products / 2, f"{f.name}: ptxas waits after every product, for lack of registers"
        assert not re.search(r"\bHMMA\b", sass), f"{f.name}: products of one warp"
        assert "UTMALDG.3D" in sass and "USETMAXREG" in sass, f"{f.name}: no copy engine, or registers stay"
        assert not [line for line in loop if re.search(r"\bLDG\b", line)], f"{f.name}: its loop waits for memory"
        assert "STSM.16.M88.4" in sass or "Backward" in f.name, f"{f.name}: A is not written by stmatrix"


@built
@pytest.mark.slow
def test_hopper_affinity_adds_partial_sums_by_16_bytes():
    for pattern in ("7CombineI", "11CombineFeatI"):
        for f in hopper(f"sm908affinity{pattern}"):
            assert [line for line in f.sass if "LDG.E.128" in line], f"{f.name}: no load of 16 bytes"


def hopper(pattern: str) -> list[Function]:
    if "9.0a" not in _extension.cuda_info()["archs"]:
        pytest.skip("9.0a is not in ERCN_CUDA_ARCHS")
    return named(pattern)
