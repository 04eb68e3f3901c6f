import hashlib
import io
import os
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ercn.data import render_phantom
from ercn.data.phantom import _anatomy, _stream, _uncompressed, phantom_grades, phantom_optic_disc
from ercn.data.phantom.anatomy import _texture
from ercn.data.phantom.difficulty import DIFFICULTIES
from ercn.data.phantom.distractors import compress, paint_distractors
from ercn.data.phantom.lesions import FIELD, LESIONS, plan_lesions, quadrant_of

EYES = ("left", "right")
STANDARD = DIFFICULTIES["standard"]


@lru_cache(maxsize=200)
def anatomy(patient, eye="left"):
    return _anatomy(patient, eye, 0)


def plan(patient, grade):
    eye = anatomy(patient)
    x, y, radius = eye.disc[:3]
    return plan_lesions(_stream(patient, "left", 0, 2), grade, (x, y, 1.1 * radius), eye.vein_paths(), STANDARD)


def union_of(masks):
    return np.logical_or.reduce(list(masks.values()))


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
    for patient in range(150):
        assert plan(patient, 0) == []
        assert {one.kind for one in plan(patient, 1)} == {"microaneurysms"}

        moderate = plan(patient, 2)
        kinds = {one.kind for one in moderate}
        assert kinds & {"hemorrhages", "hard_exudates", "soft_exudates"}
        assert kinds <= {"microaneurysms", "hemorrhages", "hard_exudates", "soft_exudates", "venous_beading"}
        assert sum(one.kind == "hemorrhages" for one in moderate) < 20 and not severe_signs(moderate)

        signs = severe_signs(plan(patient, 3))
        assert signs and not {one.kind for one in plan(patient, 3)} & {"neovascularization", "preretinal_hemorrhage"}
        severe.update(signs)

        new = {one.kind for one in plan(patient, 4)} & {"neovascularization", "preretinal_hemorrhage"}
        assert new
        proliferative.update(new)
    assert 1 <= severe.pop("hemorrhages") <= 20  # a rare sign
    for signs in (severe, proliferative):  # the other signs occur often, none always
        assert len(signs) == 2 and all(40 < count < 140 for count in signs.values()), signs


def test_counts_of_the_grades_overlap():
    """A mild eye may have more lesions than a proliferative one, and a severe eye only a few."""
    mild = [len(plan(patient, 1)) for patient in range(100)]
    assert min(mild) <= 3 and max(mild) >= 40
    for grade in (2, 3, 4):
        counts = np.array([len(plan(patient, grade)) for patient in range(100)])
        assert np.mean(counts <= 3) > 0.05 and counts.min() <= 2 and counts.max() >= 20


def test_lesions_lie_inside_the_field_and_in_their_quadrant():
    for patient in range(60):
        for one in plan(patient, 3) + plan(patient, 4):
            x, y = one.blobs[:, :2].mean(0)
            assert np.hypot(x, y) < FIELD and one.quadrant == quadrant_of(x, y)
            assert np.hypot(*one.blobs[:, :2].T).max() < FIELD


def test_beading_follows_a_vein():
    for patient in range(40):
        veins = np.concatenate(anatomy(patient).vein_paths())
        for one in plan(patient, 3):
            if one.kind == "venous_beading":
                away = np.hypot(*(one.blobs[:, None, :2] - veins).transpose(2, 0, 1)).min(1)
                assert away.max() < 0.006 and len(one.blobs) >= 17
                assert np.ptp(one.blobs[:, 2]) > 0.01


@pytest.mark.parametrize("size", [97, 256])
@pytest.mark.parametrize("grade", range(5))
def test_masks_say_which_lesions_are_there(grade, size):
    y, x = (np.mgrid[:size, :size] + 0.5) * 2 / size - 1
    for patient in range(4):
        for eye in EYES:
            picture, masks = render_phantom(patient, eye, grade, size, 5)
            assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
            assert set(masks) <= set(LESIONS)
            disc = phantom_optic_disc(patient, eye, size, 5)
            for mask in masks.values():
                assert mask.shape == (size, size) and mask.dtype == bool and mask.any()
                assert not (mask & disc).any() and not (mask & (np.hypot(x, y) > 0.97)).any()
            if grade < 2:
                assert set(masks) == ({"microaneurysms"} if grade else set())
            assert bool(set(masks) & {"neovascularization", "preretinal_hemorrhage"}) == (grade == 4)


