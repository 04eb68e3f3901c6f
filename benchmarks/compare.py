"""``ercn bench compare BEFORE AFTER``: changes between two runs that exceed their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ercn.benchmarks.config import CompareConfig
from ercn.benchmarks.environment import machine
from ercn.benchmarks.results import Row, load

REPEATABLE = 1.1


@dataclass(frozen=True)
class Change:
    """factor: after / before of the metric. limit: the least factor, up or down, that counts as a change."""

    case: str
    variant: str
    before: float
    after: float
    limit: float
    reason: str | None = None

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.reason is not None:
            return "lost"
        if self.factor > self.limit:
            return "slower"
        return "faster" if self.factor < 1 / self.limit else "same"


def changes(before: dict[str, Any], after: dict[str, Any], metric: str, threshold: float) -> list[Change]:
    """The change of each row of both runs. The limit is the threshold or, where larger, 1 + twice the noise of both.

    Noise is half of (p80 − p20) / median of each value, added in squares. Verdict "lost": the row had a time before and
    has none after.
    """
    later = {(row["case"], row["variant"]): row for row in after["rows"]}
    result = []
    for row in before["rows"]:
        other = later.get((row["case"], row["variant"]))
        old = _value(row, metric)
        if old is None or other is None:
            continue
        new = _value(other, metric)
        if new is None:
            reason = f"{other['status']}: {other['reason']}"
            result.append(Change(row["case"], row["variant"], old[0], math.nan, math.nan, reason))
            continue
        limit = max(threshold, 1 + 2 * math.hypot(old[1], new[1]))
        result.append(Change(row["case"], row["variant"], old[0], new[0], limit))
    return result


def _value(row: Row, metric: str) -> tuple[float, float] | None:
    """The metric's median and relative noise; None for a row without a time, or the baseline's own ratio."""
    if row["status"] != "ok":
        return None
    if metric == "time":
        median, low, high = row["median_ms"], row["p20_ms"], row["p80_ms"]
    else:
        ratio = row["ratios"].get(row["baseline"])
        if ratio is None:
            return None
        median, low, high = ratio["median"], ratio["p20"], ratio["p80"]
    return median, (high - low) / (2 * median)


def compare(config: CompareConfig) -> int:
    """Print the table; 1 where a row is slower or lost, else 0. ValueError where the files have no row in common."""
    from rich.console import Console
    from rich.table import Table

    if len(config.files) != 2:
        raise ValueError(f"compare takes two result files, before and after; got {len(config.files)}")
    if config.threshold <= 1:
        raise ValueError(f"--threshold is a factor above 1; got {config.threshold}")
    before, after = (load(path) for path in config.files)
    found = changes(before, after, config.metric, config.threshold)
    if not found:
        raise ValueError(f"{config.files[0]} and {config.files[1]} have no case and variant with a time in common")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for name, run in zip(("before", "after"), (before, after)):
        commit = (run["environment"].get("git") or {}).get("commit", "unknown commit")
        console.print(f"{name}: {machine(run['environment'])}, {commit[:12]}", highlight=False)
    unit = "ms" if config.metric == "time" else "time / baseline product"
    table = Table(title=f"{unit}: after / before", title_justify="left")
    for column in ("case", "variant", "before", "after", "factor", "limit", "verdict"):
        table.add_column(
            column, overflow="fold", justify="left" if column in ("case", "variant", "verdict") else "right"
        )
    for change in sorted(found, key=lambda c: -c.factor if c.reason is None else -math.inf):
        cells = [f"{x:.3f}" for x in (change.before, change.after, change.factor, change.limit)]
        table.add_row(change.case, change.variant, *cells, change.reason or change.verdict)
    console.print(table)
    verdicts = [change.verdict for change in found]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("slower", "lost", "faster", "same"))
    near = sum(1 / REPEATABLE <= c.factor <= REPEATABLE for c in found)
    console.print(f"{counts}; {near} of {len(found)} are within 10 % of each other", highlight=False)
    return int("slower" in verdicts or "lost" in verdicts)
