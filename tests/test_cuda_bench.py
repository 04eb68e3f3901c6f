"""What the bench tells of the CUDA kernels that a call launches, with a stand-in for the compiled module."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import ercn
from ercn.benchmarks import kernels


@pytest.fixture
def records(monkeypatch):
    forward = {
        "name": "ercn::affinity::Forward<ercn::affinity::BFloat16>", "launches": 2, "threads": 128, "registers": 234,
        "local_bytes": 0, "static_shared_bytes": 0, "dynamic_shared_bytes": 90112, "blocks_per_multiprocessor": 2,
    }  # fmt: skip
    table = [forward, forward | {"name": "ercn::pool::Combine", "launches": 5}]
    module = SimpleNamespace(kernels=lambda: table, kernel_attributes=lambda: table)
    monkeypatch.setitem(sys.modules, "ercn._cuda", module)
    monkeypatch.setattr(ercn, "_cuda", module, raising=False)
    monkeypatch.setattr(kernels.cuda, "unavailable", lambda: None)
    return table


def test_only_what_was_launched_is_told(records):
    with kernels.launched() as found:
        records[0]["launches"] += 3
    assert [(k["name"], k["launches"]) for k in found] == [(records[0]["name"], 3)]
    (sentence,) = kernels.described([{"kernels": found}, {"kernels": found}, {}])
    assert sentence == (
        "affinity::Forward<ercn::affinity::BFloat16>: 234 registers, 0 bytes local, 90,112 bytes shared, 128 threads, "
        "2 blocks a multiprocessor"
    )


def test_nothing_is_told_without_the_backend(monkeypatch):
    monkeypatch.setattr(kernels.cuda, "unavailable", lambda: "torch finds no GPU, or no driver for it")
    with kernels.launched() as found:
        pass
    assert found == [] and kernels.described([{"kernels": found}]) == []
