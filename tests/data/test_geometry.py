import numpy as np
import pytest
from _pictures import FRAMES, framed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from skimage.data import retina

from ercn.data import Geometry, locate_disc
from ercn.data.phantom import render_phantom


def disc_picture(width, height, x, y, radius, *, level=150, dark=2, noise=2, notch=None):
    """A shaded disc on a dark, noisy border; ``notch``: angle of a square bump as EyePACS cameras have."""
    rng = np.random.default_rng(0)
    gx, gy = np.meshgrid(np.arange(width) + 0.5 - x, np.arange(height) + 0.5 - y)
    inside = gx**2 + gy**2 <= radius**2
    if notch is not None:
        cx, cy = 1.03 * radius * np.cos(notch), 1.03 * radius * np.sin(notch)
        inside |= (abs(gx - cx) < 0.04 * radius) & (abs(gy - cy) < 0.04 * radius)
    shade = level * (1 - 0.5 * (gx**2 + gy**2) / radius**2)
    picture = np.where(inside, np.maximum(shade, 0.45 * level), dark)[..., None] * np.array([1, 0.5, 0.3])
    return Image.fromarray(np.clip(picture + rng.normal(scale=noise, size=picture.shape), 0, 255).astype(np.uint8))


CASES = {
    "tight": ((400, 400, 200, 200, 200), {}),
    "wide": ((900, 600, 450, 300, 280), {}),
    "tall": ((500, 800, 250, 400, 240), {}),
    "off center": ((900, 600, 330, 290, 270), {}),
    "cut above and below": ((800, 480, 400, 240, 290), {}),
    "cut on one side": ((500, 600, 180, 300, 260), {}),
    "dim": ((900, 600, 450, 300, 280), {"level": 40, "dark": 3}),
    "grey border": ((900, 600, 450, 300, 280), {"dark": 20, "noise": 4}),
    "notch right": ((900, 600, 430, 300, 280), {"notch": 0.0}),
    "notch diagonal": ((900, 600, 430, 300, 280), {"notch": -0.8}),
    "large": ((2600, 1800, 1300, 900, 860), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_square_is_the_discs_bounding_square(case):
    (width, height, x, y, radius), options = CASES[case]
    found = locate_disc(disc_picture(width, height, x, y, radius, **options), 96)
    x0, x1 = max(x - radius, 0), min(x + radius, width)
    y0, y1 = max(y - radius, 0), min(y + radius, height)
    slack = 0.015 * radius + 2
    assert (found.width, found.height, found.size) == (width, height, 96)
    assert abs(found.side - max(x1 - x0, y1 - y0)) <= 2 * slack
    assert abs(found.left + found.side / 2 - (x0 + x1) / 2) <= slack
    assert abs(found.top + found.side / 2 - (y0 + y1) / 2) <= slack


def test_small_bright_things_beside_the_disc_are_ignored():
    picture = disc_picture(900, 600, 450, 300, 250)
    draw = ImageDraw.Draw(picture)
    draw.rectangle([10, 10, 90, 30], fill=(250, 250, 250))  # a label
    draw.line([0, 599, 899, 599], fill=(200, 200, 200))
    found = locate_disc(picture)
    assert abs(found.side - 500) <= 10 and abs(found.left - 200) <= 6 and abs(found.top - 50) <= 6


@pytest.mark.parametrize("name", ["black", "white", "noise in the dark", "a spot"])
def test_without_a_disc_it_is_the_whole_picture(name):
    picture = np.zeros((60, 100, 3), np.uint8)
    if name == "white":
        picture += 255
    elif name == "noise in the dark":
        picture += np.random.default_rng(0).integers(0, 12, picture.shape, np.uint8)
    elif name == "a spot":
        picture[20:26, 30:36] = 200
    assert locate_disc(Image.fromarray(picture), 32) == Geometry(100, 60, 0, -20, 100, 32)


def test_the_real_photograph_with_its_notch():
    photo = Image.fromarray(retina())
    found = locate_disc(photo)
    assert abs(found.side - 1388) <= 15 and abs(found.left - 10) <= 10 and abs(found.top - 9) <= 10


@pytest.mark.parametrize("frame", range(len(FRAMES)))
def test_a_framed_phantom_comes_back(frame):
    """Cropping finds the phantom's disc in every frame; its aperture has 97 % of the phantom's width."""
    disc, _ = render_phantom(3, "left", 2, 256, 0)
    picture = framed(disc, frame)
    found = locate_disc(picture, 256)
    _, _, left, top = (round(f * 256) for f in FRAMES[frame])
    assert abs(found.left + found.side / 2 - left - 128) <= 4 and abs(found.top + found.side / 2 - top - 128) <= 4
    assert abs(found.side - 0.97 * 256) <= 6


def test_crop_pads_with_black_and_checks_the_size():
    picture = Image.new("RGB", (10, 6), (255, 255, 255))
    cropped = np.asarray(Geometry(10, 6, 0, -2, 10, 10).crop(picture))
    assert (cropped[:2] == 0).all() and (cropped[-2:] == 0).all() and (cropped[2:-2] == 255).all()
    with pytest.raises(ValueError, match="must be 10 x 6"):
        Geometry(10, 6, 0, -2, 10, 10).crop(Image.new("RGB", (6, 10)))


squares = st.builds(
    Geometry,
    width=st.integers(20, 90),
    height=st.integers(20, 90),
    left=st.integers(-20, 15),
    top=st.integers(-20, 15),
    side=st.integers(24, 120),
    size=st.just(64),
)


def centers(geometry, n, corners=0):
    """Photograph coordinates of the centers of an [n, n] map: x [1, n], y [n, 1]."""
    places = (np.arange(n) * (corners - 1) / (n - 1) + 0.5) / corners if corners else (np.arange(n) + 0.5) / n
    steps = places * geometry.side
    return geometry.left + steps[None, :], geometry.top + steps[:, None]


@settings(deadline=None, max_examples=60)
@given(geometry=squares, n=st.integers(2, 24), corners=st.sampled_from([0, 8, 17, 64]))
def test_a_ramp_maps_back_to_its_own_coordinates(geometry, n, corners):
    """A map that holds x + 1000 y at its elements' centers gives the same at the photograph's pixel centers.

    Also with outer elements on the outer pixels of a picture of ``corners`` pixels a side, and with a finer map.
    """
    n = min(n, geometry.side, 2 * corners - 1 if corners else n)
    if corners and (n - 1) * corners > geometry.side * (corners - 1):  # finer than the photograph: antialiased
        n -= 1
    x, y = centers(geometry, n, corners)
    back = geometry.to_original(x + 1000 * y, corners)
    assert back.shape == (geometry.height, geometry.width) and back.dtype == np.float32
    px, py = np.arange(geometry.width)[None, :] + 0.5, np.arange(geometry.height)[:, None] + 0.5
    inside = (px > geometry.left) & (px < geometry.left + geometry.side)
    inside = inside & (py > geometry.top) & (py < geometry.top + geometry.side)
    # bilinear is exact between the outermost centers, constant beyond
    exact = np.clip(px, x.min(), x.max()) + 1000 * np.clip(py, y.min(), y.max())
    np.testing.assert_allclose(back[inside], exact[inside], rtol=1e-5, atol=0.05)
    assert (back[~inside] == 0).all()


def test_crop_then_map_back_is_aligned():
    """A blob at a known place of the photograph is found there again after crop, resize and map-back."""
    picture = Image.new("RGB", (300, 200))
    ImageDraw.Draw(picture).ellipse([200, 40, 220, 60], fill=(255, 255, 255))  # center (210.5, 50.5)
    geometry = Geometry(300, 200, 35, -20, 240, 64)
    back = geometry.to_original(np.asarray(geometry.crop(picture))[..., 0])
    y, x = np.mgrid[:200, :300] + 0.5
    assert abs((back * x).sum() / back.sum() - 210.5) < 0.2
    assert abs((back * y).sum() / back.sum() - 50.5) < 0.2


def test_to_original_wants_one_map():
    with pytest.raises(ValueError, match=r"\[h, w\]; got shape \(1, 4, 4\)"):
        Geometry(8, 8, 0, 0, 8, 8).to_original(np.zeros((1, 4, 4)))
