import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, cohen_kappa_score, jaccard_score, roc_auc_score

from ercn.training import metrics as m
from ercn.training.localization import LEVELS, Localization, average_precision, histograms, pointing, precision_recall


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
    for row, w in enumerate(weight):
        again = np.repeat(np.arange(len(truth)), w.astype(int))
        p, t = probability[again], truth[again]
        assert m.accuracy(matrix)[row] == pytest.approx((p.argmax(1) == t).mean())
        assert kappa[row] == pytest.approx(cohen_kappa_score(t, p.argmax(1), weights="quadratic", labels=range(5)))
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
    assert m.grading(probability, truth, list("abcd"), threshold=0.5, draws=5, seed=0)["missing"] == [2]


def test_calibration_error_counts_confidence_one_and_bin_edges():
    # confidence 1, one of two right: gap |1 - 0.5| over 2 of 4 pictures; confidence 0.6, both right: gap |0.6 - 1|
    probability = np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.4], [0.4, 0.6]])
    truth = np.array([0, 1, 0, 1])
    assert m.expected_calibration_error(probability, truth, np.ones((1, 4)))[0] == pytest.approx(0.5 * 0.5 + 0.5 * 0.4)
    sure = np.eye(2)[[0, 1, 1]]
    assert m.expected_calibration_error(sure, np.array([0, 1, 1]), np.ones((1, 3)))[0] == 0


def test_threshold_maximises_sensitivity_plus_specificity():
    rng = np.random.default_rng(3)
    positive = rng.random(80) < 0.4
    score = rng.random(80) + 0.3 * positive
    threshold = m.youden_threshold(score, positive)
    reached = sum(m.sensitivity_specificity(score, positive, threshold, np.ones((1, 80))))[0]
    best = max(sum(m.sensitivity_specificity(score, positive, t, np.ones((1, 80))))[0] for t in np.r_[score, 9])
    assert reached == pytest.approx(best)
    assert m.youden_threshold(score, np.ones(80, bool)) == 0.5


def test_bootstrap_resamples_patients_not_pictures():
    # 20 patients with 10 equal pictures each: the interval must be that of 20 independent values, not of 200
    right = np.repeat(np.arange(20) % 2, 10).astype(float)
    interval = m.bootstrap(lambda w: {"x": w @ right / w.sum(1)}, np.repeat(np.arange(20), 10), 4000, 0)["x"]
    assert interval["value"] == 0.5
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(20), rel=0.12)


def test_bootstrap_of_2000_draws_is_quick_and_repeats(case):
    start = time.perf_counter()
    first = m.grading(*case, threshold=0.4, draws=2000, seed=5)
    assert time.perf_counter() - start < 10
    assert first == m.grading(*case, threshold=0.4, draws=2000, seed=5)
    assert first["metrics"] != m.grading(*case, threshold=0.4, draws=2000, seed=6)["metrics"]
    for name in set(first["metrics"]) - {"ece"}:  # a resampled ECE is biased upwards
        entry = first["metrics"][name]
        assert entry["low"] < entry["value"] < entry["high"]
    assert first["majority"]["accuracy"] == np.bincount(case[1]).max() / 150
    assert np.sum(first["confusion"]) == 150 and first["patients"] == 75


def test_draws_in_chunks_equal_draws_at_once(case, monkeypatch):
    whole = m.grading(*case, threshold=0.4, draws=60, seed=5)
    monkeypatch.setattr(m, "_CHUNK", 1000)
    chunked = m.grading(*case, threshold=0.4, draws=60, seed=5)["metrics"]
    for name, entry in whole["metrics"].items():
        assert chunked[name] == pytest.approx(entry, rel=1e-12)  # the matrix product may round otherwise


def test_no_picture_is_an_error():
    with pytest.raises(ValueError, match="at least one picture"):
        m.grading(np.zeros((0, 5)), np.zeros(0, int), [], threshold=0.5, draws=1, seed=0)


def heat_and_lesion(seed=0, size=64):
    rng = np.random.default_rng(seed)
    lesion = np.zeros((size, size), bool)
    y, x = rng.integers(8, size - 8, 2)
    lesion[y - 4 : y + 4, x - 4 : x + 4] = True
    heat = np.clip(rng.random((size, size)) * 0.7 + 0.25 * lesion, 0, 1)
    return (heat * LEVELS).astype(int) / LEVELS, lesion  # on the levels, so that the histogram loses nothing


def test_aupr_and_iou_equal_sklearn_over_pooled_pixels():
    cases = [heat_and_lesion(s) for s in range(3)]
    pooled = np.sum([histograms(*c) for c in cases], axis=0)[None]
    heat, lesion = (np.concatenate([c[i].ravel() for c in cases]) for i in (0, 1))
    assert average_precision(pooled)[0] == pytest.approx(average_precision_score(lesion, heat), abs=1e-12)
    iou = precision_recall(pooled)[2][0]
    for level in (0, 300, 700, LEVELS - 1):
        assert iou[level] == pytest.approx(jaccard_score(lesion, heat >= level / LEVELS), abs=1e-12)


def test_a_perfect_a_constant_and_an_all_ones_map():
    _, lesion = heat_and_lesion()
    collected = Localization()
    collected.add({"perfect": lesion.astype(float), "flat": np.zeros(lesion.shape)}, lesion, "a")
    thresholds = collected.best_thresholds()
    result = collected.summary(thresholds, draws=10, seed=0)
    assert result["maps"]["perfect"]["aupr"]["value"] == result["maps"]["perfect"]["iou"]["value"] == 1
    assert result["maps"]["perfect"]["pointing"]["value"] == 1
    assert result["maps"]["flat"]["aupr"]["value"] == pytest.approx(result["floor"]["aupr"]) == lesion.mean()
    assert result["maps"]["flat"]["pointing"]["value"] == pytest.approx(result["floor"]["pointing"])
    assert histograms(np.ones(lesion.shape), lesion)[1, -1] == lesion.sum()


def test_pointing_uses_the_maximum():
    near = np.zeros((4, 4), bool)
    near[1, 2] = True
    heat = np.zeros((4, 4))
    heat[1, 2] = 0.3
    assert pointing(heat, near) == 1
    heat[0, 0] = 0.4
    assert pointing(heat, near) == 0


def test_pictures_without_lesions_do_not_count():
    collected = Localization()
    collected.add({"cam": np.ones((8, 8))}, np.zeros((8, 8)), "a")
    assert collected.summary({}, draws=10, seed=0) is None
