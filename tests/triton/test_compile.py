"""Every shipped config of the Triton kernels, compiled ahead of time for its architecture; no GPU is needed."""

from __future__ import annotations

import functools
import itertools
import re
import runpy
from pathlib import Path

import pytest
import torch

from ercn.ops import triton as backend

if backend.INTERPRETED:
    pytest.skip("the interpreter has replaced the compiler in this process", allow_module_level=True)
pytest.importorskip("triton", reason="Triton has no wheel for this platform")
pytest.importorskip("ercn.kernels", reason="this is a source tree that was not installed")

from _triton_aot import SHARED_LIMIT, TENSOR_MEMORY, Compiled, launches

from ercn.benchmarks import settings
from ercn.benchmarks.cases import DTYPES
from ercn.kernels import affinity, attention_pool, configs, refinement, tune
from ercn.kernels.table import TABLE

ARCHS = [arch for arch in TABLE if arch != "interpreter"]
ALIKE = ["sm_89", "gfx90a", "gfx950"]  # served by rows of another architecture
CHANNELS, PIXELS, POOL_DIM, HIDDEN = 22, 64**2, 1024, 256
STREAMED = 512  # stands for any D
PLAIN = (None, 0.0, "tanh")  # the pool without dropout
# The precisions that need most registers and shared memory for half and float32 rows; others leave products out.
DEMANDING = {
    "forward": ("float16", "float32"),
    "triangle": ("float16", "float32"),
    "backward": ("bfloat16", "float32"),
    "pool": ("bfloat16", "float32"),
}


@pytest.fixture(scope="session", autouse=True)
def compiler_cache(tmp_path_factory):
    """Kernels compiled for chips that are not here stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_affinity(arch: str, kernel: str, dtype: torch.dtype, dim: int, layout: str = "channels_first") -> None:
    """Launch one kernel with its row of the table."""
    feat = meta(1, dim or STREAMED, PIXELS, dtype=dtype)
    if layout == "channels_last":
        feat = meta(1, PIXELS, dim or STREAMED, dtype=dtype).mT
    value = meta(1, CHANNELS, PIXELS, dtype=torch.float32)
    if kernel == "backward":
        row = configs.row(arch, kernel, configs.precision(dtype, arch).product_dtype, dim or STREAMED)
        affinity.relu_affinity_backward(value, value, feat, True, configs.BackwardPlan(row, 1, PIXELS))
    else:
        row = configs.row(arch, kernel, dtype, dim or STREAMED)
        band = PIXELS if kernel == "triangle" else 0
        affinity.relu_affinity(value, feat, configs.ForwardPlan(row, 1, PIXELS, band))


def run_pool(dtype: torch.dtype, option: str) -> None:
    """option: ragged, masked, by scores, or any of dropout, relu, gelu and wider (float32 weights)."""
    if option == "by scores":
        h, scores = meta(2, PIXELS, POOL_DIM, dtype=dtype), meta(2, 1, PIXELS, dtype=torch.float32)
        pooled = attention_pool.pool_by_scores(scores, h, None, None)
        attention_pool.pool_by_scores_backward(pooled, scores, h, None, None, [True, True])
        return
    ragged = option == "ragged"
    h = meta(PIXELS, POOL_DIM, dtype=dtype) if ragged else meta(2, PIXELS, POOL_DIM, dtype=dtype)
    words = option.split()
    dtype = torch.float32 if "wider" in words else dtype
    v, u = (meta(HIDDEN, POOL_DIM, dtype=dtype) for _ in range(2))
    weights = v, meta(HIDDEN, dtype=dtype), u, meta(HIDDEN, dtype=dtype), meta(1, HIDDEN, dtype=dtype), None
    mask = meta(2, PIXELS, dtype=torch.bool) if option == "masked" else None
    drawn = (meta(1, dtype=torch.int64), 0.25) if "dropout" in words else PLAIN[:2]
    activation = next((word for word in words if word in ("relu", "gelu")), "tanh")
    bags = mask, meta(3, dtype=torch.int64) if ragged else None, *drawn, activation
    if option:
        attention_pool.attention_scores(h, *weights, *bags)
    pooled, scores = attention_pool.gated_attention_pool(h, *weights, *bags)
    needs = [True] * 6 + [False]
    attention_pool.gated_attention_pool_backward(pooled, scores, h, *weights, *bags, scores, needs)


@functools.cache
def compiled(arch: str, kernel: str, precision: str, dim: int = 0, option: str = "") -> list[Compiled]:
    """What the launchers compile. kernel: one of the affinity's rows, or "pool" for all of the pool."""
    dtype = DTYPES[precision]
    with settings.precision(precision):
        if kernel == "pool":
            return launches(arch, lambda: run_pool(dtype, option))
        return launches(arch, lambda: run_affinity(arch, kernel, dtype, dim, option or "channels_first"))


