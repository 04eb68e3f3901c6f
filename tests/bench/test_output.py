"""Plots, the performance tables, and telemetry, on small result files."""

import sys
import types
from pathlib import Path

import pytest

from ercn.benchmarks import readme, results
from ercn.benchmarks.config import PlotConfig, ReadmeConfig
from ercn.benchmarks.plots import plot
from ercn.benchmarks.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[2]


def row(side, variant, status="ok", **more):
    case = f"affinity/forward/float32/b1-c6-d192-{side}x{side}"
    ms = {"eager": 2.5, "t_gemm": 1.0}.get(variant, 0.5) * side
    values = {
        "case": case, "op": "affinity", "direction": "forward", "dtype": "float32", "shape": case.rsplit("/", 1)[1],
        "series": "B 1, C 6, D 192", "size": side**2, "baseline": "t_gemm", "device": "cpu", "variant": variant,
        "status": status, "reason": None if status == "ok" else "does not fit: needs 105.0 GB",
    }  # fmt: skip
    if status == "ok":
        values |= {
            "median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "runs": 9, "flops": 1e9, "dense_flops": 1e9,
            "min_bytes": 1e6, "gflops": 1e3 / ms, "dense_gflops": 1e3 / ms, "peak_share": 0.5, "gbps": 1.0,
            "peak_extra_mb": 12.5 * side, "error": 1e-6, "judge": "eager", "judge_error": 2e-6,
            "ratios": {name: {"median": ms / base / side, "p20": 0.9, "p80": 1.1}
                       for name, base in (("t_gemm", 1.0), ("eager", 2.5)) if name != variant},
        }  # fmt: skip
    return values | more


@pytest.fixture
def file(tmp_path):
    environment = {
        "device": "cpu", "cpu": "Some CPU", "cpu_threads": 2, "cpu_count": 2, "packages": {"torch": "2.14.1"},
        "command": "ercn bench affinity --save r.csv", "git": {"commit": "0123456789abcdef", "dirty": False},
    }  # fmt: skip
    rows = [row(side, variant) for side in (28, 56) for variant in ("t_gemm", "eager", "ercn-cpu")]
    rows += [row(128, "t_gemm"), row(128, "ercn-cpu", judge="blockwise"),
             row(128, "eager", "skipped", expected_extra_mb=105_000.0)]  # fmt: skip
    ceilings = {"gemm_gflops": {"float32": 180.0}, "fma_gflops": {"float32": 235.0}, "copy_gbps": 30.0, "note": ""}
    path = tmp_path / "r.csv"
    run = {"format": results.FORMAT, "environment": environment, "ceilings": ceilings, "rows": rows}
    results.write(path, run)
    return path


def test_plots_are_written_as_png_and_svg(file, tmp_path):
    assert plot(PlotConfig((str(file), str(file)), str(tmp_path / "plots"))) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    wanted = ("roofline", "ratios", "time_affinity", "memory_affinity")
    assert names == {f"{name}.{suffix}" for name in wanted for suffix in ("png", "svg")}
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_the_eager_line_ends_where_it_has_no_room(file):
    from ercn.benchmarks.plots import against_size

    run = results.load(file)
    axis = against_size([run], ["title"], "affinity", "median_ms", "ms").axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert lines["eager"].get_xdata().max() == 56**2 and lines["ercn-cpu"].get_xdata().max() == 128**2
    assert any("no room at 16,384" in text.get_text() for text in axis.texts)


def test_plots_need_a_time(file, tmp_path):
    values = results.load(file)
    results.write(file, values | {"rows": []})
    with pytest.raises(ValueError, match="no row with a time"):
        plot(PlotConfig((str(file),), str(tmp_path)))


