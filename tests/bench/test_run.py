"""The bench as a whole: planted faults, saved files, peak memory, and every wrong option in one line."""

import csv
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ercn import cli
from ercn._memory import LiveBytes
from ercn.benchmarks import memory, network, readme, results, run, settings, timing, variants, verify
from ercn.benchmarks.cases import AffinityCase, ModelCase, PoolCase
from ercn.benchmarks.compare import changes, compare
from ercn.benchmarks.config import BenchConfig, CompareConfig
from ercn.benchmarks.variants import Variant

CASE = AffinityCase(1, 5, 16, 12)
QUICK = BenchConfig(quick=True, memory=False)
PEAKS = {"gemm_gflops": {"float32": 100.0}, "fma_gflops": {}, "copy_gbps": 10.0}


def planted(monkeypatch, change, name="ercn-reference"):
    """Replaces a variant's runner by ``change(runner)``."""
    original = variants.variants

    def table(case, device, *rest):
        def make(make):
            return lambda case, inputs: change(make(case, inputs))

        return [replace(v, make=make(v.make)) if v.name == name else v for v in original(case, device, *rest)]

    monkeypatch.setattr(run, "variants", table)


def measured(case=CASE, config=QUICK):
    rows = run.measure(case, "cpu", config, PEAKS, lambda row: None)
    return {row["variant"]: row for row in rows}


def command(capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", *argv])
    output = capsys.readouterr()
    return exit.value.code, output.out, output.err


@pytest.mark.parametrize(
    "case",
    [
        replace(CASE, direction="backward"),
        replace(CASE, dtype="bfloat16", direction="forward_backward"),
        PoolCase(196, 128, 16, heads=2, direction="forward_backward"),
        PoolCase(256, 64, 16, layout="ragged", bags=4, direction="backward"),
        PoolCase(49, 64, 16, layout="map"),
    ],
    ids=lambda case: case.id,
)
def test_every_variant_has_a_row_with_its_numbers(case):
    rows = measured(case)
    assert set(rows) == {v.name for v in variants.variants(case, "cpu")}
    for name, row in rows.items():
        if row["status"] == "skipped":
            assert name.startswith(("ercn-cpu", "one_bag-cpu", "dropout-cpu")) and "backend 'cpu'" in row["reason"]
            continue
        assert row["status"] == "ok", row["reason"]
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["runs"] >= 3
        assert row["gflops"] == pytest.approx(row["flops"] / row["median_ms"] / 1e6)
        assert row["peak_share"] == pytest.approx(row["gflops"] / 100) or case.dtype != "float32"
        if name not in ("t_gemm", "t_mlp", "sdpa") and not name.startswith(("one_bag", "dropout")):
            assert row["error"] <= max(0.1 if name == "eager" else 0, 2 * row["judge_error"] + 0.01)
            assert (
                row["dense_gflops"] > 0
                and row["gbps"] > 0
                and row["ratios"]["eager" if name != "eager" else case.baseline]
            )


def test_a_network_case_runs_with_eager_and_our_operators():
    rows = measured(ModelCase(64, backbone="resnet18", direction="forward_backward"))
    assert {"eager", "ercn-auto", "ercn-reference"} <= set(rows)
    assert all(rows[name]["status"] == "ok" for name in ("eager", "ercn-auto", "ercn-reference"))


def test_settings_take_turns_with_the_cpu_backend():
    also = replace(QUICK, also="one_thread, float32")
    assert {name for name in measured(CASE, also) if "@" in name} == {"ercn-cpu@one_thread"}
    rows = measured(replace(CASE, dtype="bfloat16"), also)
    for name in ("ercn-cpu@one_thread", "ercn-cpu@float32"):
        row = rows[name]
        assert row["status"] == "ok", row["reason"]
        assert {"ercn-cpu", "t_gemm", "eager"} <= set(row["ratios"]) and row["runs"] == rows["ercn-cpu"]["runs"]
    assert not any("@" in name for row in rows.values() for name in row.get("ratios", ()))


def test_variants_can_be_left_out():
    rows = measured(CASE, replace(QUICK, without="compile, blockwise"))
    assert rows["eager"]["status"] == "ok" and not {"compile", "blockwise"} & set(rows)


def test_settings_hold_while_a_call_runs_and_no_longer(monkeypatch):
    seen = []

    def make(case, inputs):
        return lambda: seen.append((torch.get_num_threads(), os.environ.get(settings.ISA), inputs.tensors[0].dtype))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        case = replace(CASE, dtype="bfloat16")
        monkeypatch.setenv(settings.ISA, "avx512")
        calls = [settings.SETTINGS[name](make)(case, case.inputs("cpu")) for name in ("one_thread", "avx2", "float32")]
        for call in calls:
            call()
        assert torch.get_num_threads() == 2 and os.environ[settings.ISA] == "avx512"
        monkeypatch.delenv(settings.ISA)
        calls[1]()
        assert settings.ISA not in os.environ
    finally:
        torch.set_num_threads(before)
    half = torch.bfloat16
    assert seen == [(1, "avx512", half), (2, "avx2", half), (2, "avx512", torch.float32), (2, "avx2", half)]


SMALL_NETWORK = ModelCase(64, backbone="resnet18", direction="forward_backward")


def test_a_network_case_runs_in_half_precision():
    rows = measured(replace(SMALL_NETWORK, dtype="bfloat16"))
    assert all(rows[name]["status"] == "ok" for name in ("eager", "ercn-auto", "ercn-reference"))


def test_a_network_that_does_not_fit_is_a_row_with_the_reason(monkeypatch):
    need = network.live_bytes(SMALL_NETWORK)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0.5 * need)
    rows = measured(SMALL_NETWORK)
    assert {row["status"] for row in rows.values()} == {"skipped"} and {"eager", "ercn-reference"} <= set(rows)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    (row,) = measured(SMALL_NETWORK).values()
    assert row["status"] == "skipped" and row["reason"].startswith("inference in float64 does not fit: needs")