def named(kernels: list[Compiled], name: str) -> list[Compiled]:
    found = [kernel for kernel in kernels if kernel.name == name]
    assert found, f"no {name} among {[kernel.name for kernel in kernels]}"
    return found


def assert_fits(binary: Compiled, tmp_path: Path, case: str = "") -> None:
    """Shared and tensor memory that the chip has, and everything else in registers."""
    size, limit = binary.shared, SHARED_LIMIT[binary.arch]
    assert size <= limit, f"{binary.name} {case}: {size} bytes of shared memory, {limit} there"
    assert getattr(binary.kernel.metadata, "tmem_size", 0) <= TENSOR_MEMORY, f"{binary.name} {case}: tensor memory"
    assert binary.spilled(tmp_path) == 0, f"{binary.name} {case}: {binary.spilled(tmp_path)} bytes spilled"


def widths(arch: str, kernel: str, precision: str) -> list[int]:
    """Every D that the tuning tool gives a row, 0 for any; a D with the row for any has the same kernel."""
    dtype = DTYPES[precision]
    dims = tune.DIMS["float32" if dtype == torch.float32 else "half"]
    last = configs.rows(arch, kernel, dtype)[0]
    return [dim for dim in dims if dim == 0 or configs.row(arch, kernel, dtype, dim) != last]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", DEMANDING)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_fits_on_chip(arch, kernel, tmp_path):
    for precision in DEMANDING[kernel]:
        for dim in widths(arch, kernel, precision):
            for binary in compiled(arch, kernel, precision, dim):
                assert_fits(binary, tmp_path, f"{precision}, D {dim or 'any'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "precision", "dim"),
    [*((arch, "bfloat16", 192) for arch in ALIKE), ("sm_90", "tf32", 128), ("sm_90", "float16", 192)],
)
def test_other_precisions_and_architectures_fit_on_chip(arch, precision, dim, tmp_path):
    for kernel in DEMANDING:
        for binary in compiled(arch, kernel, precision, 0 if kernel == "pool" else dim):
            assert_fits(binary, tmp_path, kernel)


def test_tf32_is_asked_for_where_it_exists():
    with settings.precision("tf32"):
        dots = {arch: configs.precision(torch.float32, arch).dot for arch in ("sm_80", "gfx90a", "gfx942", "gfx950")}
    assert dots == {"sm_80": "tf32", "gfx90a": "ieee", "gfx942": "tf32", "gfx950": "ieee"}
    assert {configs.precision(torch.bfloat16, arch).dot for arch in dots} == {"ieee"}


@pytest.mark.parametrize("arch", ["sm_86", "sm_90"])
@pytest.mark.parametrize("option", ["channels_last", "ragged", "masked"])
def test_other_layouts_fit_on_chip(arch, option, tmp_path):
    kernel = "backward" if option == "channels_last" else "pool"
    for binary in compiled(arch, kernel, "bfloat16", 0 if kernel == "pool" else 192, option):
        assert_fits(binary, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "option"),
    [
        ("bfloat16", "dropout"), ("bfloat16", "dropout relu"), ("bfloat16", "dropout gelu"), ("bfloat16", "gelu"),
        ("float32", "dropout gelu"), ("bfloat16", "wider dropout"), ("bfloat16", "by scores"), ("float32", "by scores"),
    ],
)  # fmt: skip
def test_other_arguments_of_the_pool_fit_on_chip(precision, option, tmp_path):
    for binary in compiled("sm_90", "pool", precision, 0, option):
        assert_fits(binary, tmp_path, option)


