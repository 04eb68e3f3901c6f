"""Checks and measures a checkout on a bare machine with one GPU, no network and a few minutes, in order of importance.

    python benchmarks/gpu_check.py pack --python PYTHON               # where there is a compiler: makes build/gpu_pack
    python3 benchmarks/gpu_check.py first --seconds 200 --out OUT     # on the machine with the GPU

The machine with the GPU needs the tracked files and build/gpu_pack (ignored by git, so a tool that copies a checkout
must be told to carry it) and nothing installed but torch and pytest. PYTHON has that machine's versions of Python and
Triton, whose kernels are compiled ahead; the libraries know neither.
Where the pack does not load there, the libraries are built first, which takes minutes: ``first --seconds 350``. As time
is left: ``next --seconds 400 --failed OUT/results.jsonl --out OUT2``; afterwards, anywhere: ``report OUT OUT2`` prints
the results, and ``ercn bench readme OUT2/bench.csv`` writes the rows of docs/performance.md.

Every stage is a process of its own and ends when its time is up. It writes each result to OUT/results.jsonl at once and
its output to OUT/log.txt; OUT/report.md is the report of both. A kernel that hangs, fails or gives a wrong
result in the smoke stage is not timed; one that hangs or takes its process down is left out of the tests as well.
Without a GPU all of it runs on the CPU at toy sizes: the CUDA kernels emulated where ERCN_CUDA_EMULATED=1, else their
cases are only made; the Triton kernels where TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__:
    from ercn.benchmarks import gpu_report
else:  # the script imports nothing of ercn: its libraries may fail to load
    import gpu_report

ROOT = Path(__file__).resolve().parent.parent
TRITON = ROOT / "build" / "gpu_pack" / "triton"  # Triton's cache, which the pack fills
RESULTS = "results.jsonl"
LEAST_S = 3.0  # the least time to begin a stage with
KILLED_S = 5.0  # a killed process may hang in the driver; do not wait longer for it


@dataclass(frozen=True)
class Stage:
    """seconds: the limit of the stage. kept: seconds left for later stages. Both scale with the time given."""

    name: str
    seconds: float
    kept: float = 0.0


USUAL_S = {"first": 200.0, "next": 400.0}
FIRST = (
    Stage("libraries", 150),
    Stage("environment", 40),
    Stage("smoke", 70, kept=60),
    Stage("tests", 90, kept=45),
    Stage("timing", 60, kept=2),
)
NEXT = (
    Stage("libraries", 150),
    Stage("environment", 40),
    Stage("failures", 60),
    Stage("hardware", 120),
    Stage("sanitizers", 60),
    Stage("tuning", 60),
    Stage("bench", 120, kept=40),
    Stage("profile", 60),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    for name in ("kernels", "benchmarks"):  # the package's folders that lie beside it; an installation maps them
        with contextlib.suppress(FileExistsError):
            (ROOT / "ercn" / name).symlink_to(f"../{name}", target_is_directory=True)
    if options.command in ("first", "next"):
        return check(options)
    if options.command == "report":
        print(gpu_report.render([row for folder in options.folders for row in rows(folder / RESULTS)]), end="")
        return 0
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks")]
    if options.command == "pack":
        from ercn.benchmarks import gpu_pack

        return gpu_pack.pack(options.python)
    from ercn.benchmarks import gpu_smoke

    return gpu_smoke.run_here(options.only, options.device, options.pixels)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="put the libraries and compiled Triton kernels into build/gpu_pack")
    pack.add_argument("--python", default=sys.executable, help="interpreter whose Triton compiles (this one)")
    for name, stages in (("first", FIRST), ("next", NEXT)):
        every = ",".join(stage.name for stage in stages)
        command = commands.add_parser(name, help=every)
        command.add_argument("--seconds", type=float, default=USUAL_S[name], help="for all of it (%(default)s)")
        command.add_argument("--out", type=Path, default=Path(f"runs/gpu_check/{name}"), help="folder (%(default)s)")
        command.add_argument("--stages", default=every, help="only these (%(default)s)")
        command.add_argument("--only", default="", help="smoke cases whose name this regular expression finds")
        command.add_argument("--failed", type=Path, help="results.jsonl of an earlier run; its failures come first")
    case = commands.add_parser("case", help="run smoke cases in this process, for a debugger or a profiler")
    case.add_argument("only", help="regular expression that the case's name matches")
    case.add_argument("--device", default="cuda")
    case.add_argument("--pixels", type=int, default=0, help="run this one size only (pixels or instances)")
    report = commands.add_parser("report", help="Markdown of the results in folders")
    report.add_argument("folders", type=Path, nargs="+")
    return parser


def record(out: Path, kind: str, **values: Any) -> None:
    """Write one line of results and flush it to disk."""
    with open(out / RESULTS, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"kind": kind, **values}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def rows(path: Path, kind: str = "") -> list[dict[str, Any]]:
    """The lines of results, of one kind if given; an incomplete last line is left out."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return [row for row in found if kind in ("", row["kind"])]


def check(options: argparse.Namespace) -> int:
    """Exit code 0 where every stage was done and passed, 1 where not, 2 where it cannot begin."""
    deadline = time.monotonic() + options.seconds
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).unlink(missing_ok=True)
    (out / "log.txt").write_text("")
    failed = ["--failed", str(options.failed.resolve())] if options.failed else []
    record(out, "run", command=options.command, seconds=options.seconds)
    scale = options.seconds / USUAL_S[options.command]
    for stage in FIRST if options.command == "first" else NEXT:
        if stage.name not in options.stages.split(","):
            continue
        stage = Stage(stage.name, scale * stage.seconds, scale * stage.kept)
        arguments = [stage.name, "--out", str(out), "--only", options.only, *failed]
        status = run_stage(stage, arguments, deadline, out)
        (out / "report.md").write_text(gpu_report.render(rows(out / RESULTS)), encoding="utf-8")
        if status == "refused":
            return 2
    return int(any(row.get("status") in gpu_report.BAD for row in rows(out / RESULTS)))


def run_stage(stage: Stage, arguments: Sequence[str], deadline: float, out: Path) -> str:
    """Run a stage and return its status: done, failed, refused, out of time, or not done (too little time left)."""
    start = time.monotonic()
    limit = min(stage.seconds, deadline - start - stage.kept)
    status, reason = "not done", f"{deadline - start:.0f} s were left, of which {stage.kept:.0f} are kept for others"
    if limit >= LEAST_S:
        until = start + limit - LEAST_S / 2  # it ends by itself, or is killed
        module = ["-m", "ercn.benchmarks.gpu_stages", *arguments, "--until", str(until)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(TRITON)}
        with open(out / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"\n=== {stage.name}, at most {limit:.0f} s\n")
            log.flush()
            code = _wait(limit, [sys.executable, *module], cwd=ROOT, env=environment, stdout=log, stderr=log)
        status = {0: "done", None: "out of time", REFUSED: "refused"}.get(code, "failed")
        reason = "" if status == "done" else f"exit code {code}; {last_line(out / 'log.txt')}"
    seconds = round(time.monotonic() - start, 1)
    record(out, "stage", name=stage.name, status=status, seconds=seconds, reason=reason)
    print(f"{stage.name:<12} {status:<12} {seconds:6.1f} s  {reason}", flush=True)
    return status


REFUSED = 3  # exit code


def _wait(seconds: float, command: Sequence[str], **options: Any) -> int | None:
    """The exit code, None where the process and its children had to be killed."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_S)
    return None


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-200:] if lines else "(nothing)"


if __name__ == "__main__":
    sys.exit(main())