def test_a_picture_depends_on_the_grade_only_where_its_lesions_are():
    """Before compression, the same eye with and without lesions is the same away from the masks, bit by bit."""
    for patient, eye in ((0, "left"), (1, "right"), (2, "left")):
        clean, _ = _uncompressed(patient, eye, 0, 161, 1, STANDARD)
        for grade in (1, 2, 3, 4):
            picture, masks = _uncompressed(patient, eye, grade, 161, 1, STANDARD)
            change = 255 * np.abs(picture - clean).max(-1)
            far = ~ndimage.binary_dilation(union_of(masks), iterations=8)
            assert (change[far] == 0).all() and far.mean() > 0.3
            inside = union_of({kind: mask for kind, mask in masks.items() if kind != "venous_beading"} or masks)
            assert (change[inside] > 4).mean() > 0.85


def test_a_microaneurysm_can_be_seen_at_161_pixels():
    for patient in range(8):
        _, masks = render_phantom(patient, "left", 1, 161, 0)
        labels, number = ndimage.label(masks["microaneurysms"], np.ones((3, 3)))
        assert 4 <= np.median(np.bincount(labels.ravel())[1:]) <= 16 and number <= 45


def test_severe_hemorrhages_can_be_counted_in_the_mask():
    """More than 20 separate spots in each quadrant, for an eye whose plan has them."""
    patient = next(p for p in range(400) if "hemorrhages" in severe_signs(plan(p, 3)))
    _, masks = render_phantom(patient, "left", 3, 640, 0)
    labels, number = ndimage.label(masks["hemorrhages"])
    centers = ndimage.center_of_mass(masks["hemorrhages"], labels, range(1, number + 1))
    assert min(Counter(int(quadrant_of(x - 319.5, y - 319.5)) for y, x in centers).values()) > 20


def test_masks_at_two_sizes_agree():
    for grade in (2, 3, 4):
        _, small = render_phantom(4, "right", grade, 256, 3)
        _, large = render_phantom(4, "right", grade, 768, 3)
        assert set(small) == set(large)
        for kind, mask in small.items():
            share = large[kind].reshape(256, 3, 256, 3).mean((1, 3))
            assert abs(share.mean() - mask.mean()) < 0.15 * mask.mean() + 1e-4
            assert (mask & (share > 0)).sum() > 0.95 * mask.sum()


def digest(*arguments):
    picture, masks = render_phantom(*arguments)
    return hashlib.sha256(picture.tobytes() + b"".join(masks[k].tobytes() for k in sorted(masks))).hexdigest()


def test_the_same_arguments_give_the_same_bytes_and_others_do_not():
    arguments = [
        (1, "left", 2, 96, 0),
        (1, "right", 2, 96, 0),
        (2, "left", 2, 96, 0),
        (1, "left", 3, 96, 0),
        (1, "left", 2, 96, 1),
        (1, "left", 2, 96, 0, "easy"),
        (1, "left", 2, 96, 0, "hard"),
    ]
    assert len({digest(*one) for one in arguments}) == len(arguments)
    for one in arguments:
        assert digest(*one) == digest(*one)
    assert digest(1, "left", 2, 96, 0) == digest(1, "left", 2, 96, 0, "standard")


def test_the_processor_does_not_change_the_bytes():
    """numpy's sin, exp and sums differ in the last bit between its kernels for AVX2, AVX-512 and the baseline."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    arguments = [(patient, "left", 4, 161, 2) for patient in range(6)]
    code = f"""
