"""The stages of the GPU check, each run as ``python -m ercn.benchmarks.gpu_stages NAME --out FOLDER --until CLOCK``.

A stage writes every result at once, ends by itself when its time is over, and names what it left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ercn.benchmarks import gpu_pack
from ercn.benchmarks.gpu_check import REFUSED, RESULTS, ROOT, record, rows
from ercn.benchmarks.gpu_report import BAD
from ercn.benchmarks.results import sentence

SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
WORKERS = 12
TESTS = tuple(f"tests/{name}.py" for name in (
    "ops/test_gpu_exact", "ops/test_gpu_ops", "cuda/test_affinity_hopper", "cuda/test_pool_hopper",
    "cuda/test_affinity_generic", "cuda/test_pool_generic", "cuda/test_pool_arguments", "cuda/test_tf32",
    "triton/test_ops", "triton/test_pool",
))  # fmt: skip
HARDWARE = ("tests/ops/test_gpu_hardware.py",)
COMPILING = "property and triton"  # tests that compile for a minute
DEVICE = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
LOST = ("killed", "crashed")  # a test ends so when its process does
STOPPING_S = 5.0  # for pytest to end
ROUNDS = 30
TOOLS = ("memcheck", "racecheck", "synccheck")
# One case of every kernel that has barriers or addresses of its own.
SANITIZED = (
    r"^affinity.*(sm90(_dense)?, bfloat16, D 192, C 22|sm90, float16, D 256, C 7|generic, (bfloat16|float32)|triton.*"
    r"bfloat16)|^(pool|scores).*(sm90|generic|triton), bfloat16, (rows|masked)|^by_scores.*bfloat16, masked"
)
PROFILED = {"forward": "affinity forward, sm90, bfloat16, D 192, C 22",
            "backward": "affinity backward, sm90, bfloat16, D 192, C 22"}  # fmt: skip
PIXELS = {"cuda": 4096, "cpu": 16}
CANDIDATES = 24  # tile sizes to try of each kernel
TUNED = (("triangle", 192), ("backward", 192), ("forward", 64), ("pool", 0), ("row_grad", 0), ("weight_grad", 0))
# Cases of docs/performance.md, most important first.
BENCH = (
    r"affinity/(forward|backward)/bfloat16/b1-c22-d192-128x128",
    r"mil/(forward|backward)/bfloat16/dense-n65536-d1024-l256-k1",
    r"affinity/(forward|backward)/bfloat16/b1-c22-d(64|256)-128x128",
    r"model/forward_backward/bfloat16/resnet50-b1-1024px",
    r"affinity/.*/bfloat16/b1-c22-d192-(56x56|256x256)",
    r"mil/.*/bfloat16/(dense-n8192-d1024-l256-k1|ragged-.*|map-.*)",
    r"affinity/.*/(tf32|float32)/b1-c22-d192-128x128",
    r".*",
)
COPIED = {"cuda": 1 << 28, "cpu": 1 << 20}  # bytes; as many are written as read
CASE_S = 10.0  # reserve for the case that ``bench`` began last
LEFT_OUT = ("compile", "blockwise", "sdpa")


@dataclass(frozen=True)
class Run:
    """Arguments of every stage. until: end on time.monotonic's clock, which processes share. earlier: rows of an
    earlier run, whose failures are run first.
    """

    out: Path
    until: float
    only: str
    earlier: list[dict[str, Any]]

    def left(self) -> float:
        return self.until - time.monotonic()

    def record(self, kind: str, **values: Any) -> None:
        record(self.out, kind, **values)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return rows(self.out / RESULTS, kind)

    @functools.cached_property
    def device(self) -> str:
        """cuda or cpu, from the environment stage or else from another process: this one may fork later and must not
        touch the GPU before.
        """
        for row in self.rows("environment"):
            return row["device"]
        process = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, check=True)
        return process.stdout.strip()

    def smoked(self) -> list[dict[str, Any]]:
        """Smoke rows of this run, or of the earlier one."""
        return self.rows("smoke") or [row for row in self.earlier if row["kind"] == "smoke"]


def libraries(run: Run) -> None:
    """Unpack the libraries; where they do not load, build them."""
    if reason := gpu_pack.refusal():
        print(reason)
        sys.exit(REFUSED)
    print(gpu_pack.unpack())
    reason = gpu_pack.load()
    if reason is not None and shutil.which("nvcc"):
        run.record("note", text=f"the libraries did not load ({reason}) and were built here")
        gpu_pack.build()
        reason = gpu_pack.load()
    if reason is not None:
        sys.exit(f"the libraries do not load: {reason}")


def environment(run: Run) -> None:
    """Versions and the GPU; every operator is registered, and the CPU's compute."""
    import torch

    from ercn import kernels
    from ercn.benchmarks.environment import environment as describe
    from ercn.ops import _extension, backends, gated_attention_pool, relu_affinity

    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    run.record("environment", **describe("cuda" if torch.cuda.is_available() else "cpu"))
    for row in backends():
        run.record("backend", name=row.name, reason=row.reason)
    for name in ("libercn", "libercn_cuda"):
        if reason := _extension.load(name):
            sys.exit(reason)

    names = [f"triton {name}" for name in kernels.kernels()]
    run.record("kernels", names=[*names, *(f"cuda {kernel['name']}" for kernel in _extension.cuda_kernels())])
    ops = ("relu_affinity", "relu_affinity_backward", "gated_attention_pool", "gated_attention_pool_backward")
    for op in ops:
        getattr(torch.ops.ercn_native, f"{op}_cuda")
        getattr(torch.ops.ercn, op)
    x = torch.eye(4).unsqueeze(0)
    assert torch.equal(relu_affinity(x, x, backend="cpu"), x)
    pooled, scores = gated_attention_pool(x, torch.eye(4), None, torch.eye(4), None, torch.ones(1, 4), None)
    assert torch.allclose(pooled, torch.full((1, 1, 4), 0.25)) and scores.shape == (1, 1, 4)
    print(f"{len(ops)} operators are registered for every device, and the CPU's compute")


