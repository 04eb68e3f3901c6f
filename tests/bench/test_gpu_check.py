"""The check for a machine with a GPU, run here on the emulator and the interpreter at toy sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import json
import os
import platform
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _cuda_emulator import load_operators

from ercn.benchmarks import gpu_check, gpu_pack, gpu_report, gpu_smoke, gpu_stages, results

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def a_run(folder, seconds=60.0, earlier=()):
    return gpu_stages.Run(folder, time.monotonic() + seconds, "", list(earlier))


def smoked(group, size=300, status="passed"):
    what = {name: getattr(group, name) for name in ("op", "direction", "kernels", "dtype", "dim", "layout")}
    return {"kind": "smoke", "name": group.name, "size": size, "status": status, "reason": "", **what}


def test_every_kernel_has_a_smoke_case():
    found = gpu_smoke.groups()
    assert found[0].name == "affinity forward, sm90, bfloat16, D 192, C 22"
    assert len({group.name for group in found}) == len(found)
    hopper = {(g.direction, g.kernels, g.dim, g.channels, g.dtype) for g in found if "sm90" in g.kernels and g.channels}
    assert len(hopper) == 3 * 4 * 3 * 2  # triangle, dense and backward; D; P; dtypes
    for kernels in ("generic", "triton"):
        for op in ("affinity", "pool"):
            ways = {(g.direction, g.dtype) for g in found if (g.op, g.kernels) == (op, kernels)}
            assert len(ways) == 2 * 4
    ways = {(g.op, g.direction, g.layout) for g in found if "scores" in g.op and g.kernels == "triton"}
    assert len(ways) == 2 * 2 * len(gpu_smoke.LAYOUTS)
    for kernels in ("sm90", "generic", "triton"):
        layouts = {g.layout for g in found if g.op == "pool" and g.kernels == kernels}
        assert layouts == set(gpu_smoke.LAYOUTS)
        assert {g.direction for g in found if (g.op, g.kernels) == ("scores", kernels)} == {"forward", "backward"}


def test_hanging_dying_and_failing_cases_are_named_and_the_rest_goes_on(monkeypatch):
    """The processes are forks, so they run the stand-ins for the kernels that are set here."""
    good, hanging, dying, wrong, last = gpu_smoke.groups("sm90, bfloat16")[:5]

    def run(group, size, device):
        if group == hanging and size == 20:
            time.sleep(60)
        if group == dying:
            os._exit(7)
        return ("wrong", "out differs") if group == wrong else ("passed", "")

    monkeypatch.setattr(gpu_smoke, "run", run)
    monkeypatch.setattr(gpu_smoke, "SIZES", {"cpu": (10, 20, 30)})
    monkeypatch.setattr(gpu_smoke, "SILENT_S", {"cpu": 3.0})
    rows = []
    gpu_smoke.smoke([good, hanging, dying, wrong, last], "cpu", 40, lambda kind, **row: rows.append((kind, row)))
    ends = {(row["name"], row["size"]): row["status"] for kind, row in rows if kind == "smoke"}
    assert len(ends) == 15
    for group, statuses in (
        (good, ["passed"] * 3),
        (hanging, ["passed", "killed", "not run"]),
        (dying, ["crashed", "not run", "not run"]),
        (wrong, ["wrong"] * 3),
        (last, ["passed"] * 3),
    ):
        assert [ends[group.name, size] for size in (10, 20, 30)] == statuses
    reasons = {row["name"]: row["reason"] for _, row in rows if row.get("status") == "crashed"}
    assert reasons == {dying.name: "its process ended with exit code 7"}


def test_kernels_of_a_kind_that_hangs_do_not_keep_the_others_waiting(monkeypatch):
    hopper, generic = gpu_smoke.groups("^affinity backward, sm90")[:6], gpu_smoke.groups("^affinity backward, generic")
    monkeypatch.setattr(gpu_smoke, "run", lambda group, *_: ("passed", time.sleep(60 * (group.kernels == "sm90"))))
    monkeypatch.setattr(gpu_smoke, "SILENT_S", {"cpu": 1.0})
    rows = []
    gpu_smoke.smoke(hopper + generic, "cpu", 40, lambda kind, **row: rows.append((kind, row)), side_by_side=2)
    rows = [row for kind, row in rows if kind == "smoke"]
    ends = Counter((row["kernels"], row["status"], row["reason"]) for row in rows)
    assert ends.pop(("generic", "passed", None)) == len(generic) and all(kernels == "sm90" for kernels, *_ in ends)
    assert ends["sm90", "not run", "3 others of its kind hung"] >= 2 and sum(ends.values()) == 6


def test_launches_before_a_hang_are_known(monkeypatch):
    from ercn import kernels

    @contextlib.contextmanager
    def counting():
        yield {"affinity.forward_kernel": 1}

    monkeypatch.setattr(kernels, "counting_launches", counting)
    monkeypatch.setattr(gpu_smoke, "SIZES", {"cpu": (10, 20)})
    monkeypatch.setattr(gpu_smoke, "run", lambda group, size, _: ("passed", "") if size == 10 else os._exit(7))
    names = []
    gpu_smoke.smoke(gpu_smoke.groups()[:1], "cpu", 40, lambda kind, **row: names.extend(row.get("names", ())))
    assert names == ["triton affinity.forward_kernel"]


def test_a_smoke_case_imports_no_compiler():
    """Each case runs in its own fork, which would import the compiler again."""
    code = "import sys; from ercn.benchmarks import gpu_smoke\nwith gpu_smoke.uninitialised_is_nan(): pass\n"
    code += "assert 'torch._inductor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_smoke_cases_out_of_time_are_listed(monkeypatch):
    groups = gpu_smoke.groups("generic")
    monkeypatch.setattr(gpu_smoke, "run", lambda *_: time.sleep(60))
    rows = []
    gpu_smoke.smoke(groups, "cpu", 0.5, lambda kind, **row: rows.append(row))
    assert {row["name"] for row in rows} == {group.name for group in groups}
    assert {(row["status"], row["reason"]) for row in rows} == {("not run", "out of time")}


def test_a_wrong_kernel_fails_its_case(monkeypatch):
    from ercn.ops import triton

    group = next(g for g in gpu_smoke.groups("^affinity forward, triton, float32"))
    monkeypatch.setattr(triton, "relu_affinity", lambda value, feat, plan: value @ (feat.mT @ feat))
    status, reason = gpu_smoke.run(group, 70, "cpu")
    assert status == "wrong" and "elements of out differ" in reason
    plans = []
    for kernels in ("triton", "triton_triangle"):
        monkeypatch.setattr(
            triton, "relu_affinity", lambda value, feat, plan: plans.append(plan) or value @ (feat.mT @ feat).relu()
        )
        assert gpu_smoke.run(dataclasses.replace(group, kernels=kernels), 70, "cpu") == ("passed", "")
    assert plans[0].band == 0 < plans[1].band


@pytest.mark.parametrize("group", [g for g in gpu_smoke.groups() if g.dtype == "bfloat16"], ids=lambda g: g.name)
def test_every_case_can_be_made(group):
    for size in (1, 16):
        assert all(x is not None for x in gpu_smoke.make(group, size, "cpu").expected.values())


def test_what_failed_is_not_timed_and_what_hung_is_not_tested(tmp_path):
    from ercn.benchmarks.cases import AffinityCase, PoolCase

    affinity, pool = gpu_smoke.groups()[0], next(g for g in gpu_smoke.groups() if g.op == "pool")
    run = a_run(tmp_path, earlier=[smoked(affinity, status="killed"), smoked(pool, status="wrong")])
    case = AffinityCase(1, 21, 192, 128, "forward", "bfloat16")
    assert gpu_stages._not_to_be_timed(run, case, "ercn-cuda").endswith("C 22, N 300 was killed")
    for other, variant in (
        (case, "ercn-cuda@generic"),
        (case, "ercn-cuda@sm90_dense"),
        (case, "ercn-triton"),
        (AffinityCase(1, 21, 64, 128, "forward", "bfloat16"), "ercn-cuda"),
        (AffinityCase(1, 21, 192, 128, "backward", "bfloat16"), "ercn-cuda"),
    ):
        assert gpu_stages._not_to_be_timed(run, other, variant) is None
    bag = PoolCase(4096, 512, 128, 1, direction=pool.direction, dtype="bfloat16")
    assert gpu_stages._not_to_be_timed(run, bag, "ercn-cuda").endswith("was wrong")
    ragged = next(g for g in gpu_smoke.groups() if (g.layout, g.direction) == ("ragged", pool.direction))
    for status, timed in (("wrong", True), ("killed", False)):
        run = a_run(tmp_path, earlier=[smoked(ragged, status=status)])
        assert (gpu_stages._not_to_be_timed(run, bag, "ercn-cuda") is None) == timed


def test_a_replay_keeps_the_memory_of_its_graph(monkeypatch):
    """Another capture unmaps memory that nobody owns."""
    from ercn.benchmarks.cases import AffinityCase
    from ercn.benchmarks.variants import inputs_of, variants

    case, owned = AffinityCase(1, 5, 8, 4), []
    (gemm,) = (variant for variant in variants(case, "cpu") if variant.name == "t_gemm")

    def make():
        call = gemm.make(case, inputs_of(case, "cpu"))
        owned.append(weakref.ref(inspect.getclosurevars(call).nonlocals["out"]))
        return call

    graph = SimpleNamespace(replay=lambda: None)
    for name, stand_in in (
        ("current_stream", lambda: None),
        ("stream", contextlib.nullcontext),
        ("synchronize", lambda: None),
        ("CUDAGraph", lambda: graph),
        ("graph", lambda graph, stream: contextlib.nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replay = gpu_stages._replayed(make, SimpleNamespace(wait_stream=lambda stream: None))
    gc.collect()
    assert owned[0]() is not None
    del replay
    gc.collect()
    assert owned[0]() is None


def test_a_product_that_fails_leaves_the_other_times(tmp_path, monkeypatch, capsys):
    from ercn.benchmarks import variants
    from ercn.benchmarks.cases import AffinityCase

    def fails(case, inputs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu_stages.Run, "device", "cpu")
    monkeypatch.setattr(variants, "_t_gemm", fails)
    case = AffinityCase(1, 5, 8, 4, direction="forward", dtype="float32")
    gpu_stages._time(a_run(tmp_path), case, None)
    rows = {row["variant"]: row for row in gpu_check.rows(tmp_path / gpu_check.RESULTS)}
    assert rows["t_gemm"]["status"] == "not done" and "no room" in rows["t_gemm"]["reason"]
    assert rows["ercn-cpu"]["status"] == rows["copy"]["status"] == "passed"
    assert f"{case.id} ercn-cpu\n" in capsys.readouterr().out
    line = next(line for line in gpu_report.render(list(rows.values())).splitlines() if line.startswith(f"| {case.id}"))
    assert line.startswith(f"| {case.id} | not done | ") and "×" not in line


def test_a_test_that_takes_its_worker_down_has_a_reason():
    report = pytest.TestReport("t", ("t", 0, "t"), {}, "failed", "worker 'gw1' crashed while running 't'", "call")
    assert gpu_stages._last_words(report) == "worker 'gw1' crashed while running 't'"


@pytest.mark.parametrize("op", ["affinity", "pool"])
def test_keywords_choose_tests_of_the_kernels(op):
    from _pytest.mark.expression import Expression

    tests = {
        "sm90": f"test_gpu_exact.py test_{op}_at_sizes[cuda sm90-64]",
        "sm90_dense": f"test_gpu_exact.py test_{op}_at_sizes[cuda sm90_dense-64]",
        "generic": f"test_gpu_exact.py test_{op}[cuda generic-64]",
        "triton": f"test_gpu_exact.py test_{op}[triton-64]",
        "hopper": f"{next(name for name in gpu_stages.TESTS if name.endswith(op + '_hopper.py'))} test_edges",
    }
    also = {"sm90": ("sm90_dense", "hopper")}
    for kernels in ("sm90", "sm90_dense", "generic", "triton", "triton_triangle"):
        words = Expression.compile(gpu_stages._keywords(op, kernels))
        left_out = {name for name, text in tests.items() if words.evaluate(lambda word, text=text: word in text)}
        assert left_out == {kernels.partition("_triangle")[0], *also.get(kernels, ())}
        assert not words.evaluate(lambda word: word in "test_gpu_exact.py test_other[cuda sm90 generic triton]")


def test_tile_sizes_are_tried_in_turn_and_compiled_beside_each_other(tmp_path, monkeypatch):
    from ercn.kernels import configs, tune

    def fastest(table, arch, kernel, kind, dim, rows):
        with open(tmp_path / "tried", "a") as stream:
            stream.write(f"{kernel} {rows}\n")
        return rows[-1] if rows else None

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(configs, "arch", lambda device: "sm_90")
    monkeypatch.setattr(tune, "fastest", fastest)
    monkeypatch.setattr(gpu_stages.Run, "device", "cuda")
    monkeypatch.setattr(gpu_stages, "TUNED", gpu_stages.TUNED[:2])
    monkeypatch.setattr(gpu_stages, "WORKERS", 3)
    gpu_stages.tuning(a_run(tmp_path))
    rows = gpu_check.rows(tmp_path / gpu_check.RESULTS)
    assert [row["name"] for row in rows] == [f"{kernel}, D {dim}" for kernel, dim in gpu_stages.TUNED]
    assert all(10 <= row["tried"] <= gpu_stages.CANDIDATES + 1 and row["best"] != row["shipped"] for row in rows)
    tried = (tmp_path / "tried").read_text().splitlines()
    assert len(tried) == (3 + 1) * 2 and len(max(tried, key=len)) > 2 * len(tried[0])
    monkeypatch.setattr(gpu_stages, "_side_by_side", lambda *_: None)
    gpu_stages.tuning(a_run(tmp_path, seconds=3))
    late = gpu_check.rows(tmp_path / gpu_check.RESULTS)[len(rows) :]
    assert [(row["name"], row["status"]) for row in late] == [(row["name"], "not done") for row in rows]
    text = gpu_report.render(rows + late)
    assert "- tuning triangle, D 192: **not done**: out of time" in text and text.count("| triangle, D 192 |") == 1


@pytest.mark.parametrize(("spilled", "time"), [(0, 0.5), (8, float("inf"))])
def test_tile_sizes_that_spill_are_not_timed(monkeypatch, spilled, time):
    triton = pytest.importorskip("triton")
    from ercn.kernels import tune

    @triton.jit
    def kernel():
        pass

    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *, grid, warmup: SimpleNamespace(n_spills=spilled))
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, return_mode: 0.5)
    assert tune.milliseconds(lambda: kernel[1,]()) == time


def test_bench_that_is_out_of_time_keeps_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages.Run, "device", "cpu")
    gpu_stages.bench(a_run(tmp_path, seconds=gpu_stages.CASE_S - 1))
    assert results.load(tmp_path / "bench.csv")["rows"] == []
    (row,) = gpu_check.rows(tmp_path / gpu_check.RESULTS)
    assert row["status"] == "not done" and row["name"].startswith("2 cases from affinity/")


def test_a_pack_of_other_sources_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_pack, "PACK", tmp_path)
    assert gpu_pack.refusal() is None and "there is no" in gpu_pack.unpack()
    held = {"sources": "0", "machine": "of another kind", "commit": "abc"}
    (tmp_path / "manifest.json").write_text(json.dumps(held))
    assert gpu_pack.refusal() is None and "for this machine" in gpu_pack.unpack()
    held["machine"] = platform.machine()
    (tmp_path / "manifest.json").write_text(json.dumps(held | {"sources": gpu_pack.sources()}))
    assert gpu_pack.refusal() is None
    (tmp_path / "manifest.json").write_text(json.dumps(held))
    with pytest.raises(SystemExit) as stopped:
        gpu_stages.libraries(a_run(tmp_path))
    assert stopped.value.code == gpu_check.REFUSED and "pack again" in capsys.readouterr().out


@pytest.mark.slow
def test_triton_kernels_travel(tmp_path, monkeypatch):
    """Another process compiles them for another folder; a launch here must find them."""
    triton = pytest.importorskip("triton")
    group = gpu_smoke.groups("^affinity forward, triton, bfloat16")
    one = "gpu_smoke.groups = lambda only, every=gpu_smoke.groups: every('^affinity forward, triton, bfloat16'); "
    monkeypatch.setattr(gpu_pack, "COMPILE", gpu_pack.COMPILE.replace("gpu_smoke; ", f"gpu_smoke; {one}"))
    monkeypatch.setattr(gpu_pack, "PACK", tmp_path)
    monkeypatch.setattr(gpu_pack, "TRITON", tmp_path / "triton")
    gpu_pack.compile_triton(sys.executable)
    gpu_pack.unpack_triton()
    found = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(gpu_smoke, "groups", lambda only: group)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: found.append(what["cache_hit"]))
    gpu_smoke.compile_ahead("sm_90")
    assert len(found) >= 2 and all(found)


def test_time_is_kept_for_later_stages_and_nobody_waits_for_a_stage(tmp_path):
    stage = gpu_check.Stage("smoke", 70, kept=60)
    assert gpu_check.run_stage(stage, ["smoke"], time.monotonic() + 61, tmp_path) == "not done"
    code = gpu_check._wait(0.5, [sys.executable, "-c", "import time; time.sleep(60)"])
    assert code is None
    (row,) = gpu_check.rows(tmp_path / gpu_check.RESULTS)
    assert row["status"] == "not done" and "of which 60 are kept" in row["reason"]


def test_a_line_that_was_cut_is_left_out(tmp_path):
    gpu_check.record(tmp_path, "note", text="whole")
    with open(tmp_path / gpu_check.RESULTS, "a") as stream:
        stream.write('{"kind": "note", "te')
    assert gpu_check.rows(tmp_path / gpu_check.RESULTS) == [{"kind": "note", "text": "whole"}]


def test_a_report_names_what_is_bad_and_what_was_never_launched():
    kernel = {"kind": "kernel", "registers": 168, "local_bytes": 0, "static_shared_bytes": 0, "threads": 384}
    kernel |= {"dynamic_shared_bytes": 1000, "blocks_per_multiprocessor": 1}
    time_of = {"kind": "time", "case": "affinity/forward", "status": "passed", "p20_ms": 0.1, "p80_ms": 0.3}
    text = gpu_report.render(
        [
            smoked(gpu_smoke.groups()[0], status="killed"),
            {"kind": "test", "name": "tests/test_x.py::test_y", "status": "failed", "reason": "E  3 != 4"},
            {"kind": "kernels", "names": ["cuda Forward", "cuda Backward", "triton affinity.combine_kernel"]},
            {"kind": "launched", "names": ["cuda Forward"], "by": "smoke"},
            {**kernel, "name": "Forward", "launches": 0},
            {**kernel, "name": "Backward", "launches": 2},
            {**time_of, "variant": "t_gemm", "median_ms": 0.2, "ratio": 1.0},
            {**time_of, "variant": "copy", "median_ms": 0.2, "ratio": 1.0, "bytes": 6e8},
            {**time_of, "variant": "ercn-cuda", "median_ms": 0.15, "ratio": 0.75},
        ]
    )
    assert "- smoke affinity forward, sm90, bfloat16, D 192, C 22, N 300: **killed**" in text
    assert "- test tests/test_x.py::test_y: **failed**: E  3 != 4" in text
    assert "## Never launched\n\n- triton affinity.combine_kernel\n" in text
    assert "| affinity/forward | 0.2 (0.1–0.3) | 3.00 | 0.15 (0.1–0.3), 0.75× |" in text
    assert "| Backward | 168 | 0 | 1000 | 384 | 1 |" in text and "| Forward |" not in text


def check(command, folder, *options, words, path=""):
    """Run the script on the emulator and the interpreter, with the tests that match these words."""
    environment = os.environ | {"ERCN_CUDA_EMULATED": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = f"[item for item in items if all(word in item.nodeid for word in {words.split()})]"
    plugin = f"def pytest_collection_modifyitems(items):\n    items[:] = {found}\n"
    (folder.parent / "only_few.py").write_text(plugin)
    paths = os.pathsep.join([str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTEST_ADDOPTS": "-p only_few", "PYTHONPATH": paths}
    environment["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    environment.pop("PYTEST_CURRENT_TEST", None)
    command = [sys.executable, SCRIPT, command, "--out", folder, *options]
    result = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    rows = gpu_check.rows(folder / gpu_check.RESULTS)
    stages = {row["name"]: row["status"] for row in rows if row["kind"] == "stage"}
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    return result, rows, stages, result.stdout + result.stderr + log[-4000:]


@pytest.mark.slow
def test_all_of_it_here(tmp_path):
    load_operators()  # so that no stage spends its time on compiling the emulator
    _, rows, stages, log = check(
        "first",
        tmp_path / "first",
        "--seconds=900",
        "--only=^affinity (forward|backward), sm90, bfloat16, D 64, C (7|22)$|^affinity f.*triton, float16",
        words="gpu_exact hopper 64-7-torch.bfloat16",
    )
    assert stages == dict.fromkeys(("libraries", "environment", "smoke", "tests", "timing"), "done"), log
    ends = [row["status"] for row in rows if row["kind"] == "smoke"]
    assert ends == ["passed"] * 5, log
    assert any(row["kind"] == "time" and row["variant"] == "ercn-cpu" for row in rows)
    launched = {name for row in rows if row["kind"] == "launched" and row["by"] == "tests" for name in row["names"]}
    assert "cuda ercn::sm90::affinity::Forward<ercn::arch::bf16, 64, 8>" in launched
    failed = tmp_path / "failed.jsonl"
    group = gpu_smoke.groups("^pool forward, sm90, bfloat16, rows")[0]
    rest = {"kind": "test", "name": "the rest", "status": "not run"}
    failed.write_text(f"{json.dumps(smoked(group, status='killed'))}\n{json.dumps(rest)}\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("compute-sanitizer", "ncu"):  # both run their cases
        lines = f"#!{sys.executable}", "import os, sys", "at = sys.argv.index(sys.executable)"
        (tools / name).write_text("\n".join([*lines, "os.execv(sys.argv[at], sys.argv[at:])", ""]))
        (tools / name).chmod(0o755)
    _, rows, stages, log = check(
        "next",
        tmp_path / "next",
        "--seconds=1200",
        "--stages=environment,failures,hardware,sanitizers,tuning,bench,profile",
        f"--failed={failed}",
        "--only=^affinity forward, sm90, bfloat16, D 64, C 7$",
        words="nothing",
        path=str(tools),
    )
    assert set(stages.values()) == {"done"} and len(stages) == 7, log
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("smoke", "sanitizer", "profile", "note")}
    assert [(row["name"], row["status"]) for row in of["smoke"]] == [(group.name, "passed")]
    assert [(row["name"], row["status"], len(row["cases"])) for row in of["sanitizer"]] == [
        (tool, "passed", 1) for tool in gpu_stages.TOOLS
    ]
    assert [row["status"] for row in of["profile"]] == ["passed", "passed"], log
    assert "tuning needs a GPU" in [row["text"] for row in of["note"]]
    assert results.load(tmp_path / "next" / "bench.csv")["rows"]
    assert len(list((tmp_path / "next").iterdir())) <= 8
    command = [sys.executable, SCRIPT, "report", tmp_path / "first", tmp_path / "next"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "## Smoke cases" in text and "## Headline" in text and "## Sanitizers" in text


@pytest.mark.slow
def test_out_of_time_leaves_whole_files(tmp_path):
    options = "--seconds=8", "--stages=smoke,tests,timing"
    result, rows, stages, log = check("first", tmp_path / "first", *options, words="gpu_exact")
    assert result.returncode == 1 and rows, log
    assert set(stages) == {"smoke", "tests", "timing"}
    assert stages["smoke"] == stages["timing"] == "not done" != stages["tests"]
    assert "**not done**" in (tmp_path / "first" / "report.md").read_text()
