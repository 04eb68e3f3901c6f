"""Metrics of grading, as sums with one weight per picture, so that a value and its bootstrap share the code.

Every function takes ``weight`` [R, N], R rows of non-negative picture weights, and returns [R]. A row of ones gives the
plain metric; a row that counts how often each picture was drawn is one bootstrap draw. Intervals resample *patients*,
each with all their pictures, because two eyes of one patient are not independent. All arithmetic is float64; NaN
means undefined (no picture of a class that is needed) and becomes ``null`` in JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.special import erf

from ercn.report.evaluation import Grading, Interval

ECE_BINS = 15
SPECIFICITIES = ("0.90", "0.95", "0.98")  # at which the sensitivity is reported
_CHUNK = 4_000_000  # weights held at once: 32 MB


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int, weight: np.ndarray) -> np.ndarray:
    """Confusion matrices [R, classes, classes]: row = truth, column = prediction, entries = summed weights."""
    cell = np.eye(classes * classes)[truth * classes + predicted]  # [N, K*K]
    return (weight @ cell).reshape(-1, classes, classes)


def accuracy(matrix: np.ndarray) -> np.ndarray:
    """Share of the diagonal of confusion matrices [R, K, K]."""
    return _divide(np.trace(matrix, axis1=1, axis2=2), matrix.sum((1, 2)))


def quadratic_kappa(matrix: np.ndarray) -> np.ndarray:
    """Cohen's kappa with weights (i - j)^2: 1 - sum(w O) / sum(w E), E the product of the margins.

    0 where prediction and truth are one and the same single class (0/0): such a prediction agrees by chance alone.
    """
    classes = matrix.shape[1]
    i = np.arange(classes)
    cost = (i[:, None] - i[None, :]) ** 2
    total = matrix.sum((1, 2))
    expected = matrix.sum(2)[:, :, None] * matrix.sum(1)[:, None, :] / np.maximum(total, 1e-300)[:, None, None]
    observed, chance = (cost * matrix).sum((1, 2)), (cost * expected).sum((1, 2))
    kappa = 1 - _divide(observed, chance)
    return np.where(total == 0, np.nan, np.where(chance == 0, 0.0, kappa))


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean F1 score over the classes that occur, in truth or prediction; 2 · hits / (true + predicted) each."""
    occurring = matrix.sum(1) + matrix.sum(2)
    each = _divide(2 * np.diagonal(matrix, axis1=1, axis2=2), occurring)  # [R, K]
    return _divide(np.nansum(each, axis=1), (occurring > 0).sum(1))