def smoke(run: Run) -> None:
    from ercn.benchmarks import gpu_smoke

    gpu_smoke.smoke(gpu_smoke.groups(run.only), run.device, run.left(), run.record)


def tests(run: Run) -> None:
    """Exact and budget tests in parallel, without kernels that hung or crashed in the smoke stage."""
    gone = {(row["op"], row["kernels"]) for row in run.smoked() if row["status"] in LOST}
    left_out = [_keywords(op, kernels) for op, kernels in sorted(gone)]
    if left_out:
        run.record("note", text=f"tests left out, since the kernels hang or crash: {', '.join(left_out)}")
    if any("sm90" in kernels for _, kernels in gone):
        os.environ["ERCN_CUDA_KERNELS"] = "generic"  # of tests that do not choose themselves
    _pytest(run, TESTS, " and ".join(f"not ({words})" for words in [*left_out, COMPILING]), timeout=45)


def _keywords(op: str, kernels: str) -> str:
    """pytest's expression for the tests of an op that run these kernels."""
    words = {
        "generic": "generic or cuda and not hopper and not sm90",
        "sm90": "hopper or sm90",
        "sm90_dense": "sm90_dense",
    }
    return f"{op} and ({words.get(kernels, 'triton')})"


def hardware(run: Run) -> None:
    """Tests of streams and graphs, and the tests that took too long before."""
    _pytest(run, (*HARDWARE, *TESTS), f"gpu_hardware or {COMPILING}", timeout=90)


def failures(run: Run) -> None:
    """Run the earlier failures again: each smoke case alone, then the tests; traces are in the log."""
    from ercn.benchmarks import gpu_smoke

    bad = [row for row in run.earlier if row.get("status") in BAD]
    names = {row["name"] for row in bad if row["kind"] == "smoke"}
    again = [group for group in gpu_smoke.groups() if group.name in names]
    gpu_smoke.smoke(again, run.device, run.left() / 2, run.record, side_by_side=1)
    _pytest(run, dict.fromkeys(row["name"] for row in bad if row["kind"] == "test"), "", timeout=90, trace="long")


