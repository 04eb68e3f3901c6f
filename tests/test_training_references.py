"""The references of heat maps: contrasts that learn nothing, and the supervised ceiling."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ercn.data.normalization import graham
from ercn.data.phantom import render_phantom
from ercn.training.filters import FILTERS, contrasts, field
from ercn.training.localization import average_precision, histograms, levels_of, precision_recall


def fundus(size, radius=0.97, level=(150, 90, 40)):
    """An even round field on black with a soft edge, uint8 [S, S, 3], and the distance from its center, half width 1."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    distance = np.hypot(x, y)
    light = np.clip((radius - distance) * size / 2 + 0.5, 0, 1)
    return np.round(light[..., None] * np.array(level)).astype(np.uint8), distance


def dotted(picture, change, at=(0.4, 0.6), radius=0.015):
    """The picture with a round dot of another light, and the dot's mask."""
    y, x = (np.mgrid[: len(picture), : len(picture)] + 0.5) / len(picture)
    dot = np.hypot(y - at[0], x - at[1]) < radius
    return np.where(dot[..., None], picture.astype(int) + change, picture).astype(np.uint8), dot


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [97, 160, 257])
def test_a_filter_finds_its_dot_and_nothing_in_an_even_field_or_at_its_edge(name, size):
    picture, _ = fundus(size)
    assert FILTERS[name](picture).max() < 1e-5
    assert FILTERS[name](np.full((size, size, 3), 90, np.uint8)).max() < 1e-5
    signs = {"dark": (-40,), "black": (-40,), "bright": (40,), "white": (40,)}.get(name.split("_")[0], (-40, 40))
    for change in (-40, 40):
        heat = FILTERS[name](dotted(picture, change)[0])
        dot = dotted(picture, change)[1]
        if change in signs:
            near = ndimage.binary_dilation(dot, iterations=round(0.02 * size))
            assert heat[dot].max() > 0.05 and near[np.unravel_index(heat.argmax(), heat.shape)]
        else:
            assert heat[dot].max() == 0
        assert heat.dtype == np.float32 and heat.shape == (size, size) and 0 <= heat.min() and heat.max() <= 1


def test_maps_have_one_scale_in_all_pictures():
    """A dot is as hot beside a stronger one as alone, and at another size nearly as hot."""
    picture, _ = fundus(257)
    one, dot = dotted(picture, -30)
    two, _ = dotted(one, 100, at=(0.6, 0.3))
    alone, beside, small = contrasts(one), contrasts(two), contrasts(dotted(fundus(161)[0], -30)[0])
    for name in FILTERS:
        assert np.array_equal(alone[name], FILTERS[name](one))
        assert beside[name][dot].max() == pytest.approx(alone[name][dot].max(), abs=1e-5)
        assert small[name].max() == pytest.approx(alone[name].max(), rel=0.35, abs=1e-5)
    assert alone["dark_33"][dot].max() == pytest.approx(2 * 30 / 255, rel=0.2)  # 2 |x - mean|


def test_the_field_is_found_whatever_its_light():
    """A vignette, a cut field, a black lesion, Graham's gray border, and no border at all."""
    picture, distance = fundus(257)
    ring = 2 * 4 / 256
    inside = distance < 0.97 - ring - 0.02
    for seen in (picture, (picture * (1 - 0.8 * distance.clip(0, 1)[..., None] ** 2)).astype(np.uint8)):
        assert field(seen)[inside].all() and not field(seen)[distance > 0.965].any()
    cut, spotted = picture.copy(), dotted(picture, -picture.astype(int), at=(0.5, 0.88), radius=0.05)[0]
    cut[:30] = cut[-30:] = 0
    assert not field(cut)[:30].any() and field(cut)[40:-40][inside[40:-40]].all()
    assert field(spotted)[distance < 0.9].all()
    tissue = np.random.default_rng(0).integers(90, 130, (257, 257, 3)).astype(np.uint8)
    assert field(tissue).all()
    rendered, _ = render_phantom(3, "left", 4, 257, 0)
    gray = np.asarray(graham(Image.fromarray(rendered)))
    assert not field(gray)[distance > 0.91].any() and field(gray)[distance < 0.8].all()


def test_a_filter_takes_pictures_only():
    with pytest.raises(ValueError, match=r"uint8 \[S, S, 3\]; got float32 \[3, 64, 64\]"):
        FILTERS["box_17"](np.zeros((3, 64, 64), np.float32))