def test_a_network_without_room_for_eager_is_judged_by_the_reference(monkeypatch):
    case = replace(SMALL_NETWORK, image_size=128)
    need = network.live_bytes(case) + 0.5 * case.affinity_bytes()
    monkeypatch.setattr(memory, "free_bytes", lambda device: need / memory.RESERVE)
    rows = measured(case)
    assert rows["eager"]["status"] == "skipped" and rows["eager"]["expected_extra_mb"] > 0
    assert rows["ercn-auto"]["status"] == "ok" and rows["ercn-auto"]["judge"] == "ercn-reference"


def test_live_bytes_follow_allocation_and_release():
    with LiveBytes() as live:
        kept = torch.ones(1000)
        kept.view(10, 100)
        for _ in range(3):
            kept + 1
    assert live.peak == 8000 and live.now == 4000


def test_peak_memory_of_the_network_agrees_with_what_is_expected():
    expected = network.live_bytes(SMALL_NETWORK)
    peak = memory.cpu_peak(SMALL_NETWORK, "ercn-reference", 1)
    assert 0.9 * expected < peak < expected + 100e6


def test_without_the_check_nothing_is_judged(monkeypatch):
    monkeypatch.setattr(run, "Judge", None)
    rows = measured(config=replace(QUICK, check=False))
    assert rows["ercn-reference"]["status"] == "ok" and "error" not in rows["ercn-reference"]
    assert "not checked" in readme._line(list(rows.values()))


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    planted(monkeypatch, lambda runner: lambda: tuple(x * 1.001 for x in runner()))
    row = measured()["ercn-reference"]
    assert row["status"] == "wrong" and "wrong output" in row["reason"] and "median_ms" not in row
    assert row["error"] > 100 * row["judge_error"]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_kernel_that_returns_nan_gets_no_time(monkeypatch, broken):
    planted(monkeypatch, lambda runner: lambda: tuple(x + broken for x in runner()))
    assert measured()["ercn-reference"]["status"] == "wrong"


def test_a_wrong_gradient_gets_no_time(monkeypatch):
    def second_gradient_halved(runner):
        return lambda: tuple(x * (0.5 if i else 1) for i, x in enumerate(runner()))

    planted(monkeypatch, second_gradient_halved)
    assert measured(replace(CASE, direction="backward"))["ercn-reference"]["status"] == "wrong"


def test_a_crash_in_a_variant_is_a_row_and_the_others_go_on(monkeypatch):
    def crash():
        raise RuntimeError("planted\ncrash")

    planted(monkeypatch, lambda runner: crash)
    rows = measured()
    assert (
        rows["ercn-reference"]["status"] == "error"
        and rows["ercn-reference"]["reason"] == "RuntimeError: planted crash"
    )
    assert rows["eager"]["status"] == rows["blockwise"]["status"] == "ok"


