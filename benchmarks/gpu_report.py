"""The GPU check's results as Markdown, failures first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
BAD = ("failed", "wrong", "killed", "crashed", "not run", "out of time", "not done", "refused")  # a row's status
VARIANTS = ("ercn-cuda", "ercn-cuda@sm90_dense", "ercn-cuda@generic", "ercn-triton", "ercn-cpu")


def render(rows: list[Row]) -> str:
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    sections = [
        ("Machine", _machine(of)),
        ("Stages", _stages(of)),
        ("What failed", _failures(rows)),
        ("Smoke cases", _smoke(of.get("smoke", []))),
        ("Tests", _counts(of.get("test", []))),
        ("Headline, ms and times the one product", _headline(of.get("time", []))),
        ("Kernels", _kernels(of.get("kernel", []))),
        ("Never launched", _never_launched(of)),
        ("Sanitizers", _sanitizers(of.get("sanitizer", []))),
        ("Tile sizes tried", _tuning(of.get("tuning", []))),
    ]
    return "\n".join(f"## {title}\n\n{text}\n" for title, text in sections if text)


def table(columns: Sequence[str], cells: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _machine(of: dict[str, list[Row]]) -> str:
    lines = []
    for row in of.get("environment", []):
        gpu = f"{row['gpu']}, driver {row['driver']}, CUDA {row['cuda']}" if row["device"] == "cuda" else "no GPU"
        packages = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
        lines.append(f"{gpu}; {row['cpu']}, {row['cpu_count']} cores; Python {row['python']}; {packages}")
    lines += [f"backend {row['name']}: {row['reason'] or 'usable'}" for row in of.get("backend", [])]
    lines += [row["text"] for row in of.get("note", [])]
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def _stages(of: dict[str, list[Row]]) -> str:
    cells = [(row["name"], row["status"], row["seconds"], row["reason"]) for row in of.get("stage", [])]
    return table(("stage", "status", "s", "why"), cells) if cells else ""


def _failures(rows: list[Row]) -> str:
    """One line per failure of any kind."""
    lines = []
    for row in rows:
        if row.get("status") in BAD:
            name = row.get("name") or f"{row['case']}, {row.get('variant', 'all')}"
            size = f", N {row['size']}" if "size" in row else ""
            reason = row.get("reason") or "; ".join(row.get("errors", []))
            lines.append(f"- {row['kind']} {name}{size}: **{row['status']}**{': ' if reason else ''}{reason}")
    return "\n".join(lines) or "Nothing."


def _smoke(rows: list[Row]) -> str:
    """Counts of statuses by op, direction, kernels and dtype."""
    ends = list(dict.fromkeys(row["status"] for row in rows))
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for row in rows:
        counts.setdefault((row["op"], row["direction"], row["kernels"], row["dtype"]), Counter())[row["status"]] += 1
    cells = [(*key, *(found[end] for end in ends)) for key, found in counts.items()]
    return table(("op", "direction", "kernels", "dtype", *ends), cells) if cells else ""


def _counts(rows: list[Row]) -> str:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["name"].partition("::")[0], Counter())[row["status"]] += 1
    ends = ("passed", "failed", "skipped")
    cells = [(name, *(found[end] for end in ends)) for name, found in counts.items()]
    return table(("file", *ends), cells) if cells else ""


def _headline(rows: list[Row]) -> str:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row.get("variant", "all")] = row
    ours = [name for name in VARIANTS if any(name in variants for variants in found.values())]
    cells = []
    for case, variants in found.items():
        product = next((name for name in ("t_gemm", "t_mlp") if name in variants), "")
        line = [case, _time(variants.get(product)), _rate(variants.get("copy"))]
        cells.append([*line, *(_time(variants.get(name), product) for name in ours)])
    return table(("case", "one product", "copy, TB/s", *ours), cells) if cells else ""


def _time(row: Row | None, product: str = "") -> str:
    if row is None:
        return "–"
    if row["status"] != "passed":
        return row["status"]
    spread = f"{row['median_ms']:.3g} ({row['p20_ms']:.3g}–{row['p80_ms']:.3g})"
    return f"{spread}, {row['ratio']:.2f}×" if product and "ratio" in row else spread


def _rate(row: Row | None) -> str:
    return "–" if row is None or "bytes" not in row else f"{row['bytes'] / row['median_ms'] / 1e9:.2f}"


def _kernels(rows: list[Row]) -> str:
    columns = ("kernel", "registers", "bytes local", "bytes shared", "threads", "blocks a multiprocessor")
    cells = []
    for row in rows:
        if "registers" in row and row["launches"] > 0:
            shared = row["static_shared_bytes"] + row["dynamic_shared_bytes"]
            blocks = row.get("blocks_per_multiprocessor", "–")
            cells.append((row["name"], row["registers"], row["local_bytes"], shared, row["threads"], blocks))
    return table(columns, cells) if cells else ""


def _never_launched(of: dict[str, list[Row]]) -> str:
    """Kernels that no smoke case, test or timing has launched."""
    known = {name for row in of.get("kernels", []) for name in row["names"]}
    seen = {name for row in of.get("launched", []) for name in row["names"]}
    seen |= {f"cuda {row['name']}" for row in of.get("kernel", []) if row["launches"] > 0}
    return "\n".join(f"- {name}" for name in sorted(known - seen)) or ("Nothing." if known else "")


def _sanitizers(rows: list[Row]) -> str:
    cells = [(row["name"], row["status"], len(row["cases"]), "; ".join(row["errors"]) or "–") for row in rows]
    return table(("tool", "status", "cases", "errors"), cells) if cells else ""


def _tuning(rows: list[Row]) -> str:
    cells = [(row["name"], row["tried"], row["shipped"], row["best"]) for row in rows if row["status"] == "passed"]
    return table(("kernel", "tried", "shipped", "fastest"), cells) if cells else ""
