"""The common scale of two grade scales, and the error that names both where there is none."""

import numpy as np
import pytest

from ercn.data.entries import ICDR
from ercn.data.scales import BINARY, DAVIS, common_ground, scale_of


def test_a_model_of_icdr_grades_is_compared_with_davis_grades_on_davis():
    ground = common_ground(ICDR, "ordinal", DAVIS, "davis")
    assert ground.scale.names == DAVIS
    probability = np.array([[0.1, 0.2, 0.3, 0.25, 0.15]])
    np.testing.assert_allclose(ground.probability(probability), [[0.1, 0.5, 0.25, 0.15]])
    np.testing.assert_array_equal(ground.truth(np.arange(4)), np.arange(4))


def test_a_model_of_davis_grades_is_compared_with_icdr_grades_on_davis():
    ground = common_ground(DAVIS, "onehot", ICDR, "eyepacs")
    assert ground.scale.names == DAVIS
    np.testing.assert_array_equal(ground.truth(np.arange(5)), [0, 1, 1, 2, 3])
    probability = np.array([[0.4, 0.3, 0.2, 0.1]])
    np.testing.assert_array_equal(ground.probability(probability), probability)


@pytest.mark.parametrize(
    "trained, found, truth",
    [(ICDR, ICDR, [0, 0, 1, 1, 1]), (DAVIS, DAVIS, [0, 0, 1, 1]), (DAVIS, ICDR, [0, 0, 0, 1, 1])],
)
def test_referable_is_what_it_was_in_training(trained, found, truth):
    ground = common_ground(trained, "referable", found, "x")
    assert ground.scale.names == BINARY
    np.testing.assert_array_equal(ground.truth(np.arange(len(found))), truth)
    np.testing.assert_array_equal(ground.probability(np.array([[0.3, 0.7]])), [[0.3, 0.7]])


@pytest.mark.parametrize(
    "trained, targets, found",
    [
        (ICDR, "referable", DAVIS),  # SDR holds mild and moderate
        (ICDR, "ordinal", ("no DME", "referable DME")),
        (("no DME", "referable DME"), "ordinal", ICDR),
        (("0", "1", "2"), "ordinal", ICDR),
    ],
)
def test_no_common_ground_names_both_scales(trained, targets, found):
    with pytest.raises(ValueError, match="no common grades") as error:
        common_ground(trained, targets, found, "clinic")
    for name in (*scale_of(trained, targets).names, *found, "clinic"):
        assert name in str(error.value)


def test_numbered_classes_are_those_of_the_other_side():
    numbers = ("0", "1", "2", "3", "4")
    assert common_ground(ICDR, "ordinal", numbers[:3], "csv").scale.names == ICDR
    assert common_ground(numbers, "ordinal", ICDR, "eyepacs").scale.names == ICDR
    assert common_ground(numbers, "ordinal", numbers, "csv").scale.names == numbers
    np.testing.assert_array_equal(common_ground(DAVIS, "ordinal", numbers[:4], "csv").truth(np.arange(4)), range(4))
