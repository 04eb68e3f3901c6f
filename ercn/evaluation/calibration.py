"""Calibration by one temperature that is fitted on validation, after Guo et al. (ICML 2017)."""

from __future__ import annotations

import numpy as np

RANGE = (0.05, 20.0)  # of the temperature
_STEPS = 600  # temperatures tried, 1 % apart
FLOOR = 1e-6  # smallest probability: that of an ordinal grade can be 0, which has no logarithm


def temper(probability: np.ndarray, temperature: float) -> np.ndarray:
    """p_k^(1/T) / sum_j p_j^(1/T) of probabilities [N, K]; for a softmax, softmax(logits / T).

    The most probable class does not change, nor do accuracy and kappa. T = 1 changes nothing.

    >>> temper(np.array([[0.8, 0.2]]), 2.0).round(3)
    array([[0.667, 0.333]])
    """
    if temperature == 1:
        return probability
    logarithm = np.log(np.maximum(probability, FLOOR)) / temperature
    power = np.exp(logarithm - logarithm.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def fit_temperature(probability: np.ndarray, truth: np.ndarray) -> float:
    """The T in ``RANGE``, to 1 %, with the smallest Brier score of ``temper(probability, T)``; 1 without a picture.

    Guo et al. minimise the negative log-likelihood, which can be infinite for ordinal targets: where two cumulative
    probabilities cross, the grade between them has probability 0. The Brier score is proper, too, and bounded.

    probability: [N, K]. truth: [N] int classes. Deterministic.
    """
    if len(truth) == 0:
        return 1.0
    wanted = np.eye(probability.shape[1])[truth]
    candidates = np.geomspace(*RANGE, _STEPS)
    return float(min(candidates, key=lambda t: ((temper(probability, t) - wanted) ** 2).sum()))
