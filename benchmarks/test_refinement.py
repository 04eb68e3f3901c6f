"""Regression timings of the refinements: --benchmark-autosave once, then --benchmark-compare."""

import pytest

from ercn.benchmarks.regression import check_and_time, parameters


@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("case, variant", [*parameters("refinement"), *parameters("walk")])
def test_refinement(benchmark, case, variant):
    check_and_time(benchmark, case, variant)
