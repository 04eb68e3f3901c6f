"""Localisation metrics against scikit-learn over the pooled pixels, by lesion, and without the optic disc."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, jaccard_score

from ercn.training.localization import (
    LEVELS,
    Localization,
    average_precision,
    histograms,
    levels_of,
    pointing,
    precision_recall,
)

SIZE = 64
ALL = np.ones((SIZE, SIZE), bool)


def square(rng, half=4):
    mask = np.zeros((SIZE, SIZE), bool)
    y, x = rng.integers(2 * half, SIZE - 2 * half, 2)
    mask[y - half : y + half, x - half : x + half] = True
    return mask


def heat_and_lesion(seed=0):
    rng = np.random.default_rng(seed)
    lesion = square(rng)
    heat = np.clip(rng.random((SIZE, SIZE)) * 0.7 + 0.25 * lesion, 0, 1)
    return (heat * LEVELS).astype(int) / LEVELS, lesion  # on the levels, so that the histogram loses nothing


def pooled(cases):
    return np.sum([histograms(levels_of(heat), lesion, ALL) for heat, lesion in cases], axis=0)[None]


def test_aupr_and_iou_equal_sklearn_over_pooled_pixels():
    cases = [heat_and_lesion(s) for s in range(3)]
    precision, recall, iou = precision_recall(pooled(cases))
    heat, lesion = (np.concatenate([c[i].ravel() for c in cases]) for i in (0, 1))
    assert average_precision(precision, recall)[0] == pytest.approx(average_precision_score(lesion, heat), abs=1e-12)
    for level in (0, 300, 700, LEVELS - 1):
        assert iou[0][level] == pytest.approx(jaccard_score(lesion, heat >= level / LEVELS), abs=1e-12)


def test_a_perfect_a_constant_and_an_all_ones_map():
    _, lesion = heat_and_lesion()
    collected = Localization()
    collected.add({"perfect": lesion.astype(float), "flat": np.zeros(lesion.shape)}, {"spot": lesion}, "a")
    result = collected.summary(collected.thresholds(), draws=10, seed=0)
    assert result["maps"]["perfect"]["aupr"]["value"] == result["maps"]["perfect"]["iou"]["value"] == 1
    assert result["maps"]["perfect"]["pointing"]["value"] == 1
    assert result["maps"]["flat"]["aupr"]["value"] == pytest.approx(result["floor"]["aupr"]) == lesion.mean()
    assert result["maps"]["flat"]["pointing"]["value"] == pytest.approx(result["floor"]["pointing"])
    assert histograms(levels_of(np.ones(lesion.shape)), lesion, ALL)[1, -1] == lesion.sum()


def test_pointing_uses_the_maximum_of_the_pixels_that_count():
    near = np.zeros((4, 4), bool)
    near[1, 2] = True
    heat = np.zeros((4, 4))
    heat[1, 2] = 0.3
    counted = np.ones((4, 4), bool)
    assert pointing(heat, near, counted) == 1
    heat[0, 0] = 0.4
    assert pointing(heat, near, counted) == 0
    counted[0, 0] = False
    assert pointing(heat, near, counted) == 1


def test_pictures_without_lesions_do_not_count():
    collected = Localization()
    collected.add({"cam": np.ones((8, 8))}, {"spot": np.zeros((8, 8), bool)}, "a")
    assert collected.summary({}, draws=10, seed=0) is None and collected.thresholds() == {"maps": {}, "lesions": {}}


def test_each_lesion_counts_on_its_pictures_against_all_other_pixels_but_the_disc():
    rng = np.random.default_rng(5)
    collected, seen = Localization(), []
    for i in range(6):
        masks = {"dots": square(rng, 2), "spots": square(rng) if i % 2 else np.zeros((SIZE, SIZE), bool)}
        disc = square(rng, 8)
        heat = (np.clip(rng.random((SIZE, SIZE)) * 0.6 + 0.3 * masks["dots"], 0, 1) * LEVELS).astype(int) / LEVELS
        collected.add({"cam": heat}, masks, f"p{i}", disc)
        union = masks["dots"] | masks["spots"]
        seen.append((heat, masks, union, ~disc | union))
    result = collected.summary(collected.thresholds(), draws=0, seed=0)
    assert result["optic_disc"] == {"excluded": 6} and list(result["lesions"]) == ["dots", "spots"]
    for kind in ("dots", "spots"):
        own = [(heat[counted], masks[kind][counted]) for heat, masks, _, counted in seen if masks[kind].any()]
        heat, lesion = (np.concatenate(parts) for parts in zip(*own))
        part = result["lesions"][kind]
        assert part["pictures"] == len(own) == {"dots": 6, "spots": 3}[kind]
        assert part["maps"]["cam"]["aupr"]["value"] == pytest.approx(average_precision_score(lesion, heat), abs=1e-12)
        iou = part["maps"]["cam"]["iou"]
        assert iou["value"] == pytest.approx(jaccard_score(lesion, heat >= iou["threshold"]), abs=1e-12)
        assert part["floor"]["aupr"] == pytest.approx(lesion.mean())
    heat, lesion = (np.concatenate(parts) for parts in zip(*((h[c], u[c]) for h, _, u, c in seen)))
    cam = result["maps"]["cam"]
    assert cam["aupr"]["value"] == pytest.approx(average_precision_score(lesion, heat), abs=1e-12)
    each = [part["maps"]["cam"]["aupr"]["value"] for part in result["lesions"].values()]
    assert cam["lesion_aupr"]["value"] == pytest.approx(np.mean(each))


def test_a_map_that_is_hot_on_the_disc_alone_is_as_a_cold_one():
    _, lesion = heat_and_lesion()
    disc = np.zeros((SIZE, SIZE), bool)
    disc[:10, :10] = True
    disc &= ~lesion
    scores = []
    for heat in (disc.astype(float), np.zeros((SIZE, SIZE))):
        collected = Localization()
        collected.add({"cam": heat}, {"spot": lesion}, "a", disc)
        scores.append(collected.summary({}, draws=0, seed=0)["maps"]["cam"])
    assert scores[0] == scores[1]


def test_intervals_go_without_the_draws_in_which_a_lesion_is_missing():
    collected = Localization()
    rng = np.random.default_rng(0)
    for i in range(4):
        heat, lesion = heat_and_lesion(i)
        masks = {"spots": lesion, "rare": square(rng, 2) if i == 0 else np.zeros((SIZE, SIZE), bool)}
        collected.add({"cam": heat}, masks, f"p{i}")
    rare = collected.summary({}, draws=200, seed=0)["lesions"]["rare"]
    aupr = rare["maps"]["cam"]["aupr"]
    assert rare["pictures"] == 1 and aupr["low"] == pytest.approx(aupr["value"]) == pytest.approx(aupr["high"])
    assert "iou" not in rare["maps"]["cam"]  # no threshold was given
