from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ercn.data import DataError
from ercn.data.splits import SPLITS, check_splits, split_hashes, split_patients

NAMES = ["none", "mild", "severe"]
SHARES = (0.7, 0.1, 0.2)


def pictures(grades, split):
    return [(f"{p}_{i}", p, g, split[p]) for p, gs in grades.items() for i, g in enumerate(gs)]


@settings(deadline=None, max_examples=60)
@given(
    grades=st.dictionaries(
        st.text("abc0123", min_size=1), st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=3
    ),
    shares=st.sampled_from([SHARES, (0.5, 0.25, 0.25), (0.8, 0.2, 0.0), (1.0, 0.0, 0.0)]),
    seed=st.integers(0, 5),
)
def test_every_patient_has_one_split_and_every_worst_grade_is_in_train(grades, shares, seed):
    split = split_patients(grades, shares, seed)
    assert set(split) == set(grades) and set(split.values()) <= set(SPLITS)
    assert {max(grades[p]) for p in grades} == {max(grades[p]) for p in grades if split[p] == "train"}
    assert all(share > 0 or name not in split.values() for name, share in zip(SPLITS, shares))
    assert split == split_patients(dict(reversed(grades.items())), shares, seed)


def test_sizes_and_strata_are_right_to_within_a_patient():
    rng = np.random.default_rng(0)
    grades = {f"p{i}": [int(g)] * 2 for i, g in enumerate(rng.choice(5, 1000, p=[0.6, 0.2, 0.1, 0.06, 0.04]))}
    split = split_patients(grades, SHARES, 0)
    count = Counter(split.values())
    assert all(abs(count[name] - 1000 * share) <= 1 for name, share in zip(SPLITS, SHARES))
    for grade in range(5):
        inside = Counter(split[p] for p, g in grades.items() if g[0] == grade)
        assert all(abs(inside[name] - inside.total() * share) <= 1.5 for name, share in zip(SPLITS, SHARES))
    assert split != split_patients(grades, SHARES, 1)


@pytest.mark.parametrize("shares", [(0.7, 0.2), (0.7, 0.2, 0.2), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_must_be_three_shares(shares):
    with pytest.raises(DataError, match="fractions must be three numbers"):
        split_patients({"a": [0]}, shares, 0)


def test_a_patient_in_two_splits_is_named():
    rows = [("7_left", "7", 0, "train"), ("8_left", "8", 1, "train"), ("7_right", "7", 0, "test")]
    with pytest.raises(DataError, match="labels.csv: patient '7' is in the splits 'train' and 'test'.*'7_right'"):
        check_splits(rows, NAMES[:2], "labels.csv")


def test_an_empty_class_is_named():
    rows = [("1", "1", 0, "train"), ("2", "2", 1, "train"), ("3", "3", 2, "val")]
    with pytest.raises(DataError, match=r"no picture of grade 2 \(severe\) in the train split"):
        check_splits(rows, NAMES, "labels.csv")
    with pytest.raises(DataError, match=r"labels.csv: no picture of grade 2 \(severe\); every grade needs some"):
        check_splits(rows[:2], NAMES, "labels.csv")


def test_a_class_that_is_missing_in_val_or_test_is_reported():
    rows = [(str(g), str(g), g, "train") for g in range(3)] + [("v", "v", 1, "val")]
    assert check_splits(rows, NAMES, "labels.csv") == [
        "no picture of grade 0 (none), 2 (severe) in the val split",
    ]
    assert check_splits(rows[:3], NAMES, "labels.csv") == []  # no val and no test split at all


def test_hashes_tell_every_change_and_no_order():
    rows = [("1_l", "1", 0, "train"), ("1_r", "1", 1, "train"), ("2_l", "2", 1, "test")]
    hashes = split_hashes(rows)
    assert hashes == split_hashes(rows[::-1])
    assert (hashes["train"]["pictures"], hashes["train"]["patients"], hashes["val"]["pictures"]) == (2, 1, 0)
    for changed in (("1_r", "1", 2, "train"), ("1_x", "1", 1, "train"), ("1_r", "3", 1, "train")):
        assert split_hashes([rows[0], changed, rows[2]])["train"]["sha256"] != hashes["train"]["sha256"]
