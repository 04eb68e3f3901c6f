"""Runs tests of the Triton kernels on copies of their source with one fault each, in a process of its own:

    TRITON_INTERPRET=1 python tests/triton/_triton_faults.py SCRATCH < faults.json > results.json

A fault is (file, text, replacement, test). A fork imports its copy as ``ercn.kernels`` and runs the test. Prints
pytest's exit code for each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import hypothesis  # noqa: F401  imported once instead of in every fork
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
import triton.language  # noqa: F401

import ercn.ops

TESTS = Path(__file__).parents[1]


def become_kernels(folder: Path) -> None:
    """Import the folder as ``ercn.kernels``."""
    spec = importlib.util.spec_from_file_location(
        "ercn.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    ercn.kernels = sys.modules["ercn.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ercn.kernels)


def exit_code(folder: Path, test: str) -> int:
    """pytest's exit code on one test, in a fork."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT), 1)
        become_kernels(folder)
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", str(TESTS / test)]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(scratch: Path) -> None:
    assert "ercn.kernels" not in sys.modules
    source = Path(importlib.util.find_spec("ercn.kernels").origin).parent
    codes = []
    for index, (file, text, replacement, test) in enumerate(json.load(sys.stdin)):
        folder = scratch / str(index)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
        code = (folder / file).read_text(encoding="utf-8")
        assert code.count(text) > 0, f"{file} has no {text!r}"
        (folder / file).write_text(code.replace(text, replacement), encoding="utf-8")
        codes.append(exit_code(folder, test))
    json.dump(codes, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
