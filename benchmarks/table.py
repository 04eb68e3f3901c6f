"""The output of a run on screen: a progress bar and a table per case with rich, else a line per row."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from ercn.benchmarks.cases import Case
from ercn.benchmarks.results import Row

NAMES = ("median ms", "p20–p80", "/ {baseline}", "/ eager", "GFLOP/s", "dense", "peak %", "GB/s", "peak MB", "error",
         "eager's")  # fmt: skip


class Lines:
    """Output without rich."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, total: int) -> AbstractContextManager:
        return nullcontext()

    def starts(self, case: Case) -> None:
        self.note(case.id)

    def finished(self, case: Case, rows: list[Row]) -> None:
        self._timed(case, [row for row in rows if row["status"] == "ok"])
        for row in rows:
            if row["status"] != "ok":
                self.note(f"  {row['variant']}: {row['status']}: {row['reason']}")
            elif text := _beside_its_own(row):
                self.note(text)

    def _timed(self, case: Case, rows: list[Row]) -> None:
        for row in rows:
            named = zip((name.format(baseline=case.baseline) for name in NAMES), cells(row))
            self.note(f"  {row['variant']}: {', '.join(f'{name} {cell}' for name, cell in named)}")


class Tables(Lines):
    """The same with rich; a pipe gets tables of 140 columns and no bar."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=140)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def progress(self, total: int) -> AbstractContextManager:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task("", total=total)
        return self.bar

    def starts(self, case: Case) -> None:
        self.bar.update(self.task, description=case.id)

    def finished(self, case: Case, rows: list[Row]) -> None:
        super().finished(case, rows)
        self.bar.advance(self.task)

    def _timed(self, case: Case, rows: list[Row]) -> None:
        from rich.table import Table

        table = Table(title=case.id, title_justify="left", title_style="bold")
        table.add_column("variant")
        for name in NAMES:
            table.add_column(name.format(baseline=case.baseline), justify="right")
        for row in rows:
            table.add_row(row["variant"], *cells(row))
        self.console.print(table if rows else case.id)


def screen() -> Lines:
    return Tables() if find_spec("rich") else Lines()


def _beside_its_own(row: Row) -> str | None:
    """Time of a backend's setting over that of the backend itself."""
    own = row["variant"].partition("@")[0]
    ratio = row["ratios"].get(own)
    if own == row["variant"] or ratio is None:
        return None
    return f"  {row['variant']} / {own}: {ratio['median']:.3f} ({ratio['p20']:.3f}–{ratio['p80']:.3f})"


def cells(row: Row) -> list[str]:
    """Cells of the columns ``NAMES``."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    def ratio(name: str) -> str:
        return number(row["ratios"].get(name, {}).get("median"), ".2f")

    share = row["peak_share"]
    return [
        number(row["median_ms"], ".3f"),
        f"{row['p20_ms']:.3f}–{row['p80_ms']:.3f}",
        ratio(row["baseline"]),
        ratio("eager"),
        number(row["gflops"], ".0f"),
        number(row["dense_gflops"], ".0f"),
        number(share and 100 * share, ".0f"),
        number(row["gbps"], ".1f"),
        number(row["peak_extra_mb"], ".1f"),
        number(row.get("error"), ".1e"),
        number(row.get("judge_error"), ".1e"),
    ]