def test_a_crash_outside_of_the_variants_is_a_row_and_the_next_case_goes_on(monkeypatch):
    original = run.inputs_of

    def inputs_of(case, device):
        if case.direction == "forward":
            raise RuntimeError("planted")
        return original(case, device)

    monkeypatch.setattr(run, "inputs_of", inputs_of)
    rows = run.run(BenchConfig(op="affinity", quick=True, memory=False, device="cpu"))["rows"]
    assert [(r["variant"], r["status"], r["reason"]) for r in rows if r["direction"] == "forward"] == [
        ("all", "error", "RuntimeError: planted")
    ]
    assert {r["direction"] for r in rows if r["status"] == "ok"} == {"backward", "forward_backward"}


def test_a_crash_in_a_case_loses_no_finished_row(monkeypatch, tmp_path):
    original, seen = run.measure, []

    def measure(case, *args):
        if seen:
            raise KeyboardInterrupt
        seen.append(case)
        return original(case, *args)

    monkeypatch.setattr(run, "measure", measure)
    save = tmp_path / "r.csv"
    with pytest.raises(KeyboardInterrupt):
        run.run(BenchConfig(op="affinity", quick=True, memory=False, device="cpu", save=str(save)))
    saved = results.load(save)
    assert {row["case"] for row in saved["rows"]} == {seen[0].id} and len(saved["rows"]) > 4


def test_rows_are_on_disk_as_soon_as_they_are_finished(tmp_path):
    writer = results.Writer(str(tmp_path / "r.csv"), {"environment": {}})
    writer.add({"case": "a", "status": "ok"})
    partial = tmp_path / "r.jsonl"
    with open(partial, "a") as file:
        file.write('{"case": "cut')  # as a kill leaves it
    assert results.load(partial)["rows"] == [{"case": "a", "status": "ok"}]