def roc_auc(score: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (Mann-Whitney, ties count half); NaN where positives or negatives are missing."""
    values, group = np.unique(score, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(values)))
    pos = np.add.reduceat((weight * positive)[:, order], starts, axis=1)  # [R, distinct scores]
    neg = np.add.reduceat((weight * ~positive)[:, order], starts, axis=1)
    below = np.cumsum(neg, axis=1) - neg / 2
    return _divide((pos * below).sum(1), pos.sum(1) * neg.sum(1))


def macro_auc(probability: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean one-versus-rest AUC over the classes that have both positives and negatives; NaN if none has."""
    each = np.stack([roc_auc(probability[:, k], truth == k, weight) for k in range(probability.shape[1])])  # [K, R]
    return _divide(np.nansum(each, axis=0), (~np.isnan(each)).sum(0))


def expected_calibration_error(probability: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ECE (Guo et al. 2017) of the winning class in 15 equal bins (lower, upper]; confidence 1 is in the last bin.

    It is biased upwards: in a bin of few pictures the gap is far from 0 even where the probabilities are right.
    """
    gap, bins = _gaps(probability, truth)
    return _divide(np.abs(weight @ (gap[:, None] * np.eye(ECE_BINS)[bins])).sum(1), weight.sum(1))


def debiased_calibration_error(
    probability: np.ndarray, truth: np.ndarray, patients: Sequence[str], weight: np.ndarray
) -> np.ndarray:
    """ECE in which each picture's gap gets the sign of the *other* patients' gaps near its confidence.

        sum_i w_i s_i gap_i / sum_i w_i,   s_i = erf(sqrt(2) sum_p g_ip / sqrt(sum_p g_ip^2)),
        g_ip = sum_j w_j k(bin_i - bin_j) gap_j

    gap = confidence - [right]; p goes over the other patients, j over their pictures, k is a Gaussian of one bin's
    width. A picture that chose its own sign would always raise the error. Where others choose it, the mean is 0 if the
    probabilities are right, for any number of pictures, and else a lower bound that tightens as pictures are added; by
    chance the value can be below 0. s_i is nearly ±1 where the others agree on the sign and smaller where they do not,
    which lowers the variance.
    This is the variational estimator of Berta et al. 2026 (arXiv 2602.24230), left out by patient, with a smoothed
    histogram in place of the isotonic regression.
    """
    gap, bins = _gaps(probability, truth)
    near = np.exp(-((np.arange(ECE_BINS)[:, None] - np.arange(ECE_BINS)) ** 2) / 2)
    own = np.unique(np.asarray(patients), return_inverse=True)[1]
    member = csr_array((np.ones(len(own)), (np.arange(len(own)), own)))
    i, j = (member @ member.T).nonzero()  # pairs of pictures of one patient, each picture with itself too
    part = weight * gap
    mine = part @ csr_array((near[bins[i], bins[j]], (j, i)), shape=(len(own), len(own)))
    others = (part @ near[bins])[:, bins] - mine
    spread = ((part[:, i] * part[:, j]) @ (near[bins[i]] * near[bins[j]]))[:, bins] - mine**2
    known = spread > 1e-9 * (part**2).max()  # rounding has no sign
    sign = erf(np.sqrt(2) * others / np.sqrt(np.where(known, spread, np.inf)))
    return _divide((part * sign).sum(1), weight.sum(1))


def _gaps(probability: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Confidence - [right] of each picture, and the bin of its confidence."""
    confidence = probability.max(1)
    return confidence - (probability.argmax(1) == truth), _bins(confidence)


def reliability(probability: np.ndarray, truth: np.ndarray) -> list[dict[str, float | int]]:
    """Pictures, mean confidence and accuracy of each bin of the ECE that holds pictures."""
    confidence, right = probability.max(1), probability.argmax(1) == truth
    bins = _bins(confidence)
    return [
        {"pictures": int(own.sum()), "confidence": float(confidence[own].mean()), "accuracy": float(right[own].mean())}
        for own in (bins == b for b in np.unique(bins))
    ]


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)


def brier(probability: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Multi-class Brier score: mean of sum_k (p_k - [truth = k])^2, in [0, 2]."""
    error = ((probability - np.eye(probability.shape[1])[truth]) ** 2).sum(1)
    return _divide(weight @ error, weight.sum(1))


def roc_points(score: np.ndarray, positive: np.ndarray, most: int = 200) -> dict[str, list[float]] | None:
    """The ROC curve from (0, 0) to (1, 1), at most ``most`` of its points; None where a class is missing."""
    if positive.all() or not positive.any():
        return None
    cuts = np.unique(score)[::-1]
    cuts = cuts[np.unique(np.linspace(0, len(cuts) - 1, most).astype(int))]
    above = score >= cuts[:, None]
    rates = {"fpr": above[:, ~positive].mean(1), "tpr": above[:, positive].mean(1)}
    return {name: [0.0, *rate.tolist()] for name, rate in rates.items()}


def referable(probability: np.ndarray) -> np.ndarray:
    """Probability of referable DR [N] from [N, K]: of all classes from ``first_referable`` on."""
    return probability[:, first_referable(probability.shape[1]) :].sum(1)


def is_referable(truth: np.ndarray, classes: int) -> np.ndarray:
    return truth >= first_referable(classes)


def first_referable(classes: int) -> int:
    """Class where referable DR begins: 2, or 1 of two."""
    return min(classes - 1, 2)


def classes_of(grade: np.ndarray, targets: str) -> np.ndarray:
    """Truth as the class that the model predicts: the grade, or [grade >= 2] for "referable" targets."""
    return (grade >= 2).astype(int) if targets == "referable" else grade


def sensitivity_specificity(
    score: np.ndarray, positive: np.ndarray, threshold: float, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Share of the positives with score >= threshold, and of the negatives with score < threshold."""
    above = score >= threshold
    return (
        _divide(weight @ (above & positive), weight @ positive.astype(float)),
        _divide(weight @ (~above & ~positive), weight @ (~positive).astype(float)),
    )


def youden_threshold(score: np.ndarray, positive: np.ndarray) -> float:
    """Threshold half-way between two neighbouring scores that maximises sensitivity + specificity.

    Meant for the validation split only. 0.5 where one of the two classes is missing or all scores are equal.
    """
    values = np.unique(score)
    if len(values) < 2 or positive.all() or not positive.any():
        return 0.5
    cuts = (values[1:] + values[:-1]) / 2
    sens = 1 - np.searchsorted(np.sort(score[positive]), cuts) / positive.sum()
    spec = np.searchsorted(np.sort(score[~positive]), cuts) / (~positive).sum()
    return float(cuts[np.argmax(sens + spec)])


def specificity_thresholds(score: np.ndarray, positive: np.ndarray) -> dict[str, float | None]:
    """For each of ``SPECIFICITIES`` the lowest threshold, half-way between two scores or just above all, that has it.

    Meant for the validation split only. None where there is no negative.
    """
    negatives, values = np.sort(score[~positive]), np.unique(score)
    if not len(negatives):
        return dict.fromkeys(SPECIFICITIES)
    cuts = np.append((values[1:] + values[:-1]) / 2, np.nextafter(values[-1], np.inf))
    specificity = np.searchsorted(negatives, cuts) / len(negatives)
    return {name: float(cuts[np.argmax(specificity >= float(name))]) for name in SPECIFICITIES}


def sensitivity_at(score: np.ndarray, positive: np.ndarray, specificity: float, weight: np.ndarray) -> np.ndarray:
    """The highest sensitivity [R] on the ROC curve at ``specificity`` or above; not interpolated.

    The same pictures choose its threshold, which is optimistic. NaN where a class is missing.
    """
    values, group = np.unique(score, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(values)))
    pos = np.add.reduceat((weight * positive)[:, order], starts, axis=1)[:, ::-1].cumsum(1)  # from the highest score
    neg = np.add.reduceat((weight * ~positive)[:, order], starts, axis=1)[:, ::-1].cumsum(1)
    allowed = neg <= neg[:, -1:] * (1 - specificity) + 1e-9
    sensitivity = _divide(np.where(allowed, pos, 0).max(1), pos[:, -1])
    return np.where(neg[:, -1] > 0, sensitivity, np.nan)


def bootstrap(
    metric: Callable[[np.ndarray], dict[str, np.ndarray]],
    patients: Sequence[str],
    draws: int,
    seed: int,
    centred: Collection[str] = (),
) -> dict[str, Interval]:
    """Values with 95 % intervals over patients: ``entry`` of each of ``samples``."""
    return {name: entry(s, name in centred) for name, s in samples(metric, patients, draws, seed).items()}


def samples(
    metric: Callable[[np.ndarray], dict[str, np.ndarray]], patients: Sequence[str], draws: int, seed: int
) -> dict[str, np.ndarray]:
    """The value of each metric, then its value in each draw: {name: [1 + draws]}.

    metric: weight [R, N] -> {name: [R]}. patients: [N], the patient of each picture. draws: how often the patients are
    resampled with replacement, each with all their pictures. The same seed gives the same draws.
    """
    parts = [metric(weight) for weight in (np.ones((1, len(patients))), *resamples(patients, draws, seed))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def entry(sample: np.ndarray, centred: bool = False) -> Interval:
    """Value and 95 % percentile interval of a sample [1 + draws]; undefined draws are left out.

    centred: shift the draws so that their mean is the value, for a metric that resampling biases: a draw repeats
    patients, which raises its calibration error.
    """
    value, drawn = sample[0], sample[1:]
    if centred and not np.isnan(drawn).all():
        drawn = drawn - np.nanmean(drawn) + value
    low, high = interval(drawn)
    return Interval(_number(value), low, high)


def resamples(patients: Sequence[str], draws: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks of weights [R, N] of pictures, ``draws`` rows in all: how often the patient of each was drawn.

    They depend on the patients (in any order), draws and seed alone, so two models can be compared draw by draw.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    while draws > 0:
        rows = min(draws, max(1, _CHUNK // len(owner)))
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=rows)  # [rows, patients]
        yield counts[:, owner].astype(float)
        draws -= rows


def interval(sample: np.ndarray) -> tuple[float | None, float | None]:
    """95 % percentile interval of the draws that are defined; None, None where none is."""
    sample = sample[~np.isnan(sample)]
    low, high = np.percentile(sample, [2.5, 97.5]) if len(sample) else (np.nan, np.nan)
    return _number(low), _number(high)


def grading(
    probability: np.ndarray,
    truth: np.ndarray,
    patients: Sequence[str],
    *,
    threshold: float,
    draws: int,
    seed: int,
    uncalibrated: np.ndarray | None = None,
    specificity: Mapping[str, float | None] | None = None,
) -> Grading:
    """Every grading metric of one split with its interval.

    probability: [N, K], rows sum to 1. truth: [N] int classes. threshold: referable-DR decision, from validation.
    uncalibrated: the probabilities before calibration, where there was one. specificity: validation's
    ``specificity_thresholds``.
    Of the result, fixed_specificity has for each of ``SPECIFICITIES`` validation's threshold with its sensitivity and
    specificity here, and "roc_sensitivity", read off the ROC of these pictures; majority is the floor, always the most
    frequent class; missing are classes without a picture, which the macro AUC leaves out; reliability is given before
    and after calibration, roc for referable DR.
    """
    probability, truth = np.asarray(probability, dtype=float), np.asarray(truth, dtype=int)
    uncalibrated = probability if uncalibrated is None else np.asarray(uncalibrated, dtype=float)
    count, classes = probability.shape
    if count == 0:
        raise ValueError("the metrics need at least one picture; the split has none that could be read")
    predicted = probability.argmax(1)
    score, positive = referable(probability), is_referable(truth, classes)
    fixed = {name: (specificity or {}).get(name) for name in SPECIFICITIES}

    def metric(weight: np.ndarray) -> dict[str, np.ndarray]:
        matrix = confusion(truth, predicted, classes, weight)
        sensitivity, specificity = sensitivity_specificity(score, positive, threshold, weight)
        return {
            "accuracy": accuracy(matrix),
            "kappa": quadratic_kappa(matrix),
            "f1": macro_f1(matrix),
            "auc": macro_auc(probability, truth, weight),
            "referable_auc": roc_auc(score, positive, weight),
            "referable_sensitivity": sensitivity,
            "referable_specificity": specificity,
            "ece": debiased_calibration_error(probability, truth, patients, weight),
            "ece_uncalibrated": debiased_calibration_error(uncalibrated, truth, patients, weight),
            "brier": brier(probability, truth, weight),
        }

    def at_specificity(weight: np.ndarray) -> dict[str, np.ndarray]:
        values = {}
        for name, cut in fixed.items():
            values[f"{name} roc_sensitivity"] = sensitivity_at(score, positive, float(name), weight)
            if cut is not None:
                pair = sensitivity_specificity(score, positive, cut, weight)
                values[f"{name} sensitivity"], values[f"{name} specificity"] = pair
        return values

    at = bootstrap(at_specificity, patients, draws, seed)
    plugin = expected_calibration_error(probability, truth, np.ones((1, count)))
    matrix = confusion(truth, predicted, classes, np.ones((1, count)))[0].astype(int)
    support = matrix.sum(1)
    return Grading(
        threshold=threshold,
        metrics=bootstrap(metric, patients, draws, seed, centred=("ece", "ece_uncalibrated"))
        | {"ece_plugin": entry(plugin)},
        fixed_specificity={
            name: {"threshold": cut} | {key.split()[1]: value for key, value in at.items() if key.startswith(name)}
            for name, cut in fixed.items()
        },
        confusion=matrix.tolist(),
        majority={"class": int(support.argmax()), "accuracy": float(support.max() / count), "kappa": 0.0},
        recall=[_number(r) for r in _divide(np.diag(matrix), support)],
        missing=[k for k in range(classes) if support[k] == 0],
        reliability={"before": reliability(uncalibrated, truth), "after": reliability(probability, truth)},
        roc=roc_points(score, positive),
    )


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    b = np.asarray(b, dtype=float)
    return np.divide(a, b, out=np.full(b.shape, np.nan), where=b != 0)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