def test_dropout_is_formed_where_it_is_asked_for(tmp_path):
    """By the generator's 64-bit products: two of ten rounds by row and by unit, the others by four units."""
    steps = str(0x9E3779B9 - (1 << 32))
    for name in ("forward_kernel", "branch_grad_kernel"):
        kernels = (compiled("sm_90", "pool", "bfloat16", 0, option) for option in ("", "dropout"))
        plain, dropping = (named(found, name)[-1] for found in kernels)
        assert steps not in plain.kernel.asm["ttir"] and steps in dropping.kernel.asm["ttir"]
        products = [binary.sass(tmp_path).count("IMAD.WIDE.U32") for binary in (plain, dropping)]
        units = 128 * 64 / (32 * plain.constants["num_warps"])  # of a thread
        assert 16 * units / 4 <= products[1] - products[0] <= 20 * units / 4


def test_plans_are_kept_by_all_that_they_depend_on(monkeypatch):
    call = functools.partial(configs.forward_plan, 1, 22, 192, dtype=torch.bfloat16, arch="sm_90")
    triangle, dense = call(n=128**2), call(n=64**2)
    assert call(n=128**2) is triangle and triangle.band > 0 and dense.band == 0
    assert call(n=128**2, triangle=False).band == 0 < call(n=64**2, triangle=True).band
    few = TABLE | {"sm_90": TABLE["sm_90"] | {"programs": 4}}
    assert call(n=64**2, table=few) != dense
    other = tune.with_row(TABLE, "sm_90", "triangle", "half", 192, configs.ForwardConfig(64, 64, 64, 4, 1))
    assert call(n=128**2, table=other).config.num_warps == 4
    monkeypatch.setattr(configs, "MIRRORED_BYTES", 1 << 20)
    assert call(n=128**2).band < triangle.band
    monkeypatch.undo()
    assert call(n=128**2) is triangle and call(n=64**2) is dense
    for n in range(2 * configs.KEPT):
        call(n=n + 1)
    assert configs._forward_plan.cache_info().currsize == configs.KEPT


def sums_in_loops(text: str) -> set[str]:
    """Accumulators of products that are carried by a loop, in Triton's intermediate code."""
    carried = {name for group in re.findall(r"iter_args\((.*?)\) ->", text) for name in re.findall(r"(%\S+) =", group)}
    return carried & set(re.findall(r"(?:tt\.dot|warp_group_dot) [^,]+, [^,]+, (%[\w.#]+)", text))


def test_no_long_sum_is_left_to_tensor_cores():
    loop = "%a = scf.for %j = %x to %y step %z iter_args(%p = %c, %t = %q) -> (tensor<4xf32>) {\n%s = tt.dot %u, %v, "
    assert sums_in_loops(loop + "%t {inputPrecision") == {"%t"} and not sums_in_loops(loop + "%c : tensor")
    for kernel, precision, dim, left in (
        ("forward", "bfloat16", 192, 0),
        ("triangle", "bfloat16", 192, 0),
        ("backward", "bfloat16", 192, 3),  # F·W in 64 channels each, which ends in bfloat16
        ("backward", "float32", 128, 0),
        ("pool", "float32", 0, 0),
    ):
        for binary in compiled("sm_90", kernel, precision, dim):
            for code in (binary.kernel.asm["ttir"], binary.kernel.asm["ttgir"]):
                found = sums_in_loops(code)
                assert len(found) <= left, f"{kernel} in {precision}: {binary.name} leaves {found}"