import hashlib
from ercn.data.phantom import render_phantom
print(*[hashlib.sha256(render_phantom(*one)[0].tobytes()).hexdigest() for one in {arguments}])
"""
    usable = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    if not usable:
        pytest.skip("numpy has one kernel for this processor")
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(usable)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = [hashlib.sha256(render_phantom(*one)[0].tobytes()).hexdigest() for one in arguments]
    assert result.stdout.split() == here


def test_anatomy_differs_between_patients_and_is_alike_in_both_eyes():
    def trunks(patient, eye):
        """Large veins with the optic disc at the origin and the fovea on the x axis, scaled to their distance."""
        one = anatomy(patient, eye)
        points = np.concatenate([one.veins[0].points.reshape(-1, 2), [one.fovea]]) - one.disc[:2]
        points = (points * [1 if eye == "left" else -1, 1] / one.zoom) @ [1, 1j]
        return points[:-1] * np.exp(-1j * np.angle(points[-1]))

    patients = range(20)
    left, right = ([trunks(patient, eye) for patient in patients] for eye in EYES)
    apart = np.array([[np.abs(a - b).mean() for b in right] for a in left])
    own, others = np.diag(apart), np.where(np.eye(20, dtype=bool), np.inf, apart).min(1)
    assert (own < 0.06).all() and (own < others).mean() > 0.9 and np.median(others) > 2 * np.median(own)
    for name in ("melanin", "tessellation"):
        assert all(getattr(anatomy(p, "left"), name) == getattr(anatomy(p, "right"), name) for p in patients)

    covers = []
    for patient in patients:
        one = anatomy(patient)
        covers.append(one.vessel_cover(128, [*one.arteries[:2], *one.veins[:2]]) > 0.5)
    assert all(0.02 < cover.mean() < 0.2 for cover in covers)
    overlaps = [(a & b).sum() / (a | b).sum() for a, b in combinations(covers, 2)]
    assert max(overlaps) < 0.2 and np.mean(overlaps) < 0.1

    discs = np.array([anatomy(patient).disc[:4] for patient in patients])
    assert (discs.std(0) > [0.05, 0.04, 0.01, 0.01]).all()


def test_healthy_eyes_have_distractors_too():
    share = []
    for patient in range(12):
        eye = anatomy(patient)
        before = eye.paint(97, STANDARD.vessels, STANDARD.texture)
        picture = before.copy()
        paint_distractors(picture, _stream(patient, "left", 0, 1), eye, STANDARD)
        share.append((np.abs(picture - before).max(-1) > 0.03).mean())
    assert min(share) > 0.002 and np.median(share) > 0.01 and np.ptp(share) > 0.01


def test_every_quadrant_has_a_vein_to_bead():
    for patient in range(60):
        for eye in EYES:
            paths = np.concatenate(anatomy(patient, eye).vein_paths())
            seen = paths[np.hypot(*paths.T) < FIELD]
            assert set(quadrant_of(*seen.T)) == {0, 1, 2, 3}


def test_the_texture_has_neither_vessels_nor_disc():
    texture = _texture(705)
    assert np.abs(texture.mean((1, 2))).max() < 0.002
    assert (0.005 < texture.std((1, 2))).all() and (texture.std((1, 2)) < 0.05).all()
    smooth = ndimage.gaussian_filter(texture[1], 2)
    assert np.percentile(smooth, 0.1) > -0.08 and np.percentile(smooth, 99.9) < 0.12


@pytest.mark.parametrize("eye", EYES)
def test_the_optic_disc_is_bright_and_on_its_side(eye):
    sides = []
    for patient in range(10):
        picture, _ = render_phantom(patient, eye, 0, 161, 0)
        disc = phantom_optic_disc(patient, eye, 161, 0)
        sides.append(ndimage.center_of_mass(disc)[1] < 80)
        ring = ndimage.binary_dilation(disc, iterations=16) & ~ndimage.binary_dilation(disc, iterations=8)
        assert picture[disc][:, 1].mean() > 1.1 * picture[ring & (picture.max(-1) > 40)][:, 1].mean()
    assert all(sides) if eye == "left" else not any(sides)


@pytest.mark.parametrize("quality", [60, 90])
def test_compression_is_that_of_jpeg(quality):
    """The error in brightness is that of Pillow's JPEG; Pillow enlarges the color channels in another way."""
    picture = np.round(255 * _uncompressed(3, "left", 2, 161, 0, STANDARD)[0])
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, format="JPEG", quality=quality)
    with Image.open(file) as known:
        known = np.asarray(known, float)
    ours = np.clip(compress(picture, quality), 0, 255)
    error, difference, lost = (
        np.sqrt(np.mean((x @ [0.299, 0.587, 0.114]) ** 2)) for x in (ours - picture, ours - known, known - picture)
    )
    assert abs(error / lost - 1) < 0.05 and difference < 0.5 * lost


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
    with pytest.raises(ValueError, match="difficulty must be one of 'easy', 'standard', 'hard'; got 'harder'"):
        render_phantom(0, "left", 0, 64, 0, "harder")
