"""The standard phantom cannot be graded by trivial cues: quadratic weighted kappa of each on unseen patients < 0.5.

Each cue is graded by a ridge regression on its standardized features and their squares, with cut points fitted on the
training patients. Area and number of lesions come from the true masks. Any lesion excludes grade 0 by definition, which
alone gives a kappa of 0.73 at these shares of grades, so these two cues are judged among the eyes with lesions. They
are judged one by one: together they give the mean size of a lesion, which identifies microaneurysms.
"""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ercn.data import render_phantom
from ercn.data.phantom import phantom_grades

PATIENTS, SIZE, SEED = 250, 97, 11
PERCENTILES = (0.5, 1, 2, 5, 10, 25, 50, 75, 90, 95, 98, 99, 99.5)


def high_pass(picture):
    return picture - ndimage.uniform_filter(picture, (17, 17, 0))


def percentiles(values, inside):
    return np.percentile(values[inside], PERCENTILES, axis=0).ravel()


def blobs(picture, inside):
    """Number and area of dark and of bright spots at three thresholds of a difference of Gaussians."""
    green = picture[..., 1]
    difference = ndimage.gaussian_filter(green, 1) - ndimage.gaussian_filter(green, 4)
    found = []
    for sign in (-1, 1):
        for threshold in (4, 8, 14):
            spots = (sign * difference > threshold) & inside
            found += [ndimage.label(spots)[1], spots.sum()]
    return np.log1p(found)


def file_size(picture, **options):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **options)
    return file.tell()


def cues_of(picture, masks):
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    inside = np.hypot(axis[:, None], axis) < 0.9 * SIZE / 2
    values = picture.astype(float)
    union = np.logical_or.reduce([*masks.values(), np.zeros((SIZE, SIZE), bool)])
    small = Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX)
    return {
        "brightness": np.concatenate([values[inside].mean(0), values[inside].std(0)]),
        "color percentiles": percentiles(values, inside),
        "high-pass percentiles": percentiles(high_pass(values), inside),
        "thumbnail": np.asarray(small, float).ravel(),
        "file size": np.log([file_size(picture, format="JPEG", quality=90), file_size(picture, format="PNG")]),
        "blobs": blobs(values, inside),
        "lesion area": np.log([1 + union.sum()]),
        "lesion number": np.log([1 + sum(ndimage.label(mask)[1] for mask in masks.values())]),
    }


@pytest.fixture(scope="module")
def pictures():
    """Cues [N, F] by name, grades [N], and which pictures are of training patients, [N]."""
    rows, grades, train = [], [], []
    for patient, pair in enumerate(phantom_grades(PATIENTS, SEED)):
        for eye, grade in zip(("left", "right"), pair):
            rows.append(cues_of(*render_phantom(patient, eye, grade, SIZE, SEED)))
            grades.append(grade)
            train.append(patient % 2 == 0)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, np.array(grades), np.array(train)


def kappa(truth, grade):
    """Quadratic weighted kappa: 1 - mean (t - g)² over the pictures / mean over all pairs of pictures."""
    return 1 - ((truth - grade) ** 2).mean() / ((truth**2).mean() + (grade**2).mean() - 2 * truth.mean() * grade.mean())


def cut_points(score, truth):
    """Four cuts that maximize kappa, by coordinate ascent over quantiles of the score."""
    candidates = np.unique(np.quantile(score, np.linspace(0.02, 0.98, 40)))
    cuts = np.quantile(score, np.cumsum(np.bincount(truth, minlength=5))[:4] / len(truth))
    for _ in range(2):
        for i in range(4):
            tried = [np.sort([*np.delete(cuts, i), candidate]) for candidate in candidates]
            cuts = max([cuts, *tried], key=lambda c: kappa(truth, np.digitize(score, c)))
    return cuts


def graded(features, truth, train):
    """Kappa on the test patients."""
    scaled = StandardScaler().fit(features[train]).transform(features)
    x = np.concatenate([scaled, scaled**2], 1)
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13)))
    cuts = cut_points(cross_val_predict(model, x[train], truth[train], cv=5), truth[train])
    score = model.fit(x[train], truth[train]).predict(x[~train])
    return kappa(truth[~train], np.digitize(score, cuts))


def test_the_judge_finds_grades_where_they_are(pictures):
    _, truth, train = pictures
    noisy = truth[:, None] + np.random.default_rng(0).normal(scale=0.5, size=(len(truth), 1))
    assert graded(noisy, truth, train) > 0.85
    assert abs(graded(np.random.default_rng(1).normal(size=(len(truth), 5)), truth, train)) < 0.2


@pytest.mark.parametrize(
    "name",
    ["brightness", "color percentiles", "high-pass percentiles", "thumbnail", "file size", "blobs", "all of them"],
)
def test_no_trivial_cue_grades(pictures, name):
    cues, truth, train = pictures
    names = ["brightness", "color percentiles", "high-pass percentiles", "thumbnail", "file size", "blobs"]
    features = cues[name] if name in cues else np.concatenate([cues[one] for one in names], 1)
    assert graded(features, truth, train) < 0.5


@pytest.mark.parametrize("name", ["lesion area", "lesion number"])
def test_area_and_number_of_lesions_do_not_tell_the_grade(pictures, name):
    cues, truth, train = pictures
    some = truth > 0
    assert graded(cues[name][some], truth[some], train[some]) < 0.5