def test_the_readme_section_states_its_origin_and_is_stable(file, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"# ercn\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n")
    assert readme.readme(ReadmeConfig((str(file),), str(page))) == 0
    text = page.read_text()
    assert (
        text.startswith(f"# ercn\n\n{readme.BEGIN}\n")
        and text.endswith(f"{readme.END}\n\nafter\n")
        and "old" not in text
    )
    for words in (
        "Some CPU, 2 threads of 2 cores",
        "`ercn bench affinity --save r.csv`",
        "0123456789ab",
        "torch 2.14.1",
    ):
        assert words in text
    line = next(line for line in text.splitlines() if "c6-d192-28x28" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "affinity forward, float32, b1-c6-d192-28x28", "cpu", "14 (12.6–15.4)", "0.50", "–", "70", "5.00×", "350.0",
        "–", "350.0", "1.0e-06", "2.0e-06",
    ]  # fmt: skip
    beyond = next(line for line in text.splitlines() if "c6-d192-128x128" in line)
    assert "skipped" in beyond and "needs 105,000" in beyond
    assert "No GPU has been measured yet" in text
    readme.readme(ReadmeConfig((str(file),), str(page)))
    assert page.read_text() == text


def test_settings_have_a_table_of_their_own_and_are_not_the_fastest_of_ours(file):
    values = results.load(file)
    slow = row(28, "ercn-cpu")
    ratios = slow["ratios"] | {"ercn-cpu": {"median": 0.5, "p20": 0.4, "p80": 0.6}}
    values["rows"].append(slow | {"variant": "ercn-cpu@one_thread", "median_ms": 7.0, "ratios": ratios})
    results.write(file, values)
    lines = readme.render([("r.csv", results.load(file))]).splitlines()
    found = [line for line in lines if "c6-d192-28x28" in line]
    assert len(found) == 2 and "| cpu | 14 (" in found[0]
    assert [cell.strip() for cell in found[1].strip("|").split("|")][1:] == [
        "cpu, one thread", "7 (12.6–15.4)", "0.50", "0.50",
    ]  # fmt: skip


def test_the_reference_has_columns_of_its_own(file):
    values = results.load(file)
    values["rows"].append(row(28, "ercn-reference") | {"median_ms": 140.0, "peak_extra_mb": 420.0})
    results.write(file, values)
    lines = readme.render([("r.csv", results.load(file))]).splitlines()
    cells = [cell.strip() for cell in next(x for x in lines if "c6-d192-28x28" in x).strip("|").split("|")]
    assert cells[1] == "cpu" and cells[4] == "140" and cells[8] == "420.0"


def test_gpu_results_take_the_disclaimer_away(file, tmp_path):
    values = results.load(file)
    values["environment"] |= {"device": "cuda", "gpu": "Some GPU", "driver": "600.1", "cuda": "13.0"}
    results.write(file, values)
    text = readme.render([("gpu.csv", results.load(file))])
    assert "Some GPU, driver 600.1, CUDA 13.0" in text and "No GPU" not in text


@pytest.mark.parametrize("text", ["", "{begin}", "{end}{begin}", "{begin}{begin}{end}"])
def test_missing_markers_are_an_error(file, tmp_path, text):
    page = tmp_path / "README.md"
    page.write_text(text.format(begin=readme.BEGIN, end=readme.END))
    with pytest.raises(ValueError, match="performance:begin"):
        readme.readme(ReadmeConfig((str(file),), str(page)))


class FakeNVML(types.ModuleType):
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self):
        super().__init__("pynvml")
        self.energy, self.fail = 1000, False

    def nvmlInit(self):
        if self.fail:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000

    def nvmlDeviceGetTemperature(self, handle, kind):
        return 61

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(used=2_000_000_000)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return 0x4 | 0x1

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.energy


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_telemetry_samples_while_something_runs(nvml):
    with Telemetry("cuda") as telemetry:
        pass
    assert telemetry.summary() == {
        "sm_clock_mhz": 1755, "memory_clock_mhz": 2619, "power_w": 650.0, "temperature_c": 61,
        "memory_used_mb": 2000.0, "throttle_reasons": "software power cap",
    }  # fmt: skip


def test_energy_per_call(nvml):
    def run():
        nvml.energy += 7  # millijoules

    assert Telemetry("cuda").energy_mj(run, lambda: None, seconds=0.01) == pytest.approx(7)


def test_telemetry_without_a_driver_says_so(nvml):
    nvml.fail = True
    with Telemetry("cuda") as telemetry:
        pass
    assert telemetry.summary() == {} and "Driver Not Loaded" in telemetry.reason
    assert telemetry.energy_mj(lambda: None, lambda: None) is None


def test_telemetry_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'ercn[bench]'" in Telemetry("cuda").reason