@pytest.mark.parametrize("triangle", [False, True], ids=["dense", "triangle"])
def test_sizes_of_one_which_triton_takes_as_constants(triangle):
    one, dtype = meta(1, 1, 1, dtype=torch.float32), torch.bfloat16
    row = configs.row("sm_90", "triangle" if triangle else "forward", dtype, 1)
    plan = configs.ForwardPlan(row, 1, 1 << 10, int(triangle))

    def run():
        affinity.relu_affinity(one, one.to(dtype), plan)
        affinity.relu_affinity_backward(one, one, one.to(dtype), True)
        weights = meta(1, 1, dtype=dtype), None, None, None, meta(1, 1, dtype=dtype), None
        for h, cu_seqlens in ((one.to(dtype), None), (one[0].to(dtype), meta(2, dtype=torch.int32))):
            pooled, scores = attention_pool.gated_attention_pool(h, *weights, None, cu_seqlens, *PLAIN)
            needs = [True, True, False, False, False, True, False]
            attention_pool.gated_attention_pool_backward(
                pooled, None, h, *weights, None, cu_seqlens, *PLAIN, scores, needs
            )
            least = meta(1, dtype=torch.int64), 2**-16, "tanh"  # a threshold of 1
            attention_pool.gated_attention_pool_backward(
                None, scores, h, *weights, None, cu_seqlens, *least, attention_pool.attention_scores(
                    h, *weights, None, cu_seqlens, *least
                ), needs,
            )  # fmt: skip
            attention_pool.pool_by_scores(scores, h, None, cu_seqlens)
            attention_pool.pool_by_scores_backward(pooled, scores, h, None, cu_seqlens, [True, True])

    names = {kernel.name for kernel in launches("sm_90", run)}
    assert {"forward_kernel", "backward_kernel", "weight_grad_kernel"} <= names


def run_refinement(form: str, dtype: torch.dtype, dilations: tuple[int, ...]) -> None:
    cam, image = meta(2, CHANNELS, 64, 64, dtype=dtype), meta(2, 3, 64, 64, dtype=dtype)
    refinement.pixel_adaptive_refinement(cam, image, dilations, 2, form)
    refinement.pixel_adaptive_refinement_backward(cam, image, dilations, 2, form)
    refinement.random_walk(cam, meta(2, 34, 64, 64, dtype=dtype), 5, 8.0, 2)


@pytest.mark.parametrize(
    ("arch", "form", "dtype", "dilations"),
    [
        ("sm_80", "pamr", torch.float32, (1, 2, 4, 8, 12, 24)),
        ("sm_90", "par", torch.bfloat16, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 614)),
        ("gfx942", "pamr", torch.float16, (1,)),
    ],
    ids=["sm_80", "sm_90", "gfx942"],
)
def test_refinements_fit_on_chip(arch, form, dtype, dilations, tmp_path):
    kernels = launches(arch, lambda: run_refinement(form, dtype, dilations))
    assert {kernel.name for kernel in kernels} == {"scale_kernel", "weight_kernel", "step_kernel", "walk_kernel"}
    for kernel in kernels:
        assert_fits(kernel, tmp_path)


def test_every_row_of_the_table_is_compiled():
    for arch in ARCHS:
        for kernel in tune.KERNELS:
            for kind, dims in tune.DIMS.items():
                rows = configs.rows(arch, kernel, tune.DTYPES[kind])
                assert {0} <= set(rows) <= set(dims if kernel in ("forward", "triangle", "backward") else (0,))
        assert arch in SHARED_LIMIT


def test_hopper_code_uses_warpgroup_products(tmp_path):
    names = {"forward": "forward_kernel", "triangle": "forward_kernel", "backward": "backward_kernel"}
    for kernel, name in names.items():
        for binary in named(compiled("sm_90", kernel, "bfloat16", 192), name):
            sass = binary.sass(tmp_path)
            assert "HGMMA" in sass and not re.search(r"\bHMMA\b", sass), f"{kernel}: not all products are wgmma"
    for name in ("forward_kernel", "branch_grad_kernel", "row_grad_kernel", "weight_grad_kernel"):
        assert "HGMMA" in named(compiled("sm_90", "pool", "bfloat16"), name)[0].sass(tmp_path), name


