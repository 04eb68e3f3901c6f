"""Links, files, names and numbers of the pages are there."""

from __future__ import annotations

import hashlib
import importlib
import re
import unicodedata
from pathlib import Path

import pytest
import yaml
from _pages import AT_ROOT, DOCS, NAMES, PAGES, ROOT, blocks, code_spans, prose, rows

import ercn
from ercn import ops
from ercn.benchmarks import readme, results
from ercn.data.sets import READERS

SOURCES = ("ercn", "kernels", "benchmarks", "csrc", "tests", "examples", ".ci")


def anchor(heading: str) -> str:
    """As Python-Markdown makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(page: Path) -> set[str]:
    return {anchor(line.lstrip("#").strip()) for line in prose(page).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert page in AT_ROOT or file.is_relative_to(DOCS), f"{target} is not on the site"
        assert not fragment or fragment in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_exist(page):
    places = (*SOURCES, "docs")
    for span in code_spans(page):
        if re.fullmatch(rf"({'|'.join(map(re.escape, places))})/[\w./*-]+", span) and not span.endswith(".so"):
            assert list(ROOT.glob(span.rstrip("/"))), span
        elif re.fullmatch(r"[\w/]+\.(h|cu)", span):
            assert list((ROOT / "csrc").rglob(span)), span


def test_named_kernels_exist():
    def found_in(page: str, pattern: str, *sources: Path) -> tuple[set[str], str]:
        named = {name for span in code_spans(DOCS / page) for name in re.findall(pattern, span)}
        return named, "\n".join(source.read_text(encoding="utf-8") for source in sources)

    named, text = found_in("cuda.md", r"^[A-Z][a-z]+[A-Z]?\w*$", *(ROOT / "csrc/cuda").rglob("*.[ch]*"))
    assert len(named) >= 8 and not [name for name in named if not re.search(rf"\b{name}\b", text)]
    named, text = found_in("triton.md", r"\w+_kernel\b", *(ROOT / "kernels").glob("*.py"))
    assert len(named) >= 12 and not [name for name in named if f"def {name}(" not in text]


def resolved(name: str) -> object:
    """The object of a dotted name; ImportError or AttributeError where there is none."""
    found = ercn
    for depth, part in enumerate(parts := name.split("."), 1):
        if depth > 1 and not hasattr(found, part):
            importlib.import_module(".".join(parts[:depth]))
        found = getattr(found, part) if depth > 1 else found
    return found


def test_python_names_exist():
    spans = {span for page in PAGES for span in code_spans(page)}
    names = {m[1] for span in spans if (m := re.fullmatch(r"(ercn(?:\.\w+)+)(?:\(.*\))?", span))}
    assert len(names) > 15
    wrong = []
    for name in sorted(names):
        try:
            resolved(name)
        except (ImportError, AttributeError):
            wrong.append(name)
    assert not wrong


def test_every_page_is_in_the_navigation():
    def files(entries):
        for entry in entries:
            (value,) = entry.values()
            yield from [value] if isinstance(value, str) else files(value)

    shown = list(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(shown) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_included_files_exist():
    included = [name for page in PAGES for name in re.findall(r'^--8<-- "(.+)"$', page.read_text(), re.MULTILINE)]
    assert sorted(included) == ["CHANGELOG.md", "CONTRIBUTING.md"]


def test_every_operator_has_a_page():
    pages = "\n".join(page.read_text() for page in (DOCS / "ops").glob("*.md") if page.stem != "index")
    pages += (DOCS / "backends.md").read_text() + (DOCS / "export.md").read_text()
    assert not [name for name in ops.__all__ if name not in pages]


def test_every_data_set_is_on_its_page():
    listed = re.findall(r"^\| `([a-z0-9_]+)` \|", (DOCS / "data.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*READERS, "phantom"])


def read_variables() -> set[str]:
    """Names of the environment variables that the sources ask for."""
    files = [ROOT / "setup.py"]
    for folder in SOURCES:
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu") and p.is_file()]
    pattern = re.compile(r'(?:environ(?:\.get\(|\.setdefault\(|\.pop\(|\[)|getenv\()\s*"([A-Z][A-Z0-9_]+)"')
    mine = {Path(__file__)}
    return {name for file in files if file not in mine for name in pattern.findall(file.read_text(encoding="utf-8"))}


def test_every_environment_variable_is_on_its_page():
    listed = {
        name
        for row in rows((DOCS / "environment.md").read_text())
        for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row[0])
    }
    read = read_variables()
    assert {"ERCN_BACKEND", "ERCN_CPU_ISA", "ERCN_BUILD", "ERCN_CUDA_ARCHS"} <= read
    assert not {name for name in read if name.startswith("ERCN_")} - listed
    assert {name for name in listed if name.startswith("ERCN_")} <= read
    # of others, what the package itself asks for
    assert {"CXX", "CUTLASS_PATH", "MAX_JOBS", "TRITON_INTERPRET", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= listed


def test_answers_to_where_do_i_change_hold():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## Where do I change …\n")[1].split("\n## ")[0]
    answers = [[cell.strip("`") for cell in row] for row in rows(section)[1:]]
    assert len(answers) >= 6
    for what, place, name in answers:
        assert name in (ROOT / place).read_text(encoding="utf-8"), (what, place, name)
    wanted = ("tile size", "IoU threshold", "data set", "loss weight", "report's colours", "error sentence of the pool")
    assert all(any(words in row[0] for row in answers) for words in wanted)


@pytest.mark.parametrize("page", ["performance.md", "high-resolution.md"])
def test_measured_tables_are_those_of_the_result_files(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # files are named from here
    section = (DOCS / page).read_text().split(f"{readme.BEGIN}\n")[1].split(f"\n{readme.END}")[0]
    files = re.findall(r"Every number: `(.+)`", section)
    assert len(files) == 3
    assert section == readme.render([(name, results.load(name)) for name in files])


def numbers(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", cell.replace(",", ""))]


def test_the_readme_is_short_and_its_costs_were_measured():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make demo" in text and "make test" in text
    costs = rows(text.split("## What it costs\n")[1].split("\n## ")[0])[1:]
    assert len(costs) == 6
    generated = [
        [number for cell in row[2:] for number in numbers(cell)]
        for name in ("performance.md", "high-resolution.md")
        for row in rows((DOCS / name).read_text().split(readme.BEGIN)[1])
    ]
    for case, *cells in costs:
        values = [value for cell in cells for value in numbers(cell)]
        assert len(values) == 5, case
        # 21,100 ms stands for 2.11e+04, 3,430 MB for 3,429.8
        assert any(all(any(abs(x - y) <= 1e-3 * x for y in row) for x in values) for row in generated), case


def test_licence_version_and_paper_agree():
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ercn.__version__ and citation["license"] == "Apache-2.0"
    assert citation["references"][0]["doi"] == "10.1007/s10278-024-01270-z"
    assert ercn.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_blocks_close():
    for page in PAGES:
        fences = len(re.findall(r"^```", page.read_text(), re.MULTILINE))
        assert fences == 2 * len(blocks(page)), page
