"""Grading metrics against scikit-learn, the calibration error, and the patient bootstrap."""

import time

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, cohen_kappa_score, f1_score, roc_auc_score, roc_curve

from ercn.evaluation import metrics as m


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    truth = rng.choice(5, 150, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    logits = rng.normal(size=(150, 5)) + 1.5 * np.eye(5)[truth]
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probability, truth, [f"p{i // 2}" for i in range(150)]


def draws(n, rows=7):
    return np.random.default_rng(1).integers(0, 4, size=(rows, n)).astype(float)


def test_each_weighted_metric_equals_sklearn_on_the_repeated_pictures(case):
    probability, truth, _ = case
    probability = probability.round(1)  # many tied scores
    probability /= probability.sum(1, keepdims=True)
    weight = draws(len(truth))
    matrix = m.confusion(truth, probability.argmax(1), 5, weight)
    macro, kappa = m.macro_auc(probability, truth, weight), m.quadratic_kappa(matrix)
    score, positive = m.referable(probability), m.is_referable(truth, 5)
    auc, brier = m.roc_auc(score, positive, weight), m.brier(probability, truth, weight)
    f1 = m.macro_f1(matrix)
    for row, w in enumerate(weight):
        again = np.repeat(np.arange(len(truth)), w.astype(int))
        p, t = probability[again], truth[again]
        assert m.accuracy(matrix)[row] == pytest.approx((p.argmax(1) == t).mean())
        assert kappa[row] == pytest.approx(cohen_kappa_score(t, p.argmax(1), weights="quadratic", labels=range(5)))
        assert f1[row] == pytest.approx(f1_score(t, p.argmax(1), average="macro"))
        assert macro[row] == pytest.approx(roc_auc_score(t, p, multi_class="ovr", average="macro"))
        assert auc[row] == pytest.approx(roc_auc_score(positive[again], score[again]))
        assert brier[row] == pytest.approx(sum(brier_score_loss(t == k, p[:, k]) for k in range(5)))


def test_kappa_of_the_constant_prediction_is_zero_also_where_the_truth_is_constant():
    truth, one = np.array([0, 0, 3]), np.ones((1, 3))
    assert m.quadratic_kappa(m.confusion(truth, np.zeros(3, int), 5, one))[0] == 0
    assert m.quadratic_kappa(m.confusion(np.zeros(3, int), np.zeros(3, int), 5, one))[0] == 0


def test_macro_auc_leaves_a_missing_class_out():
    probability = np.array([[0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0], [0.7, 0.2, 0.1]])
    truth = np.array([0, 1, 1, 0])
    expected = (roc_auc_score(truth == 0, probability[:, 0]) + roc_auc_score(truth == 1, probability[:, 1])) / 2
    assert m.macro_auc(probability, truth, np.ones((1, 4)))[0] == pytest.approx(expected)
    assert np.isnan(m.macro_auc(probability, np.zeros(4, int), np.ones((1, 4)))[0])
    assert m.grading(probability, truth, list("abcd"), threshold=0.5, draws=5, seed=0).missing == [2]


def test_calibration_error_counts_confidence_one_and_bin_edges():
    # confidence 1, one of two right: gap |1 - 0.5| over 2 of 4 pictures; confidence 0.6, both right: gap |0.6 - 1|
    probability = np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.4], [0.4, 0.6]])
    truth = np.array([0, 1, 0, 1])
    assert m.expected_calibration_error(probability, truth, np.ones((1, 4)))[0] == pytest.approx(0.5 * 0.5 + 0.5 * 0.4)
    sure = np.eye(2)[[0, 1, 1]]
    assert m.expected_calibration_error(sure, np.array([0, 1, 1]), np.ones((1, 3)))[0] == 0


def test_the_reliability_bins_give_the_calibration_error(case):
    probability, truth, _ = case
    bins = m.reliability(probability, truth)
    gaps = sum(b["pictures"] * abs(b["confidence"] - b["accuracy"]) for b in bins)
    one = np.ones((1, len(truth)))
    assert sum(b["pictures"] for b in bins) == len(truth)
    assert gaps / len(truth) == pytest.approx(m.expected_calibration_error(probability, truth, one)[0])


