import hashlib
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage
from skimage.data import retina

from ercn.data import render_phantom
from ercn.data.lesions import FIELD, LESIONS, plan_lesions, quadrant_of
from ercn.data.phantom import (
    _VEINS,
    _generators,
    _in_eye,
    _photograph,
    _Pose,
    phantom_grades,
    phantom_optic_disc,
)

EYES = ("left", "right")
VEINS = [_in_eye(vein) for vein in _VEINS]
OPTIC_DISC = (-0.7, -0.08, 0.17)


def plan(seed, grade):
    return plan_lesions(np.random.default_rng(seed), grade, OPTIC_DISC, VEINS)


def count_by_quadrant(lesions, kind):
    return [sum(one.kind == kind and one.quadrant == q for one in lesions) for q in range(4)]


def severe_signs(lesions):
    """The 4-2-1 rule."""
    signs = set()
    if min(count_by_quadrant(lesions, "hemorrhages")) > 20:
        signs.add("hemorrhages")
    if np.count_nonzero(count_by_quadrant(lesions, "venous_beading")) >= 2:
        signs.add("venous_beading")
    if any(count_by_quadrant(lesions, "irma")):
        signs.add("irma")
    return signs


def test_grades_follow_the_icdr_rules():
    severe, proliferative = Counter(), Counter()
    for seed in range(100):
        assert plan(seed, 0) == []
        assert {one.kind for one in plan(seed, 1)} == {"microaneurysms"}

        moderate = plan(seed, 2)
        kinds = {one.kind for one in moderate}
        assert kinds & {"hemorrhages", "hard_exudates", "soft_exudates"} and "microaneurysms" in kinds
        assert kinds <= {"microaneurysms", "hemorrhages", "hard_exudates", "soft_exudates", "venous_beading"}
        assert not severe_signs(moderate)

        signs = severe_signs(plan(seed, 3))
        assert signs and not {one.kind for one in plan(seed, 3)} & {"neovascularization", "preretinal_hemorrhage"}
        severe.update(signs)

        new = {one.kind for one in plan(seed, 4)} & {"neovascularization", "preretinal_hemorrhage"}
        assert new
        proliferative.update(new)
    # every sign of a grade occurs often, and none always
    for signs in (severe, proliferative):
        assert all(20 < count < 95 for count in signs.values()), signs


def test_lesions_lie_inside_the_field_and_in_their_quadrant():
    for seed in range(40):
        for one in plan(seed, 3) + plan(seed, 4):
            x, y = one.blobs[:, :2].mean(0)
            assert np.hypot(x, y) < FIELD and one.quadrant == quadrant_of(x, y)
            assert np.hypot(*one.blobs[:, :2].T).max() < 0.97


@pytest.mark.parametrize("size", [160, 320])
@pytest.mark.parametrize("grade", range(5))
def test_masks_say_which_lesions_are_there(grade, size):
    for patient in range(6):
        for eye in EYES:
            picture, masks = render_phantom(patient, eye, grade, size, 5)
            assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
            assert set(masks) <= set(LESIONS)
            disc = phantom_optic_disc(patient, eye, size, 5)
            y, x = (np.mgrid[:size, :size] + 0.5) * 2 / size - 1
            for mask in masks.values():
                assert mask.shape == (size, size) and mask.dtype == bool and mask.any()
                assert not (mask & disc).any() and not (mask & (np.hypot(x, y) > 0.97)).any()
            if grade < 2:
                assert set(masks) == ({"microaneurysms"} if grade else set())
            assert bool(set(masks) & {"neovascularization", "preretinal_hemorrhage"}) == (grade == 4)


def test_masks_are_where_the_picture_was_painted():
    """The same eye with and without lesions differs at its masks, and not far from them: grades leak nowhere else."""
    for patient, eye in ((0, "left"), (1, "right"), (2, "left")):
        clean, _ = render_phantom(patient, eye, 0, 256, 1)
        for grade in (1, 2, 3, 4):
            picture, masks = render_phantom(patient, eye, grade, 256, 1)
            union = np.logical_or.reduce(list(masks.values()))
            change = np.abs(picture.astype(int) - clean).max(-1)
            inside = np.logical_or.reduce([m for kind, m in masks.items() if kind != "venous_beading"])
            assert (change[inside] > 8).mean() > 0.9
            far = ndimage.binary_dilation(union, iterations=8)
            assert change[~far].max() <= 1


def test_a_microaneurysm_can_be_seen_at_160_pixels():
    for patient in range(8):
        _, masks = render_phantom(patient, "left", 1, 160, 0)
        _, number = ndimage.label(masks["microaneurysms"])
        area = masks["microaneurysms"].sum() / number
        assert 5 <= number <= 14 and 3 <= area <= 9


