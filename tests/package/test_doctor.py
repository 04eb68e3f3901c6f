"""``ercn doctor``: what it prints and what its exit code means."""

import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from ercn import doctor as module
from ercn.doctor import doctor
from ercn.ops import _backends, _extension, reference

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def broken_backend(monkeypatch):
    """A row of the table that answers 1 + the reference in every gradient."""

    def backward(*args):
        return tuple(x + 1 for x in reference.relu_affinity_backward(*args))

    launcher = SimpleNamespace(**{name: getattr(reference, name) for name in dir(reference) if name[0] != "_"})
    launcher.relu_affinity_backward = backward
    row = replace(_backends.TABLE[0], name="broken", device="cpu", launcher=launcher, automatic=False)
    monkeypatch.setattr(_backends, "TABLE", (*_backends.TABLE, row))


def test_every_part_is_printed(capsys):
    assert doctor() == 0
    printed = capsys.readouterr().out
    titles = ("Versions", "Hardware", "Compiled libraries", "Backends", "Training extra", "Environment variables")
    for title in titles:
        assert f"\n{title}" in printed
    assert f"torch         {metadata.version('torch')}" in printed
    assert "reference (any)" in printed and "they run" in printed


def test_selftest_compares_every_usable_backend(capsys, broken_backend):
    assert doctor(selftest=True) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " on cpu" in line]
    verdict = {line.split("  ")[1].strip(): "passed" in line for line in lines}
    assert verdict.pop("relu_affinity, broken on cpu") is False
    assert {"relu_affinity, reference on cpu", "gated_attention_pool, reference on cpu"} <= set(verdict)
    assert all(verdict.values())


@pytest.mark.parametrize("ulps, passes", [(6, True), (40, False)])
def test_the_selftest_has_the_budget_of_the_tests(capsys, broken_backend, monkeypatch, ulps, passes):
    def forward(value, feat):
        return reference.relu_affinity(value.double(), feat.double()).to(value.dtype) * (1 + ulps * EPS)

    launcher = _backends.TABLE[-1].launcher
    monkeypatch.setattr(launcher, "relu_affinity", forward)
    monkeypatch.setattr(launcher, "relu_affinity_backward", reference.relu_affinity_backward)
    assert doctor(selftest=True) == (0 if passes else 1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "relu_affinity, broken on cpu" in line)
    assert ("passed" in line) == passes


def test_a_backend_that_raises_fails_the_selftest(capsys, broken_backend, monkeypatch):
    def explode(*args):
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(_backends.TABLE[-1].launcher, "gated_attention_pool", explode)
    assert doctor(selftest=True) == 1
    assert "FAILED: NotImplementedError: no such instruction" in capsys.readouterr().out


def test_selftest_passes_here(capsys):
    assert doctor(selftest=True) == 0
    printed = capsys.readouterr().out
    assert "passed" in printed and "FAILED" not in printed


def test_an_absent_library_is_explained(capsys, monkeypatch):
    reason = "was not built: no C++ compiler: 'c++' was not found"
    monkeypatch.setattr(_extension, "load", lambda name="libercn": f"{name} {reason}")
    assert doctor() == 0
    printed = capsys.readouterr().out
    assert f"absent; libercn {reason}" in printed and f"absent; libercn_cuda {reason}" in printed
    assert module.REBUILD.format("cpu") in printed and module.REBUILD.format("cuda") in printed


def test_a_wrong_override_is_a_failure(capsys, monkeypatch):
    monkeypatch.setenv("ERCN_BACKEND", "quantum")
    assert doctor() == 1
    printed = capsys.readouterr().out
    assert re.search(r"ERCN_BACKEND +quantum", printed)
    assert "ERCN_BACKEND is 'quantum'" in printed


def test_missing_training_packages_are_named(capsys, monkeypatch):
    requirements = ["torch>=2.10", 'torch; extra == "train"', 'surely-absent[cli]>=2; extra == "train"']
    monkeypatch.setattr(metadata, "requires", lambda package: requirements)
    assert doctor() == 0
    assert "missing: surely-absent\n" in capsys.readouterr().out


def test_command_line():
    run = subprocess.run([sys.executable, "-m", "ercn", "doctor"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Versions" in run.stdout
