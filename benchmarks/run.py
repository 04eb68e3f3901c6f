"""Runs the chosen cases: checks, times, measures memory; prints a table per case, appends rows to the file."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from ercn.benchmarks import kernels, memory, network, timing
from ercn.benchmarks.cases import OPS, Case, Inputs, ModelCase, suite
from ercn.benchmarks.ceilings import ceilings, describe, peak_gflops
from ercn.benchmarks.config import BenchConfig
from ercn.benchmarks.environment import environment, machine
from ercn.benchmarks.results import Row, Writer, sentence
from ercn.benchmarks.settings import precision
from ercn.benchmarks.table import screen
from ercn.benchmarks.telemetry import Telemetry
from ercn.benchmarks.variants import SETTABLE, Variant, inputs_of, variants
from ercn.benchmarks.verify import Judge
from ercn.ops import backends

QUICK_SECONDS, QUICK_ROUNDS = 0.5, 3
# The judge of errors where eager does not fit in memory.
SUBSTITUTE = {"affinity": "blockwise", "mil": "blockwise"} | dict.fromkeys(
    ("refinement", "walk", "model", "overhead"), "ercn-reference"
)


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure and return what ``--save`` writes. ValueError names the choices where an option is wrong."""
    device = _device(config.device)
    cases = select(config, device)
    if config.list:
        for case in cases:
            print(case.id)
        return {"rows": []}
    with _threads(config.threads):
        return measure_cases(config, cases, device)


def select(config: BenchConfig, device: str) -> list[Case]:
    """The cases that the options ask for."""
    if config.op not in (*OPS, "all"):
        raise ValueError(f"{config.op!r} is no op; there are {', '.join((*OPS, 'all'))}")
    names = [b.name for b in backends()]
    if config.backend and config.backend not in names:
        raise ValueError(f"{config.backend!r} is no backend; there are {', '.join(names)}")
    settable, known = SETTABLE[device]
    unknown = [name for name in settings(config) if name not in known]
    if unknown:
        raise ValueError(f"--also {unknown[0]!r} is no setting on {device}; there are {', '.join(known)}")
    own = settable.removeprefix("ercn-")
    if config.also and config.backend not in ("", own):
        raise ValueError(f"--also repeats the {own} backend on {device}; got backend {config.backend!r}")
    if config.quick and config.full:
        raise ValueError("--quick and --full exclude each other")
    try:
        pattern = re.compile(config.filter)
    except re.error as error:
        raise ValueError(f"--filter {config.filter!r} is no regular expression: {error}") from error
    chosen = suite(config.op, device, "quick" if config.quick else "full" if config.full else "standard")
    cases = [
        case
        for case in chosen
        if config.direction in ("all", case.direction)
        and config.dtype in ("all", case.dtype)
        and pattern.search(case.id)
    ]
    if not cases:
        examples = ", ".join(case.id for case in chosen[:3]) or "none; --full has more"
        raise ValueError(f"no case matches; of {len(chosen)} on {device} the first are {examples}")
    return cases


def settings(config: BenchConfig) -> list[str]:
    return _names(config.also)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"{name!r} is no device; there are auto, cpu, cuda")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' cannot be used: torch finds no GPU here; use cpu or auto")
    return name


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_cases(config: BenchConfig, cases: list[Case], device: str, until: float = float("inf")) -> dict[str, Any]:
    """``run`` for given cases in the given order. until: no case begins after it, on time.monotonic's clock."""
    timing.keep_freed_memory()
    shown, values = screen(), environment(device)
    shown.note(f"{machine(values)}; torch {values['packages']['torch']}; {len(cases)} cases")
    size, rounds = (1024, 2) if config.quick else (None, 5)
    peaks = ceilings(device, ["float32", *(case.dtype for case in cases)], size=size, rounds=rounds)
    shown.note(describe(peaks))
    header = {"environment": values, "config": asdict(config), "ceilings": peaks, "method": timing.METHOD[device]}
    writer = Writer(config.save, header)
    try:
        with shown.progress(len(cases)):
            for case in cases:
                if time.monotonic() > until:
                    break
                shown.starts(case)
                shown.finished(case, measure(case, device, config, peaks, writer.add))
    finally:
        writer.finish()
    for line in kernels.described(writer.rows):
        shown.note(line)
    return {**writer.header, "rows": writer.rows}


