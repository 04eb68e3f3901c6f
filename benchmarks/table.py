"""The rows of one case as a table for the terminal."""

from __future__ import annotations

from ercn.benchmarks.cases import Case
from ercn.benchmarks.results import Row


def print_case(console, case: Case, rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(title=case.id, title_justify="left", title_style="bold")
    table.add_column("variant")
    names = ("median ms", "p20–p80", f"/ {case.baseline}", "/ eager", "GFLOP/s", "dense", "peak %", "GB/s", "peak MB",
             "error", "eager's")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        if row["status"] != "ok":
            continue
        table.add_row(row["variant"], *cells(row))
    if table.row_count:
        console.print(table)
    for row in rows:
        own, _, setting = row["variant"].partition("@")
        if setting and row["status"] == "ok" and own in row["ratios"]:
            ratio = row["ratios"][own]
            text = f"  {row['variant']} / {own}: {ratio['median']:.3f} ({ratio['p20']:.3f}–{ratio['p80']:.3f})"
            console.print(text, markup=False, highlight=False)
        if row["status"] != "ok":
            console.print(f"  {row['variant']}: {row['status']}: {row['reason']}", markup=False, highlight=False)


def cells(row: Row) -> list[str]:
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