def test_the_roc_points_are_sklearns(case):
    score, positive = m.referable(case[0]), m.is_referable(case[1], 5)
    points = m.roc_points(score, positive)
    fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
    assert (points["fpr"], points["tpr"]) == (fpr.tolist(), tpr.tolist())
    few = m.roc_points(score, positive, most=10)
    assert set(zip(few["fpr"], few["tpr"])) <= set(zip(fpr, tpr)) and (few["fpr"][-1], few["tpr"][-1]) == (1, 1)
    assert m.roc_points(score, np.ones(len(score), bool)) is None


def test_threshold_maximises_sensitivity_plus_specificity():
    rng = np.random.default_rng(3)
    positive = rng.random(80) < 0.4
    score = rng.random(80) + 0.3 * positive
    threshold = m.youden_threshold(score, positive)
    reached = sum(m.sensitivity_specificity(score, positive, threshold, np.ones((1, 80))))[0]
    best = max(sum(m.sensitivity_specificity(score, positive, t, np.ones((1, 80))))[0] for t in np.r_[score, 9])
    assert reached == pytest.approx(best)
    assert m.youden_threshold(score, np.ones(80, bool)) == 0.5


@pytest.mark.parametrize("patients", [1, 2])
@pytest.mark.parametrize("shift", [0, 0.1, 0.25])
def test_the_calibration_error_of_100_pictures_and_its_interval_that_covers_the_true_one(shift, patients):
    """Confidences of 11 bins; right with probability confidence - shift, and alike for all pictures of a patient."""
    rng = np.random.default_rng(0)
    estimates, plugins, covered = [], [], []
    for _ in range(200):
        confidence = (rng.integers(4, 15, 100 // patients) + 0.5) / 15
        truth = (rng.random(len(confidence)) >= confidence - shift).astype(int)  # class 0 is always predicted
        confidence, truth = np.repeat(confidence, patients), np.repeat(truth, patients)
        owner = np.repeat(np.arange(len(truth) // patients), patients)
        probability = np.stack([confidence, *[(1 - confidence) / 4] * 4], axis=1)
        entry = m.bootstrap(
            lambda w, p=probability, t=truth, o=owner: {"ece": m.debiased_calibration_error(p, t, o, w)},
            owner, 200, 0, centred=("ece",),
        )["ece"]  # fmt: skip
        estimates.append(entry.value)
        plugins.append(m.expected_calibration_error(probability, truth, np.ones((1, len(truth))))[0])
        covered.append(entry.low <= shift <= entry.high)
    assert np.mean(covered) >= 0.9
    assert shift - 0.05 < np.mean(estimates) < shift + 0.02  # a lower bound
    if shift == 0:
        assert abs(np.mean(estimates)) < 0.02 and np.mean(plugins) > 0.1  # the bias that the estimator removes


def test_the_calibration_error_of_many_pictures_is_guos():
    rng = np.random.default_rng(0)
    confidence = (rng.integers(4, 15, 20000) + 0.5) / 15
    truth = (rng.random(len(confidence)) >= confidence - np.where(confidence > 0.7, 0.2, -0.1)).astype(int)
    probability = np.stack([confidence, *[(1 - confidence) / 4] * 4], axis=1)
    weight = np.ones((1, len(truth)))
    plugin = m.expected_calibration_error(probability, truth, weight)
    assert m.debiased_calibration_error(probability, truth, np.arange(20000), weight) == pytest.approx(plugin, abs=2e-3)
    some, repeated = slice(0, 300), np.repeat(np.arange(300), 2)  # weights are repeats, of the same patients
    args = probability[some], truth[some], np.arange(300)
    again = m.debiased_calibration_error(*(a[repeated] for a in args), np.ones((1, 600)))
    assert m.debiased_calibration_error(*args, np.full((1, 300), 2.0)) == pytest.approx(again)
    assert m.debiased_calibration_error(probability[:1], truth[:1], ["a"], weight[:, :1])[0] == 0  # no other patient


def test_sensitivity_at_a_specificity_is_sklearns_and_its_threshold_has_it():
    rng = np.random.default_rng(4)
    positive = rng.random(300) < 0.4
    score = (rng.normal(size=300) + 1.2 * positive).round(1)  # with ties
    thresholds = m.specificity_thresholds(score, positive)
    one = np.ones((1, 300))
    for name, cut in thresholds.items():
        fpr, tpr, _ = roc_curve(positive, score, drop_intermediate=False)
        best = tpr[fpr <= 1 - float(name) + 1e-9].max()
        assert m.sensitivity_at(score, positive, float(name), one)[0] == pytest.approx(best)
        sensitivity, specificity = m.sensitivity_specificity(score, positive, cut, one)
        assert specificity[0] >= float(name) and sensitivity[0] == pytest.approx(best)
    assert m.specificity_thresholds(score, np.ones(300, bool)) == dict.fromkeys(m.SPECIFICITIES)
    assert m.specificity_thresholds(np.array([0.5, 1.0]), np.array([True, False]))["0.98"] > 1
    assert np.isnan(m.sensitivity_at(score, np.ones(300, bool), 0.9, one)[0])
    weight = draws(300)
    for row, w in enumerate(weight):
        again = np.repeat(np.arange(300), w.astype(int))
        expected = m.sensitivity_at(score[again], positive[again], 0.95, np.ones((1, len(again))))[0]
        assert m.sensitivity_at(score, positive, 0.95, weight)[row] == pytest.approx(expected)


def test_grading_tells_the_sensitivity_at_validations_threshold_and_that_of_the_roc(case):
    fixed = m.grading(*case, threshold=0.5, draws=20, seed=0, specificity={"0.90": 0.3}).fixed_specificity
    score, positive = m.referable(case[0]), m.is_referable(case[1], 5)
    expected = m.sensitivity_specificity(score, positive, 0.3, np.ones((1, 150)))
    assert fixed["0.90"]["threshold"] == 0.3
    assert (fixed["0.90"]["sensitivity"].value, fixed["0.90"]["specificity"].value) == expected
    assert fixed["0.95"].keys() == {"threshold", "roc_sensitivity"} and fixed["0.95"]["threshold"] is None


def test_bootstrap_resamples_patients_not_pictures():
    # 20 patients with 10 equal pictures each: the interval must be that of 20 independent values, not of 200
    right = np.repeat(np.arange(20) % 2, 10).astype(float)
    interval = m.bootstrap(lambda w: {"x": w @ right / w.sum(1)}, np.repeat(np.arange(20), 10), 4000, 0)["x"]
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(20), rel=0.12)


def test_bootstrap_of_2000_draws_is_quick_and_repeats(case):
    start = time.perf_counter()
    first = m.grading(*case, threshold=0.4, draws=2000, seed=5)
    assert time.perf_counter() - start < 10
    assert first == m.grading(*case, threshold=0.4, draws=2000, seed=5)
    assert first.metrics != m.grading(*case, threshold=0.4, draws=2000, seed=6).metrics
    for name in set(first.metrics) - {"ece_plugin"}:
        entry = first.metrics[name]
        assert entry.low < entry.value < entry.high
    assert first.majority["accuracy"] == np.bincount(case[1]).max() / 150
    assert np.sum(first.confusion) == 150


def test_draws_in_chunks_equal_draws_at_once(case, monkeypatch):
    whole = m.grading(*case, threshold=0.4, draws=60, seed=5)
    monkeypatch.setattr(m, "_CHUNK", 1000)
    chunked = m.grading(*case, threshold=0.4, draws=60, seed=5).metrics
    for name in set(chunked) - {"ece_plugin"}:
        entry = whole.metrics[name]
        assert vars(chunked[name]) == pytest.approx(vars(entry), rel=1e-12)  # the matrix product may round otherwise


def test_no_picture_is_an_error():
    with pytest.raises(ValueError, match="at least one picture"):
        m.grading(np.zeros((0, 5)), np.zeros(0, int), [], threshold=0.5, draws=1, seed=0)
