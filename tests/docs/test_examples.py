"""Every python block of the pages runs and prints what stands below it; every command has its options."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import re
import shlex
import sys
import types

import pytest
from _pages import NAMES, PAGES, ROOT, blocks, code_spans

from ercn import cli

WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    """The blocks of a page are one program, in their order."""
    monkeypatch.chdir(tmp_path)
    program = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", program)
    ran = 0
    for block, below in zip(found := blocks(page), [*found[1:], None]):
        if block.language != "python" or block.reason:
            continue
        printed = io.StringIO()
        tree = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(tree, vars(program))  # noqa: S102
        ran += 1
        if printed.getvalue():
            assert below is not None and below.language == "text", f"line {block.line} prints: {printed.getvalue()}"
            assert printed.getvalue() == below.code
    assert ran or all(block.reason for block in found if block.language == "python")


def test_code_that_does_not_run_here_is_sound_and_says_why():
    left_out = [block for page in PAGES for block in blocks(page) if block.reason]
    assert left_out and len(left_out) <= 3, "examples run, unless they need files or a GPU"
    for block in left_out:
        ast.parse(block.code)


def test_the_first_example_of_the_operators_stands_alone():
    """.ci/use_wheel.py runs it on the installed wheel, without extras."""
    first = next(block for block in blocks(ROOT / "README.md") if "ercn.ops" in block.code)
    assert first.language == "python" and len(first.code.splitlines()) <= 12
    modules = {node.module for node in ast.walk(ast.parse(first.code)) if isinstance(node, ast.ImportFrom)}
    assert modules == {"ercn.ops"}


def command_lines(page):
    """Shell commands of blocks, and spans of code that are a command of ours."""
    for block in blocks(page):
        if block.language in ("sh", "bash", "console"):
            yield from re.sub(r"\\\n\s*", " ", block.code).splitlines()
    yield from (span for span in code_spans(page) if re.match(r"(ercn [a-z]|make [a-z]|python -m ercn)", span))


@functools.cache
def help_of(*command):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as done:
        cli.main([*command, "--help"])
    assert done.value.code == 0, command
    return text.getvalue()


def wrong_in(line, targets):
    """What a command line asks for that is not there; only our own commands are looked at."""
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"\w+=\S*", word)]
    if words[:1] == ["make"]:
        return [word for word in words[1:] if word not in targets]
    for at, word in enumerate(words):
        if word == "ercn" and (at == 0 or words[at - 1] == "-m"):
            command, *rest = words[at + 1 :]
            if command.startswith("-"):
                return [] if command in help_of() else [command]
            if command.isupper():
                return []
            inner = [rest[0]] if command == "bench" and rest and rest[0] in ("compare", "plot", "readme") else []
            options = {word.partition("=")[0] for word in rest if word.startswith("--")} - {"--help", "--debug"}
            known = help_of(command, *inner) + "--preset"
            return sorted(option for option in options if not re.search(rf"{re.escape(option)}\b", known))
        if word.endswith(".py") and words[0].startswith("python"):
            return [] if word.startswith("exported/") or (ROOT / word).is_file() else [word]
    return []


def test_commands_and_options_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [(name, line) for name, page in zip(NAMES, PAGES) for line in command_lines(page)]
    wrong = [(name, line, bad) for name, line in lines if line.strip() and (bad := wrong_in(line, targets))]
    assert not wrong
    assert sum("ercn " in line for _, line in lines) > 40
    assert wrong_in("ercn train --model.colour red", targets) == ["--model.colour"]


def test_every_command_is_on_its_page():
    overview = set(re.findall(r"^  (\w+(?: \w+)?)  ", help_of(), re.MULTILINE))
    listed = re.findall(r"^\| `(\w+(?: \w+)?)` \|", (ROOT / "docs/command-line.md").read_text(), re.MULTILINE)
    assert "bench compare" in overview and set(listed) == overview and len(listed) == len(overview)