def _pytest(run: Run, files: Iterable[str], words: str, timeout: int, trace: str = "short") -> None:
    """Record each result as it is known; a hanging test ends its worker alone."""
    import pytest

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = [file for file in files if (ROOT / file.partition("::")[0]).is_file()]
    if not chosen:
        return
    command = ["-q", "-p", "no:cacheprovider", "--gpu-coverage", f"--tb={trace}", *chosen]
    command += ["--until", str(run.until - STOPPING_S)]
    command += ["-m", "gpu"] if run.device == "cuda" else ["-m", "not slow"]
    command += ["-k", words] if words else []
    if find_spec("pytest_timeout"):
        command += ["--timeout", str(timeout), "--timeout-method", "thread"]
    if find_spec("xdist") and run.device == "cuda":
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--max-worker-restart", "40"]

    class Recorder:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                status = {"passed": "passed", "skipped": "skipped"}.get(report.outcome, "failed")
                reason = "" if status == "passed" else _last_words(report)
                run.record("test", name=report.nodeid, status=status, seconds=round(report.duration, 2), reason=reason)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                run.record("test", name=report.nodeid, status="failed", seconds=0, reason=_last_words(report))

        def pytest_unconfigure(self, config: pytest.Config) -> None:
            coverage = config.pluginmanager.get_plugin("gpu-coverage")
            run.record("launched", names=[name for name, count in coverage.launches.items() if count > 0], by="tests")

    code = pytest.main(command, plugins=[Recorder()])
    if code == pytest.ExitCode.INTERRUPTED:
        reason = "out of time" if run.left() < STOPPING_S else "pytest was interrupted"
        run.record("test", name="the rest", status="not run", reason=reason)
    known = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED,
             pytest.ExitCode.INTERRUPTED)  # fmt: skip
    if code not in known:
        sys.exit(f"pytest ended with {code!r}")


def _last_words(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2][-300:]
    lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ") or "Error" in line]
    lines = lines or report.longreprtext.splitlines()  # of a worker that died, a sentence
    return " ".join(" ".join(lines[-3:]).split())[:300]


def timing(run: Run) -> None:
    """The headline: our kernels, plain torch's one product and a copy, interleaved."""
    import torch

    from ercn.benchmarks.cases import AffinityCase, PoolCase
    from ercn.benchmarks.kernels import attributes
    from ercn.ops import cuda

    device = run.device
    shapes: list[Any] = [AffinityCase(1, 21, 64, 4), PoolCase(20, 64, 64, 1)]
    if device == "cuda":
        wide, *others = (AffinityCase(1, 21, dim, 128) for dim in (192, 64, 256))
        shapes = [wide, PoolCase(65536, 1024, 256, 1), *others, PoolCase(65536, 512, 128, 1)]
    cases = [replace(case, direction=way, dtype="bfloat16") for case in shapes for way in ("forward", "backward")]
    _compile(run, cases)
    stream = torch.cuda.Stream() if device == "cuda" else None
    for case in cases:
        if run.left() < 5:
            run.record("time", case=case.id, status="not done", reason="out of time")
            continue
        try:
            _time(run, case, stream)
            if device == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001 - one case must not end the others
            run.record("time", case=case.id, status="failed", reason=sentence(error))
    if cuda.unavailable() is None:
        for kernel in attributes():
            run.record("kernel", **kernel)


def _time(run: Run, case: Any, stream: Any) -> None:
    from ercn.benchmarks import timing as clock
    from ercn.benchmarks.variants import inputs_of, variants

    device, inputs = run.device, inputs_of(case, run.device)
    also = ["generic"] if device == "cuda" else []
    if also and (case.op, case.direction) == ("affinity", "forward"):
        also.append("sm90_dense")  # backwards it is sm90
    runners: dict[str, Callable[[], object]] = {"copy": _copy(device)}
    for variant in variants(case, device, also=also):
        if variant.name == "ercn-reference" or variant.role != "ercn" and variant.name != case.baseline:
            continue
        reason = variant.obstacle(case, inputs) or _not_to_be_timed(run, case, variant.name)
        try:
            if reason is None:
                print(f"{case.id} {variant.name}", flush=True)  # the last line if the process crashes
                runners[variant.name] = _replayed(functools.partial(variant.make, case, inputs), stream)
        except Exception as error:  # noqa: BLE001 - one variant must not end the others
            reason = sentence(error)
        if reason is not None:
            run.record("time", case=case.id, variant=variant.name, status="not done", reason=reason)
    print(f"{case.id} in turns", flush=True)
    samples = clock.interleave(runners, device, seconds=0, min_rounds=ROUNDS if device == "cuda" else 3)
    for name, own in samples.items():
        median, low, high = clock.summary(own)
        values = {"median_ms": median, "p20_ms": low, "p80_ms": high, "baseline": case.baseline}
        if case.baseline in samples:
            values["ratio"] = clock.paired_ratio(own, samples[case.baseline])[0]
        values |= {"bytes": 2 * COPIED[device]} if name == "copy" else {}
        run.record("time", case=case.id, variant=name, status="passed", **values)


