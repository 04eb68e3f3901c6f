"""Regression timings of ``gated_attention_pool``: --benchmark-autosave once, then --benchmark-compare."""

import pytest

from ercn.benchmarks.regression import check_and_time, parameters


@pytest.mark.benchmark(max_time=0.5, min_rounds=3)
@pytest.mark.parametrize("case, variant", parameters("mil"))
def test_attention_pool(benchmark, case, variant):
    check_and_time(benchmark, case, variant)
