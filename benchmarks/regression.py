"""What the pytest-benchmark suites share: one test per case and variant, grouped by case."""

from __future__ import annotations

import pytest
import torch

from ercn.benchmarks.cases import Case, suite
from ercn.benchmarks.settings import precision
from ercn.benchmarks.variants import inputs_of, variants
from ercn.benchmarks.verify import Judge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters(op: str) -> list:
    """The standard and the quick cases; the quick ones carry the marker smoke."""
    quick = suite(op, DEVICE, "quick")
    cases = dict.fromkeys([*quick, *suite(op, DEVICE, "standard")])
    return [
        pytest.param(case, v.name, id=f"{case.id}-{v.name}", marks=[pytest.mark.smoke] if case in quick else [])
        for case in cases
        for v in variants(case, DEVICE)
        if v.role == "ercn" or v.name in ("eager", case.baseline)
    ]


def check_and_time(benchmark, case: Case, name: str) -> None:
    """Fails where the output is wrong, skips where our backend cannot run the case, else times it."""
    variant = next(v for v in variants(case, DEVICE) if v.name == name)
    inputs = inputs_of(case, DEVICE)
    if reason := variant.obstacle(case, inputs):
        pytest.skip(reason)
    if variant.role != "yardstick":
        verdict = Judge(case, DEVICE, "eager").verdict(variant)
        assert verdict.reason is None, verdict.reason
    benchmark.group = case.id
    with precision(case.dtype):
        run = variant.make(case, inputs)
        run()

        def call() -> None:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(call)
    assert benchmark.stats is None or benchmark.stats.stats.min > 0
