"""One command for a machine with a GPU and no network: build, test, sanitize, measure, in stages with time budgets.

    python benchmarks/gpu_check.py --out benchmarks/results/h100 --bench 1800

Every stage has an option of its name that gives its seconds; 0 leaves it out. A stage that fails or runs out of time
does not stop the next ones, and a benchmark that is cut keeps its finished rows. The folder holds a log per stage, the
results, plots, and summary.json; the exit code is 1 where a stage failed. Without a GPU the GPU stages are skipped.
Needs torch, the packages of pyproject's build-system table, pytest and hypothesis. What is absent besides costs what
needs it: without timm the network's rows, without nvidia-ml-py the telemetry, without matplotlib the plots.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
GRACE_S = 30.0  # between the interrupt and the kill of a stage out of time
NO_TESTS = 5  # pytest's exit code
# The operators' tests alone: others need the training extra before they can be collected.
OPERATORS = ("affinity", "attention", "backends", "cpu", "cuda", "gpu", "triton")
TESTS = [p.as_posix() for p in sorted((ROOT / "tests").glob("test_*.py")) if p.stem.split("_")[1] in OPERATORS]
SMALL = (PYTHON, "-m", "ercn", "doctor", "--selftest")
# Every path of the CUDA kernels once, small enough for a sanitizer.
SANITIZED = (PYTHON, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu_ops.py", "-k",
             "cuda and (within_budget or ragged or masked)")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """command: {out} stands for the results folder. needs: "" or "gpu", or "sanitizer" for a GPU and that tool."""

    name: str
    seconds: int
    command: tuple[str, ...]
    needs: str = ""


STAGES = (
    Stage("build", 1200, (PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e",
                          ".")),
    Stage("doctor", 120, SMALL),
    Stage("tests_cpu", 900, (PYTHON, "-m", "pytest", "-q", "-m", "not slow and not gpu", *TESTS)),
    Stage("tests_gpu", 900, (PYTHON, "-m", "pytest", "-q", "-m", "gpu", *TESTS), "gpu"),
    *(Stage(tool, 600, ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *SANITIZED), "sanitizer")
      for tool in ("memcheck", "racecheck", "synccheck")),
    Stage("bench_cpu", 300, (PYTHON, "-m", "ercn", "bench", "--device", "cpu", "--quick", "--save", "{out}/cpu.json")),
    Stage("bench", 1200, (PYTHON, "-m", "ercn", "bench", "--device", "cuda", "--save", "{out}/cuda.json"), "gpu"),
    Stage("bench_kernels", 600, (PYTHON, "-m", "ercn", "bench", "--device", "cuda", "--backend", "cuda", "--also",
                                 "generic,sm90_dense", "--save", "{out}/cuda_kernels.json"), "gpu"),
    Stage("plots", 120, (PYTHON, "-m", "ercn", "bench", "plot", "{out}/cpu.json", "--out", "{out}/plots_cpu")),
    Stage("plots_gpu", 120, (PYTHON, "-m", "ercn", "bench", "plot", "{out}/cuda.json", "--out", "{out}/plots"), "gpu"),
)  # fmt: skip


@dataclass
class Outcome:
    """status: passed, failed, out of time or skipped."""

    stage: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    command: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder of results (%(default)s)")
    for stage in STAGES:
        text = f"seconds for this stage, 0 leaves it out ({stage.seconds})"
        parser.add_argument(f"--{stage.name}", type=int, default=stage.seconds, metavar="S", help=text)
    options = vars(parser.parse_args(argv))
    out = options["out"].resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for stage in STAGES:
        outcomes.append(run_stage(stage, options[stage.name], out))
        last = outcomes[-1]
        print(f"{last.stage:<10} {last.status:<12} {last.seconds:7.1f} s  {last.reason}", flush=True)
        summary = {"python": sys.version.split()[0], "gpu": gpu_name(), "stages": [asdict(o) for o in outcomes]}
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return int(any(o.status in ("failed", "out of time") for o in outcomes))


def gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def obstacle(stage: Stage, seconds: int) -> str | None:
    if seconds <= 0:
        return "left out by its option"
    if stage.needs and gpu_name() is None:
        return "torch finds no GPU"
    if stage.needs == "sanitizer" and shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    return None


def run_stage(stage: Stage, seconds: int, out: Path) -> Outcome:
    """Runs it in the source tree, its output in OUT/<stage>.log; out of time it is interrupted, then killed."""
    if reason := obstacle(stage, seconds):
        return Outcome(stage.name, "skipped", reason=reason)
    command = [part.replace("{out}", str(out)) for part in stage.command]
    start, log = time.monotonic(), out / f"{stage.name}.log"
    environment = os.environ | {"ERCN_BUILD": os.environ.get("ERCN_BUILD", "cuda")}
    with open(log, "w", encoding="utf-8") as stream:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A background shell ignores SIGINT, and a child would inherit that. There are no threads here.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
            )
        except OSError as error:
            return Outcome(stage.name, "failed", reason=str(error), command=" ".join(command))
        late = _wait(process, seconds)
    outcome = Outcome(stage.name, "passed", time.monotonic() - start, command=" ".join(command))
    if late:
        outcome.status, outcome.reason = "out of time", f"stopped after {seconds} s; see {log.name}"
    elif process.returncode == NO_TESTS and "pytest" in command:
        outcome.status, outcome.reason = "skipped", "no test carries the marker"
    elif process.returncode != 0:
        outcome.status, outcome.reason = "failed", f"exit code {process.returncode}; {log.name} ends: {_last_line(log)}"
    return outcome


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-200:] if lines else "(nothing)"


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """True where the process had to be stopped. The interrupt lets a benchmark write what it has."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        pass
    for sign, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        break
    process.wait()
    return True


if __name__ == "__main__":
    sys.exit(main())
