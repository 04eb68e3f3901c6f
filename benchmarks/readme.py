"""``ercn bench readme FILE…``: the performance section of docs/performance.md, from result files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ercn._files import write_text
from ercn.benchmarks.ceilings import describe
from ercn.benchmarks.config import ReadmeConfig
from ercn.benchmarks.environment import machine
from ercn.benchmarks.results import Row, load, timed

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
COLUMNS = ("case", "fastest of ours", "ms (p20–p80)", "/ one product", "reference ms", "eager ms", "eager / ours",
           "peak MB, ours", "peak MB, reference", "peak MB, eager", "error, ours", "error, eager")  # fmt: skip
SETTING_COLUMNS = ("case", "backend, setting", "ms (p20–p80)", "/ one product", "/ its own setting")


def readme(config: ReadmeConfig) -> int:
    """Replace what stands between the two markers. ValueError where a marker is missing."""
    path = Path(config.readme)
    if not path.is_file():
        raise ValueError(f"--readme {path} is no file")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{path} must hold {BEGIN} and, after it, {END}, once each")
    section = render([(name, load(name)) for name in config.files])
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_text(path, f"{head}\n{section}\n{tail}")
    return 0


def render(runs: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: per file its machine, command and a table with one line per case."""
    introduction = (
        "Median times of interleaved runs on random data. *One product* is the dense matrix product that plain torch "
        "cannot avoid (`torch.matmul(fᵀ, f, out=…)` for the affinity, `torch.mm(h, [V|U], out=…)` for the pool, each "
        "into memory that exists); *eager* is plain torch as the published code has it: SEAM's affinity, AMLab's pool, "
        "PAMR with its neighbours side by side in memory, IRN's walk by squaring a dense matrix; *reference* is our "
        "backend in plain torch. Peak memory is beyond the inputs; error is the largest one against float64, relative "
        "to the largest value."
    )
    blocks = [introduction, *(_machine(name, run) for name, run in runs)]
    if not any(run["environment"]["device"] == "cuda" for _, run in runs):
        blocks.append("No GPU has been measured yet: there are no GPU numbers.")
    return "\n\n".join(blocks)


def _machine(name: str, run: dict[str, Any]) -> str:
    values = run["environment"]
    commit = (values.get("git") or {}).get("commit", "unknown")[:12]
    title = (
        f"**{machine(values)}**, torch {values['packages']['torch']}, commit {commit}. Measured ceilings: "
        f"{describe(run['ceilings'])}. Every number: `{Path(name).as_posix()}`."
    )
    lines = [
        title,
        "",
        f"`{values['command']}`",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for case in dict.fromkeys(row["case"] for row in run["rows"]):
        lines.append(_line([row for row in run["rows"] if row["case"] == case]))
    changed = [row for row in timed(run) if "@" in row["variant"]]
    if changed:
        lines += ["", f"| {' | '.join(SETTING_COLUMNS)} |", f"|{'---|' * len(SETTING_COLUMNS)}"]
        lines += [_setting(row) for row in changed]
    return "\n".join(lines)


def _line(rows: list[Row]) -> str:
    eager = next((row for row in rows if row["variant"] == "eager"), None)
    ours = [row for row in timed({"rows": rows}) if row["variant"].startswith("ercn-") and "@" not in row["variant"]]
    reference = next((row for row in ours if row["variant"] == "ercn-reference"), None)
    if not ours:
        why = "; ".join(f"{row['variant']} {row['status']}: {row['reason']}" for row in rows if row["status"] != "ok")
        return f"| {_case(rows[0])} | none | {why} |{' |' * (len(COLUMNS) - 3)}"
    best = min(ours, key=lambda row: row["median_ms"])
    product = best["ratios"].get(best["baseline"]) if best["baseline"] != "eager" else None
    has_eager = eager is not None and eager["status"] == "ok"
    cells = [
        _case(best),
        best["variant"].removeprefix("ercn-"),
        f"{best['median_ms']:.3g} ({best['p20_ms']:.3g}–{best['p80_ms']:.3g})",
        f"{product['median']:.2f}" if product else "–",
        f"{reference['median_ms']:.3g}" if reference else "–",
        f"{eager['median_ms']:.3g}" if has_eager else (eager["status"] if eager else "–"),
        f"{1 / best['ratios']['eager']['median']:.2f}×" if has_eager else "–",
        _megabytes(best.get("peak_extra_mb")),
        _megabytes(reference and reference.get("peak_extra_mb")),
        _megabytes(eager.get("peak_extra_mb")) if has_eager else _needed(eager),
        f"{best['error']:.1e}" if best.get("error") is not None else "not checked",
        f"{best['judge_error']:.1e}" if best.get("judge") == "eager" else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _setting(row: Row) -> str:
    own, _, setting = row["variant"].partition("@")
    product = row["ratios"].get(row["baseline"], {}).get("median")
    ratio = row["ratios"].get(own, {}).get("median")
    cells = [
        _case(row),
        f"{own.removeprefix('ercn-')}, {setting.replace('_', ' ')}",
        f"{row['median_ms']:.3g} ({row['p20_ms']:.3g}–{row['p80_ms']:.3g})",
        *("–" if value is None else f"{value:.2f}" for value in (product, ratio)),
    ]
    return f"| {' | '.join(cells)} |"


def _case(row: Row) -> str:
    return f"{row['op']} {row['direction'].replace('_', ' + ')}, {row['dtype']}, {row['shape']}"


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _needed(eager: Row | None) -> str:
    expected = eager and eager.get("expected_extra_mb")
    return f"needs {expected:,.0f}" if expected else "–"