def test_severe_hemorrhages_can_be_counted_in_the_mask():
    """More than 20 separate spots in each quadrant, for an eye where the plan has them."""
    for patient in range(20):
        _, masks = render_phantom(patient, "left", 3, 512, 0)
        if "hemorrhages" in masks and (number := ndimage.label(masks["hemorrhages"])[1]) > 83:
            centers = ndimage.center_of_mass(
                masks["hemorrhages"], ndimage.label(masks["hemorrhages"])[0], range(1, number + 1)
            )
            quadrants = Counter(quadrant_of(x - 255.5, y - 255.5) for y, x in centers)
            assert min(quadrants.values()) > 20
            return
    raise AssertionError("no eye of 20 had the sign")


def test_masks_at_two_sizes_agree():
    for grade in (2, 3, 4):
        _, small = render_phantom(4, "right", grade, 256, 3)
        _, large = render_phantom(4, "right", grade, 768, 3)
        assert set(small) == set(large)
        for kind, mask in small.items():
            share = large[kind].reshape(256, 3, 256, 3).mean((1, 3))
            assert abs(share.mean() - mask.mean()) < 0.15 * mask.mean() + 1e-4
            assert (mask & (share > 0)).sum() > 0.95 * mask.sum()


def test_the_same_arguments_give_the_same_bytes_and_others_do_not():
    def digest(*arguments):
        picture, masks = render_phantom(*arguments)
        return hashlib.sha256(picture.tobytes() + b"".join(masks[k].tobytes() for k in sorted(masks))).hexdigest()

    arguments = [
        (1, "left", 2, 96, 0),
        (1, "right", 2, 96, 0),
        (2, "left", 2, 96, 0),
        (1, "left", 3, 96, 0),
        (1, "left", 2, 96, 1),
    ]
    assert len({digest(*one) for one in arguments}) == len(arguments)
    for one in arguments:
        assert digest(*one) == digest(*one)


def test_the_photograph_is_scikit_images():
    np.testing.assert_allclose(_photograph(1411).transpose(1, 2, 0) * 255, retina(), atol=0.01)


@pytest.mark.parametrize("eye", EYES)
def test_the_optic_disc_is_bright_and_on_its_side(eye):
    sides = []
    for patient in range(10):
        picture, _ = render_phantom(patient, eye, 0, 160, 0)
        disc = phantom_optic_disc(patient, eye, 160, 0)
        sides.append(ndimage.center_of_mass(disc)[1] < 80)
        ring = ndimage.binary_dilation(disc, iterations=12) & ~ndimage.binary_dilation(disc, iterations=4)
        assert picture[disc][:, 1].mean() > 1.2 * picture[ring & (picture.max(-1) > 40)][:, 1].mean()
    assert all(sides) if eye == "left" else not any(sides)


def test_pose_and_its_inverse():
    for patient in range(20):
        for eye in EYES:
            shared, view, _ = _generators(patient, eye, 0)
            pose = _Pose.draw(shared, view, eye)
            points = np.random.default_rng(patient).uniform(-0.6, 0.6, (50, 2))
            there = pose.to_picture(points)
            np.testing.assert_allclose(np.stack(pose.to_eye(there[:, 0], there[:, 1]), 1), points, atol=1e-9)
            a = np.linspace(0, 2 * np.pi, 100)
            assert np.hypot(*pose.to_eye(0.97 * np.cos(a), 0.97 * np.sin(a))).max() < 0.99  # no border inside the field


def test_a_sets_grades():
    grades = phantom_grades(200, 0)
    assert grades == phantom_grades(200, 0) != phantom_grades(200, 1)
    worse = Counter(max(pair) for pair in grades)
    assert abs(worse[0] - 80) <= 2 and all(abs(worse[g] - 30) <= 2 for g in range(1, 5))
    assert all(abs(a - b) <= 1 for a, b in grades)
    assert 20 <= sum(a != b for a, b in grades) <= 60
    assert sum(a > b for a, b in grades) > 5 and sum(a < b for a, b in grades) > 5
    for patients in range(5, 40):
        assert len(phantom_grades(patients, 0)) == patients
        assert {max(pair) for pair in phantom_grades(patients, 0)} == set(range(5))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="grade must be 0, 1, 2, 3 or 4; got 5"):
        render_phantom(0, "left", 5, 64, 0)
    with pytest.raises(ValueError, match="eye must be 'left' or 'right'; got 'both'"):
        render_phantom(0, "both", 0, 64, 0)
    with pytest.raises(ValueError, match="size must be at least 32 pixels; got 8"):
        render_phantom(0, "left", 0, 8, 0)
    with pytest.raises(ValueError, match="at least 5 patients.*patients=4"):
        phantom_grades(4, 0)