def _compile(run: Run, cases: list[Any]) -> None:
    """Compile the cases' Triton kernels into the cache, one process each."""

    def once(case: Any) -> None:
        from ercn.benchmarks.variants import inputs_of, variants

        inputs = inputs_of(case, run.device)
        for variant in variants(case, run.device, "triton"):
            if variant.backend == "triton" and not variant.obstacle(case, inputs):
                variant.make(case, inputs)()

    wanted = [case for case in cases if not _not_to_be_timed(run, case, "ercn-triton")]
    _side_by_side([functools.partial(once, case) for case in wanted], run.left() / 3)


def _side_by_side(calls: list[Callable[[], object]], seconds: float) -> None:
    """Run each in a fork of this process, which must not have touched the GPU; kill those left after the seconds."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=call, daemon=True) for call in calls]
    until = time.monotonic() + seconds
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()


def _copy(device: str) -> Callable[[], object]:
    import torch

    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _replayed(make: Callable[[], Callable[[], object]], stream: Any) -> Callable[[], object]:
    """One call as a CUDA graph; on the CPU the call itself. A backward's graph is built on the captured stream."""
    import torch

    if stream is None:
        call = make()
        call()
        return call
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call, call()  # keeps alive the memory that the graph reads and writes

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


def _not_to_be_timed(run: Run, case: Any, variant: str) -> str | None:
    """The failed smoke case that forbids timing: same op, direction, kernels, dtype and, for the affinity, D."""
    name, _, setting = variant.partition("@")
    kernels = {"ercn-cuda": (setting or "sm90",), "ercn-triton": ("triton", "triton_triangle")}.get(name, ())
    op = {"affinity": "affinity", "mil": "pool"}[case.op]
    for row in run.smoked():
        same = (row["op"], row["direction"], row["dtype"]) == (op, case.direction, case.dtype)
        near = op == "pool" or row["dim"] == case.dim or row["kernels"] not in ("sm90", "sm90_dense")
        wrong = row["status"] in ("failed", "wrong") and row["layout"] in ("", "rows")  # a timed bag has rows
        if same and near and row["kernels"] in kernels and (wrong or row["status"] in LOST):
            return f"in the smoke stage {row['name']}, N {row['size']} was {row['status']}"
    return None