def measure(
    case: Case, device: str, config: BenchConfig, peaks: dict[str, Any], done: Callable[[Row], None]
) -> list[Row]:
    """All rows of a case; each goes to ``done`` when it is complete. Whatever fails becomes a row that says so."""
    rows: list[Row] = []

    def finish(row: Row) -> None:
        rows.append(row)
        done(row)

    def refuse(variant: str, status: str, reason: str, **more: Any) -> None:
        finish(_row(case, device, variant, status, reason) | more)

    if config.check and isinstance(case, ModelCase) and (reason := network.obstacle(case, device)):
        refuse("all", "skipped", reason)
        return rows
    try:
        inputs = inputs_of(case, device)
        with precision(case.dtype):
            ready = _prepare(case, inputs, device, config, refuse)
            _time(case, inputs, device, config, peaks, ready, finish, refuse)
    except Exception as error:  # noqa: BLE001 - one case must not end the run
        refuse("all", "error", sentence(error))
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _prepare(case: Case, inputs: Inputs, device: str, config: BenchConfig, refuse: Callable) -> dict[Variant, Row]:
    """The variants that run, fit in memory and are right, each with its row so far."""
    fitting: list[Variant] = []
    held = 0.0
    table = variants(case, device, config.backend, settings(config))
    for variant in (v for v in table if v.name not in _names(config.without)):
        reason = variant.obstacle(case, inputs)
        needed = variant.bytes(case) + variant.held(case)
        if reason is None:
            reason = memory.does_not_fit(needed, held, device)
        if reason is not None:
            refuse(variant.name, "skipped", reason, expected_extra_mb=needed / 1e6)
            continue
        held += variant.held(case)
        fitting.append(variant)
    if not config.check:
        return {variant: {} for variant in fitting}
    if not fitting:
        return {}
    names = [v.name for v in fitting]
    judge = Judge(case, device, "eager" if "eager" in names else SUBSTITUTE[case.op])
    ready = {}
    for variant in fitting:
        if variant.role == "yardstick":
            ready[variant] = {}
            continue
        try:
            verdict = judge.verdict(variant)
        except Exception as error:  # noqa: BLE001
            refuse(variant.name, *_failure(error))
            continue
        checked = {"error": verdict.error, "judge": verdict.judge, "judge_error": verdict.judge_error}
        if verdict.reason is not None:
            refuse(variant.name, "wrong", verdict.reason, **checked)
        else:
            ready[variant] = checked
    return ready


def _time(
    case: Case,
    inputs: Inputs,
    device: str,
    config: BenchConfig,
    peaks: dict[str, Any],
    ready: dict[Variant, Row],
    finish: Callable[[Row], None],
    refuse: Callable,
) -> None:
    runners: dict[str, Callable[[], object]] = {}
    for variant, row in list(ready.items()):
        try:
            row["peak_extra_mb"], row["memory_note"] = _peak(case, inputs, device, variant, config)
            runners[variant.name] = variant.make(case, inputs)
            with kernels.launched() as row["kernels"]:
                row["first_call_ms"] = _first_call(runners[variant.name], device)
        except Exception as error:  # noqa: BLE001
            runners.pop(variant.name, None)
            del ready[variant]
            refuse(variant.name, *_failure(error))
    seconds, rounds = (QUICK_SECONDS, QUICK_ROUNDS) if config.quick else (config.seconds, config.rounds)
    telemetry = Telemetry(device)
    with telemetry:
        samples = timing.interleave(runners, device, seconds=seconds, min_rounds=rounds)
    seen = telemetry.summary()
    for variant, known in ready.items():
        row = _row(case, device, variant.name, "ok", None) | known
        row |= _rates(case, variant, samples, peaks)
        if variant.name == "eager":
            row["expected_extra_mb"] = variant.bytes(case) / 1e6
        if device == "cuda":
            run = runners[variant.name]
            if row["median_ms"] < timing.GRAPH_BELOW_MS:
                row["graph_ms"], row["graph_note"] = _graph(run)
            row["energy_mj"] = telemetry.energy_mj(run, torch.cuda.synchronize)
        finish(row | {"telemetry": seen or telemetry.reason})


def _peak(
    case: Case, inputs: Inputs, device: str, variant: Variant, config: BenchConfig
) -> tuple[float | None, str | None]:
    if not config.memory:
        return None, "not asked for"
    if device == "cuda":
        return memory.cuda_peak(lambda: variant.make(case, inputs)) / 1e6, None
    try:
        return memory.cpu_peak(case, variant.name, torch.get_num_threads()) / 1e6, None
    except OSError as error:
        return None, f"not measured: {error}"


def _first_call(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _graph(run: Callable[[], object]) -> tuple[float | None, str | None]:
    try:
        return timing.graph_ms(run), None
    except RuntimeError as error:
        return None, f"cannot be captured: {sentence(error)}"


def _rates(case: Case, variant: Variant, samples: dict[str, list[float]], peaks: dict[str, Any]) -> Row:
    own = samples[variant.name]
    median, low, high = timing.summary(own)
    executed = variant.flops(case)
    same = variant.role != "yardstick"  # yardsticks compute something else and have no dense-equivalent rate
    dense = (network.flops(case) if isinstance(case, ModelCase) else case.flops()) if same else None
    moved = (network.min_bytes(case) if isinstance(case, ModelCase) else case.min_bytes()) if same else None
    peak = peak_gflops(peaks, case.dtype)
    rate = executed / median / 1e6
    return {
        "runs": len(own),
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "ratios": {
            name: dict(zip(("median", "p20", "p80"), timing.paired_ratio(own, other)))
            for name, other in samples.items()
            if name != variant.name and (not name.startswith("ercn-") or name == variant.name.partition("@")[0])
        },
        "flops": executed,
        "dense_flops": dense,
        "min_bytes": moved,
        "gflops": rate,
        "dense_gflops": dense and dense / median / 1e6,
        "peak_share": peak and rate / peak,
        "gbps": moved and moved / median / 1e6,
    }


def _row(case: Case, device: str, variant: str, status: str, reason: str | None) -> Row:
    """status: "ok", "skipped", "wrong" or "error", with the reason."""
    return {
        "case": case.id,
        "op": case.op,
        "direction": case.direction,
        "dtype": case.dtype,
        "shape": case.shape,
        "series": case.series,
        "size": case.size,
        "baseline": case.baseline,
        "device": device,
        "variant": variant,
        "status": status,
        "reason": reason,
    }


def _failure(error: Exception) -> tuple[str, str]:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "skipped", f"out of memory: {sentence(error)}"
    return "error", sentence(error)