def test_an_infinite_error_can_be_saved(tmp_path):
    writer = results.Writer(str(tmp_path / "r.csv"), {"environment": {}})
    writer.add({"case": "a", "status": "wrong", "error": float("inf"), "nested": {"x": float("nan")}})
    writer.finish()
    assert results.load(tmp_path / "r.csv")["rows"] == [
        {"case": "a", "status": "wrong", "error": None, "nested": {"x": None}}
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two cases through the command line's function."""
    path = tmp_path_factory.mktemp("bench") / "run.csv"
    config = BenchConfig(quick=True, device="cpu", filter="affinity/forward/|mil/forward/", save=str(path), threads=1)
    run.run(config)
    return path


def test_the_file_states_environment_ceilings_and_method(saved):
    values = results.load(saved)
    environment = values["environment"]
    assert environment["cpu"] and environment["cpu_threads"] == 1 and environment["packages"]["torch"]
    assert environment["command"] and environment["backends"]["reference"] == "usable"
    ceilings = values["ceilings"]
    assert ceilings["gemm_gflops"]["float32"] > 1 and ceilings["copy_gbps"] > 0.1
    if values["environment"]["backends"]["cpu"] == "usable":
        assert ceilings["fma_gflops"]["float32"] > 1
    assert "perf_counter" in values["method"] and values["config"]["quick"] is True
    assert not saved.with_suffix(".jsonl").exists()


def test_every_csv_reader_sees_the_rows(saved):
    rows = results.load(saved)["rows"]
    with open(saved, newline="") as file:
        assert json.loads(file.readline().removeprefix("# "))["format"] == results.FORMAT
        table = list(csv.DictReader(file))
    assert [(r["case"], r["variant"], r["status"]) for r in table] == [
        (r["case"], r["variant"], r["status"]) for r in rows
    ]
    assert float(table[1]["ratios.t_gemm.median"]) == rows[1]["ratios"]["t_gemm"]["median"]


def test_what_is_written_is_read_again(tmp_path):
    cells = {
        "text": '1, not\n"one"\r', "number": "12", "word": "null", "empty": "", "none": None, "float": 1e-7,
        "flag": True, "list": [{"a": 1}], "ratios": {"a@b": {"median": 2.5}, "c": {"median": None}}, "nothing": {},
        "dots": {"x.y<2>": 1},
    }  # fmt: skip
    kinds = [{"ratios": {}}, {"ratios": None}, {"telemetry": {"clock": 1}}, {"telemetry": "none"}, {"telemetry": None}]
    for kind in itertools.permutations(kinds):
        rows = [{"case": str(i), **row} for i, row in enumerate([cells, *kind, {"late": 3}])]
        run = {"format": results.FORMAT, "environment": {"cpu": "a # b"}, "rows": rows}
        results.write(tmp_path / "r.csv", run)
        assert results.load(tmp_path / "r.csv") == run


@pytest.mark.parametrize("damage", ["a,ok,1,2\n", "a\n"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "r.csv"
    results.write(path, {"format": results.FORMAT, "rows": [{"case": "a", "status": "ok"}]})
    path.write_text(path.read_text() + damage)
    with pytest.raises(ValueError, match="r.csv is damaged"):
        results.load(path)
    path.with_suffix(".jsonl").write_text(f'{{"format": {results.FORMAT}}}\n{{cut}}\n')
    with pytest.raises(ValueError, match="r.jsonl is damaged"):
        results.load(path.with_suffix(".jsonl"))


def test_telemetry_says_why_it_is_absent(saved):
    assert all(row["telemetry"] == "no NVIDIA GPU is measured" for row in results.timed(results.load(saved)))


def test_peak_memory_is_in_the_rows(saved):
    for row in results.timed(results.load(saved)):
        assert row["peak_extra_mb"] is not None and 0 <= row["peak_extra_mb"] < 200, row["memory_note"]


def copy_of(saved, path, factor):
    """The file with the reference backend ``factor`` times as slow, and a spread of 1 % on every value."""
    values = results.load(saved)
    for row in results.timed(values):
        times = [row, *row["ratios"].values()]
        for entry, name in zip(times, ["median_ms"] + ["median"] * len(row["ratios"])):
            entry[name] *= factor if row["variant"] == "ercn-reference" else 1
            for low_or_high, share in (("p20", 0.99), ("p80", 1.01)):
                entry[name.replace("median", low_or_high)] = share * entry[name]
    results.write(path, values)
    return str(path)


@pytest.mark.parametrize("metric", ["ratio", "time"])
def test_a_planted_slowdown_is_found_and_the_same_run_is_not(saved, tmp_path, capsys, metric):
    before, after = copy_of(saved, tmp_path / "before.csv", 1), copy_of(saved, tmp_path / "after.csv", 2)
    assert compare(CompareConfig((before, before), metric)) == 0
    assert "0 slower, 0 lost, 0 faster" in capsys.readouterr().out
    assert compare(CompareConfig((before, after), metric)) == 1
    assert "2 slower" in capsys.readouterr().out
    assert compare(CompareConfig((after, before), metric)) == 0
    assert "2 faster" in capsys.readouterr().out


def test_a_kernel_that_does_its_work_three_times_is_found_by_measuring(monkeypatch):
    case, config = AffinityCase(1, 5, 192, 28), BenchConfig(memory=False, seconds=0, rounds=25)

    def thrice(runner):
        return lambda: (runner(), runner(), runner())[0]

    before = {"rows": list(measured(case, config).values())}
    planted(monkeypatch, thrice)
    after = {"rows": list(measured(case, config).values())}
    found = {change.variant: change.factor for change in changes(before, after, "ratio", 1.1)}
    assert found["ercn-reference"] > 1.7


def test_what_lost_its_time_is_a_regression(saved, tmp_path):
    values = results.load(saved)
    next(row for row in values["rows"] if row["variant"] == "ercn-reference")["status"] = "wrong"
    results.write(tmp_path / "after.csv", values)
    assert compare(CompareConfig((str(saved), str(tmp_path / "after.csv")))) == 1


def test_compare_limits_follow_the_noise():
    def one(median, spread):
        ratio = {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread)}
        row = {"case": "c", "variant": "v", "status": "ok", "baseline": "b", "ratios": {"b": ratio}}
        return {"rows": [row]}

    assert changes(one(1, 0.01), one(1.2, 0.01), "ratio", 1.1)[0].verdict == "slower"
    assert changes(one(1, 0.2), one(1.2, 0.2), "ratio", 1.1)[0].verdict == "same"
    assert changes(one(1, 0.2), one(2.0, 0.2), "ratio", 1.1)[0].verdict == "slower"
    assert changes(one(1, 0.01), one(0.5, 0.01), "ratio", 1.1)[0].verdict == "faster"


def test_rounds_are_interleaved_and_bounded():
    order = []
    runners = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = timing.interleave(runners, "cpu", seconds=0, min_rounds=20)
    rounds = ["".join(order[k : k + 3]) for k in range(0, 60, 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"} and all(len(v) == 20 for v in samples.values())
    assert {turn[0] for turn in rounds} == {turn[2] for turn in rounds} == set("abc")  # none always comes first
    assert len(timing.interleave(runners, "cpu", seconds=60, min_rounds=1, max_rounds=7)["a"]) == 7


def test_summary_and_paired_ratio():
    assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    # A machine that is twice as slow in half of the rounds changes times, not ratios.
    assert timing.paired_ratio([2, 4, 2, 4], [1, 2, 1, 2]) == (2, 2, 2)


@pytest.mark.parametrize("direction, buffers", [("forward", 2.07), ("forward_backward", 6.1)])
@pytest.mark.parametrize("side", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_peak_memory_of_eager_agrees_with_the_arithmetic(direction, buffers, side):
    case = AffinityCase(1, 5, 16, side, direction=direction)
    if reason := memory.does_not_fit(1.3 * case.eager_bytes(), 0, "cpu"):
        pytest.skip(reason)
    peak = memory.cpu_peak(case, "eager", torch.get_num_threads())
    assert case.eager_bytes() == pytest.approx(buffers * 4 * case.pixels**2)
    assert peak / (4 * case.pixels**2) == pytest.approx(buffers, rel=0.05)


def test_our_peak_memory_has_no_square_buffer():
    case = AffinityCase(1, 5, 16, 64, direction="forward")
    assert memory.cpu_peak(case, "ercn-reference", 1) < 4 * case.pixels**2


def test_a_failure_while_weighing_is_reported():
    with pytest.raises(OSError, match="StopIteration"):
        memory.cpu_peak(CASE, "no such variant", 1)


def test_what_does_not_fit_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100e3)
    rows = measured()  # eager needs 172 kB
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["reason"].startswith("does not fit: needs 0.0 GB by arithmetic")
    assert rows["eager"]["expected_extra_mb"] == pytest.approx(2.07 * 144**2 * 4 / 1e6)
    assert rows["ercn-reference"]["status"] == "ok" and rows["ercn-reference"]["judge"] == "blockwise"


def test_running_out_of_memory_is_a_row(monkeypatch):
    def out(*args):
        raise torch.OutOfMemoryError("tried to allocate 105 GB")

    planted(monkeypatch, lambda runner: out)
    row = measured()["ercn-reference"]
    assert row["status"] == "skipped" and "out of memory" in row["reason"]


def test_the_judge_is_the_rule_of_the_operator_tests():
    judge = verify.Judge(CASE, "cpu", "eager")
    good = next(v for v in variants.variants(CASE, "cpu") if v.name == "ercn-reference")

    def off_by(amount) -> Variant:
        def make(case, inputs):
            runner = good.make(case, inputs)
            scale = judge.exact[0].abs().max().item()
            return lambda: tuple(x + amount * scale for x in runner())

        return replace(good, make=make)

    limit = 2 * judge.error + 9 * torch.finfo(torch.float32).eps
    assert judge.verdict(good).reason is None
    assert judge.verdict(off_by(2 * limit)).reason is not None


def test_a_baseline_may_add_in_any_order_and_only_that():
    case = AffinityCase(1, 21, 64, 56)

    def running_sum(case, inputs):
        cam, feat = inputs.tensors
        aff = torch.relu(feat.mT @ feat)
        degree = torch.zeros_like(aff[:, 0])
        for row in aff.unbind(1):
            degree += row
        return lambda: (cam @ (aff / (degree.unsqueeze(1) + 1e-5)),)

    judge = verify.Judge(case, "cpu", "eager")
    baseline = Variant("running sum", "baseline", running_sum, lambda case: 0)
    assert judge.verdict(baseline).reason is None
    assert "wrong output" in judge.verdict(replace(baseline, role="ercn")).reason
    wrong = replace(baseline, make=lambda case, inputs: lambda: (running_sum(case, inputs)()[0] * (1 + 1e-5),))
    assert "wrong output" in judge.verdict(wrong).reason


def test_threads_are_set_stated_and_put_back(tmp_path):
    before = torch.get_num_threads()
    config = BenchConfig(quick=True, device="cpu", memory=False, filter="mil/forward/", threads=1)
    assert run.run(config)["environment"]["cpu_threads"] == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "argv, words",
    [
        (["pool"], ["'pool'", "affinity", "mil", "model", "compare"]),
        (["--device", "tpu"], ["'tpu'", "auto", "cpu", "cuda"]),
        (["--backend", "fast"], ["'fast'", "cpu", "reference"]),
        (["--direction", "sideways"], ["--direction", "sideways", "forward_backward"]),
        (["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["--also", "three_threads"], ["--also", "three_threads", "one_thread", "avx2"]),
        (["--also", "avx2", "--backend", "reference"], ["--also", "cpu backend", "'reference'"]),
        (["--filter", "("], ["--filter", "regular expression"]),
        (["--filter", "77x77"], ["no case matches", "affinity/forward"]),
        (["--quick", "--full"], ["--quick", "--full"]),
        (["--rounds", "many"], ["--rounds", "many"]),
        (["--fast"], ["--fast"]),
        (["affinity", "--quick", "--save", "x.txt"], ["save", ".csv", "x.txt"]),
        (["compare", "one.csv"], ["two result files"]),
        (["compare", "/nowhere/a.csv", "/nowhere/b.csv"], ["/nowhere/a.csv", "none"]),
        (["plot", "/nowhere/a.csv"], ["/nowhere/a.csv"]),
        (["readme", "/nowhere/a.csv", "--readme", "/nowhere/README.md"], ["/nowhere/README.md"]),
    ],
)
def test_wrong_input_is_one_line_that_names_the_choices(argv, words, capsys):
    if "--save" in argv:
        argv = [*argv, "--filter", "affinity/forward/"]
    code, _, err = command(capsys, *argv)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there(capsys):
    code, _, err = command(capsys, "--device", "cuda")
    assert code == 2 and "torch finds no GPU" in err


def test_a_file_that_is_no_result_is_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("{}")
    code, _, err = command(capsys, "compare", str(tmp_path / "a.csv"), str(tmp_path / "a.csv"))
    assert code == 2 and "a.csv is not a result file" in err
    code, _, err = command(capsys, "compare", str(tmp_path / "b.csv"), str(tmp_path / "a.csv"))
    assert code == 2 and "b.csv is no file" in err and "a.csv" in err.partition("result files in")[2]


def test_listing_and_selecting(capsys):
    code, out, _ = command(capsys, "affinity", "--list", "--device", "cpu", "--direction", "forward", "--full",
                           "--filter", "b1-c6-.*-256x256")  # fmt: skip
    assert code == 0 and len(out.splitlines()) == 8
    assert "affinity/forward/bfloat16/b1-c6-d192-256x256" in out.splitlines()


LEAN = "rich", "pynvml", "xdist", "pytest_benchmark", "timm", "lightning", "matplotlib"
PARSER = "jsonargparse", "docstring_parser", "yaml"


def without(modules, code, *argv):
    """Runs Python code where these modules cannot be imported."""
    blocker = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in {modules} else found(name, *rest)
"""
    return subprocess.run([sys.executable, "-c", blocker + code, *argv], capture_output=True, text=True, check=False)


def test_measuring_needs_torch_and_the_standard_library(tmp_path):
    save = tmp_path / "r.csv"
    config = BenchConfig(quick=True, memory=False, device="cpu", direction="forward", save=str(save))
    code = "from ercn.benchmarks import config, run\nrun.run(config."
    result = without((*LEAN, *PARSER), f"{code}{config!r})")
    assert result.returncode == 0, result.stderr
    assert {row["op"] for row in results.timed(results.load(save))} == {"affinity", "mil", "refinement", "walk"}
    assert "  eager: median ms " in result.stdout and "affinity/forward/" in result.stdout


@pytest.mark.parametrize("modules, missing", [(LEAN, "rich"), (PARSER, "jsonargparse")])
def test_a_missing_extra_is_named(modules, missing, saved):
    code = "from ercn.cli import main\nmain(sys.argv[1:])"
    result = without(modules, code, "bench", "compare", str(saved), str(saved))
    assert result.returncode == 2 and f"{missing} is not installed" in result.stderr and "ercn[bench]" in result.stderr


@pytest.mark.parametrize("argv", [[], ["compare"], ["plot"], ["readme"]])
def test_help_explains_every_option(argv, capsys):
    code, out, _ = command(capsys, *argv, "--help")
    assert code == 0 and f"ercn bench{' ' if argv else ''}{''.join(argv)}" in out


def test_the_command_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "ercn", "bench", "mil", "--quick", "--device", "cpu", "--direction", "forward"]
    save = tmp_path / "out" / "r.csv"
    result = subprocess.run([*command, "--save", str(save)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "mil/forward/float32/dense-n1024-d512-l128-k1" in result.stdout
    assert {row["op"] for row in results.load(save)["rows"]} == {"mil"}
    assert results.load(save)["environment"]["command"].startswith("ercn bench mil --quick")