def sanitizers(run: Run) -> None:
    """Run the sanitizers side by side, each on small smoke cases in one process."""
    if shutil.which("compute-sanitizer") is None:
        run.record("note", text="compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
        return
    bad = {row["name"] for row in run.smoked() if row["status"] in LOST}
    only = f"^(?!{'|'.join(map(re.escape, sorted(bad)))})(?=.*)" if bad else ""
    command = [*SCRIPT, "case", f"{only}({run.only or SANITIZED})", "--device", run.device]
    logs = {tool: run.out / f"{tool}.txt" for tool in TOOLS}
    running = {}
    for tool, log in logs.items():
        with open(log, "w") as stream:
            running[tool] = subprocess.Popen(
                ["compute-sanitizer", "--tool", tool, "--print-limit", "20", "--error-exitcode", "9", *command],
                stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
    for tool, process in running.items():
        try:
            code = process.wait(max(0.1, run.left() - 2))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        text = logs[tool].read_text(errors="replace")
        logs[tool].unlink()
        print(f"--- {tool}\n{text}")
        done = re.findall(r"^(.*): (?:passed|wrong|failed)", text, re.MULTILINE)
        errors = re.findall(r"^=+ (.*(?:Invalid|Error:|Warning:|Race|Barrier).*)$", text, re.MULTILINE)
        status = {0: "passed", None: "out of time"}.get(code, "failed")
        run.record("sanitizer", name=tool, status=status, cases=done, errors=sorted(set(errors))[:20])


def tuning(run: Run) -> None:
    """Try a few tile sizes of every Triton kernel; a person decides from the fastest."""
    if run.device != "cuda":
        run.record("note", text="tuning needs a GPU")
        return
    import torch

    from ercn.kernels import configs, tune
    from ercn.kernels.table import TABLE

    def try_rows(part: slice) -> Iterator[dict[str, Any]]:
        arch = configs.family(configs.arch(torch.device("cuda", torch.cuda.current_device())))
        for kernel, dim in TUNED:
            every = list(tune.candidates(kernel, "half", dim))
            shipped = configs.row(arch, kernel, torch.bfloat16, dim or tune.STREAMED)
            rows = [shipped, *every[:: -(-len(every) // CANDIDATES)]]
            row = {"name": f"{kernel}, D {dim or 'any'}", "tried": len(rows), "shipped": rows[0]}
            if run.left() > 5:
                yield row | {"status": "passed", "best": tune.fastest(TABLE, arch, kernel, "half", dim, rows[part])}
            else:
                yield row | {"status": "not done", "best": None, "reason": "out of time"}

    compiling = [functools.partial(list, try_rows(slice(i, None, WORKERS))) for i in range(WORKERS)]
    _side_by_side(compiling, run.left() / 2)
    for row in try_rows(slice(None)):
        run.record("tuning", **row)


def bench(run: Run) -> None:
    """Rows of ``ercn bench`` in order of importance, without the baselines that take longest."""
    from ercn.benchmarks.cases import AffinityCase, PoolCase, suite
    from ercn.benchmarks.config import BenchConfig
    from ercn.benchmarks.run import measure_cases

    device = run.device
    if device == "cpu":
        config = BenchConfig(device=device, quick=True, memory=False, without=",".join(LEFT_OUT))
        cases = [AffinityCase(1, 5, 8, 4), PoolCase(20, 8, 8, 1)]
    else:
        config = BenchConfig(device=device, also="generic,sm90_dense", seconds=1.0, without=",".join(LEFT_OUT))
        every = suite("all", device, "standard")
        cases = [case for pattern in BENCH for case in every if re.fullmatch(pattern, case.id)]
    config = replace(config, save=str(run.out / "bench.csv"))
    measured = measure_cases(config, list(dict.fromkeys(cases)), device, run.until - CASE_S)
    done = {row["case"] for row in measured["rows"]}
    if left := list(dict.fromkeys(case.id for case in cases if case.id not in done)):
        run.record("bench", name=f"{len(left)} cases from {left[0]} on", status="not done", reason="out of time")


def profile(run: Run) -> None:
    """Nsight Compute's full report of the headline's kernels."""
    if shutil.which("ncu") is None:
        run.record("note", text="ncu is not on PATH; it comes with the CUDA toolkit")
        return
    for way, case in PROFILED.items():
        log = run.out / f"profile_{way}.txt"
        kernel = {"forward": "regex:Forward", "backward": "regex:Backward"}[way]
        command = ["ncu", "--set", "full", "--page", "details", "--clock-control", "none", "-c", "1",
                   "--kernel-name-base", "demangled", "-k", kernel,
                   *SCRIPT, "case", f"^{re.escape(case)}$", "--device", run.device, "--pixels", str(PIXELS[run.device])]
        status, reason = "not done", "out of time"
        if run.left() > 8:
            with open(log, "w") as stream, contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run(command, stdout=stream, stderr=stream, timeout=run.left() - 2, check=False)
                status, reason = "failed" if done.returncode else "passed", f"exit code {done.returncode}"
        run.record("profile", name=way, status=status, reason=reason)


STAGES = {function.__name__: function for function in (
    libraries, environment, smoke, tests, timing, failures, hardware, sanitizers, tuning, bench, profile,
)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--failed", type=Path)
    options = parser.parse_args()
    earlier = rows(options.failed) if options.failed else []
    STAGES[options.stage](Run(options.out, options.until, options.only, earlier))
    sys.stdout.flush()
    os._exit(0)  # skips the seconds of taking torch and the GPU's context down


if __name__ == "__main__":
    main()