def test_loads_of_feature_tiles_are_asynchronous(tmp_path):
    for arch in ("sm_80", "sm_90"):
        for kernel, name in (("forward", "forward_kernel"), ("backward", "backward_kernel")):
            sass = named(compiled(arch, kernel, "bfloat16", 192), name)[0].sass(tmp_path)
            assert "LDGSTS" in sass, f"{arch} {kernel}: nothing is copied to shared memory in the background"


@pytest.mark.parametrize("kernel", ["forward", "triangle", "backward", "pool"])
def test_offsets_of_half_precision_tiles_are_64_bit(kernel):
    pattern = re.compile(r"tt\.addptr [^:]*: tensor<\d+x\d+x!tt\.ptr<bf16>>, tensor<\d+x\d+x(i\d+)>")
    kernels = compiled("sm_90", kernel, "bfloat16", 0 if kernel == "pool" else 192)
    widths = [width for binary in kernels for width in pattern.findall(binary.kernel.asm["ttir"])]
    assert widths and set(widths) == {"i64"}


def test_the_table_is_as_the_tool_writes_it():
    assert tune.FILE.read_text(encoding="utf-8") == tune.render(TABLE)


@pytest.mark.parametrize(("arch", "others"), [("sm_86", ("sm_80",)), ("sm_90", ("sm_100",)), ("sm_89", ("sm_86",))])
def test_a_changed_row_changes_nothing_else(arch, others, tmp_path):
    before, table = repr(TABLE), TABLE | {arch: TABLE[configs.family(arch)]}
    row = configs.BackwardConfig(32, 64, 32, 4, 1, chunks=2)
    changed = tune.with_row(table, arch, "backward", "half", 64, row)
    assert repr(TABLE) == before
    file = tmp_path / "table.py"
    file.write_text(tune.render(changed), encoding="utf-8")
    for written in (changed, runpy.run_path(str(file))["TABLE"]):
        for name, kernel, kind, dim in itertools.product((arch, *others), tune.KERNELS, tune.DTYPES, (64, 128, 512)):
            find = functools.partial(configs.row, name, kernel, tune.DTYPES[kind], dim)
            here = (name, kernel, kind, dim) == (arch, "backward", "half", 64)
            assert find(table=written) == (row if here else find(table=table))


def test_the_fastest_row_is_found_in_its_place_of_the_table(monkeypatch):
    """The call that is timed has the row in its table, and no other table changes."""
    rows = [configs.GemmConfig(64, 64, depth, 4, 1) for depth in (32, 64, 128)]
    times = dict(zip(rows, (2.0, 1.0, float("inf"))))
    monkeypatch.setattr(tune, "workload", lambda *_: lambda table: configs.pool_plan(9, torch.float16, "sm_90", table))
    monkeypatch.setattr(tune, "milliseconds", lambda plan: times[plan.row_grad])
    find = functools.partial(tune.fastest, TABLE, "sm_90", "row_grad", "half", 0)
    assert find(rows) == rows[1] and find(rows[2:]) is find([]) is None


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_are_configs(kernel):
    rows = [row for dim in tune.DIMS["half"] for row in tune.candidates(kernel, "half", dim)]
    assert rows and all(row.num_warps in (4, 8) for row in rows)
    for arch in ARCHS:
        for dtype in tune.DTYPES.values():
            rows += configs.rows(arch, kernel, dtype).values()
    assert {type(row) for row in rows} == {tune.KERNELS[kernel]}


def test_family_of_an_unknown_architecture():
    known = {"sm_87": "sm_80", "sm_89": "sm_86", "sm_90": "sm_90", "sm_103": "sm_100", "sm_120": "sm_86"}
    assert {arch: configs.family(arch) for arch in known} == known
    assert configs.family("gfx950") == "gfx942"
