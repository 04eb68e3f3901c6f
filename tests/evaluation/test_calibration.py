"""Calibration recovers a known temperature, keeps the grades, and takes grades of probability 0."""

import numpy as np
import pytest

from ercn.evaluation.calibration import RANGE, fit_temperature, temper
from ercn.evaluation.metrics import expected_calibration_error


def softmax(logits):
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def drawn(temperature, count=4000):
    """Probabilities that are overconfident by ``temperature``, and classes drawn from the right ones."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(count, 5))
    truth = (softmax(logits).cumsum(1) < rng.random((count, 1))).sum(1)
    return softmax(logits * temperature), truth


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_hidden_temperature_is_found(temperature):
    probability, truth = drawn(temperature)
    found = fit_temperature(probability, truth)
    # over seeds of the draw the estimate has a deviation of 2.4 %: three times that, and the search's step of 1 %
    assert found == pytest.approx(temperature, rel=0.08)


def test_calibration_shrinks_the_error_and_keeps_the_grades():
    probability, truth = drawn(2.5)
    after = temper(probability, fit_temperature(probability, truth))
    before, now = (expected_calibration_error(p, truth, np.ones((1, len(truth))))[0] for p in (probability, after))
    assert before > 0.1 > 3 * now
    np.testing.assert_array_equal(after.argmax(1), probability.argmax(1))
    np.testing.assert_allclose(after.sum(1), 1)


def test_of_a_softmax_it_is_the_softmax_of_divided_logits():
    logits = np.random.default_rng(1).normal(size=(20, 4))
    np.testing.assert_allclose(temper(softmax(logits), 3.0), softmax(logits / 3), atol=1e-12)
    assert temper(logits, 1.0) is logits


def test_grades_of_probability_zero_do_not_decide():
    probability = np.array([[0.9, 0.0, 0.1]] * 20)
    truth = np.array([0] * 18 + [1, 2])  # one in 20 has the grade that was called impossible
    assert 0.7 < fit_temperature(probability, truth) < 1.5  # the likelihood would say 5 and more
    assert fit_temperature(probability[:0], truth[:0]) == 1
    assert fit_temperature(probability, np.zeros(20, int)) == pytest.approx(RANGE[0])
