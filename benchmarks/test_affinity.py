"""Regression timings of ``affinity_propagate``: --benchmark-autosave once, then --benchmark-compare."""

import pytest

from ercn.benchmarks.regression import check_and_time, parameters


@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("case, variant", parameters("affinity"))
def test_affinity(benchmark, case, variant):
    check_and_time(benchmark, case, variant)
