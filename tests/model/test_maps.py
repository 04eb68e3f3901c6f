"""Maps of several views: an equivariant network gives the same map, and mirrored views are put back in place."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _stubs import Tents

from ercn.config import EvaluateConfig, ModelConfig, PredictConfig
from ercn.elements import GEOMETRY, exact_side, resize
from ercn.evaluation.infer import ONE_VIEW, Views, forward, see
from ercn.losses import add_background
from ercn.maps import NAMES, ceiling_of, enlarge, extent, flat, heat_maps, merge
from ercn.models import ERCN, ERCNOutput

CONFIG = ModelConfig(confidence="relative", evidence="separate")
VIEWS = Views((1.0, 0.5, 2.0), True)
SIDES = {True: 97, False: 96}  # sides of pictures whose maps are exact at a stride of 8, by align_corners
both_alignments = pytest.mark.parametrize("align_corners", [True, False])


def green(side, left=0, top=0, width=0, height=0):
    """A picture with a green spot, without any symmetry."""
    image = torch.zeros(1, 3, side, side)
    image[:, 1, top : top + height, left : left + width] = 1
    image[:, 1, top : top + height // 3, left : left + width // 2] = 0.4
    return image


def centroid(heat):
    """Centroid (x, y) of a map [h, w], in elements."""
    share = heat.double() / heat.sum()
    return tuple(float(torch.arange(len(one), dtype=torch.float64) @ one) for one in (share.sum(0), share.sum(1)))


def symmetric(seed=0, geometry=GEOMETRY, **changes):
    """A real network whose kernels are mirror-symmetric, in float64."""
    torch.manual_seed(seed)
    small = ModelConfig(backbone="resnet10t", output_stride=16, embed_dim=8, pool_dim=8)
    model = ERCN(replace(small, **changes), geometry=geometry).double().eval()
    for parameter in model.backbone.parameters():
        if parameter.ndim == 4:
            parameter.data = (parameter.data + parameter.data.flip(3)) / 2
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"refinement": ("affinity",), "refine_stride": 4, "evidence": "classwise"}], ids=str
)
@pytest.mark.parametrize("side", [97, 96])
def test_of_an_equivariant_network_mirrored_views_change_nothing(side, changes):
    model, image = symmetric(**changes), torch.rand(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        one, two = see(model, image, ONE_VIEW), see(model, image, Views((1.0,), True))
    before, after = (heat_maps(x, model.config, model.align_corners) for x in (one, two))
    assert list(before) == list(NAMES) == list(after)
    for name, heat in after.items():
        torch.testing.assert_close(heat, before[name], msg=name, rtol=0, atol=1e-5)


@pytest.mark.parametrize("refinement", [("pamr",), ("affinity", "pamr")])
def test_of_several_views_pamr_refines_what_they_merged(refinement):
    model, image = symmetric(refinement=refinement), torch.rand(2, 3, 96, 96, dtype=torch.float64)
    views = Views((1.0, 1.5), True)
    with torch.no_grad():
        ours = see(model, image, views)
        coarse = [name for name in refinement if name != "pamr"]
        model.config = replace(model.config, refinement=coarse)
        merged = see(model, image, views).refined_cam
    assert ours.refined_cam.shape == (2, 5, 97, 97) and merged.shape == (2, 5, 10, 10)
    torch.testing.assert_close(ours.refined_cam, model.refine_to_edges(merged, image), rtol=0, atol=0)


def test_maps_of_geometry_1_were_not_in_their_place():
    """Without the correction, timm's network moves the mirrored map by nearly an element."""
    model, image = symmetric(geometry=1), torch.rand(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        one, two = see(model, image, ONE_VIEW), see(model, image, Views((1.0,), True))
    before, after = (heat_maps(x, model.config, model.align_corners) for x in (one, two))
    assert (before["cam"] - after["cam"]).abs().max() > 0.1


@both_alignments
@pytest.mark.parametrize("views", [ONE_VIEW, Views((1.0,), True), VIEWS, Views((1.0, 0.8, 1.3), True)], ids=str)
@pytest.mark.parametrize("spot", [(16, 56, 21, 17), (55, 9, 12, 25), (30, 33, 35, 28)], ids=str)
def test_views_of_any_scale_keep_the_spot_in_its_place(align_corners, views, spot):
    side = SIDES[align_corners]
    image = green(side, *spot)
    ((_, _, maps),) = forward(Tents(8, align_corners), CONFIG, [{"image": image}], torch.device("cpu"), views)
    finest = max(views.scales)
    grid = exact_side(round(finest * side), 8, align_corners) // 8 + align_corners
    for name, heat in maps.items():
        assert heat.shape == (1, grid, grid) and 0 <= heat.min() <= heat.max() <= 1
        full = enlarge(heat, side, align_corners)[0]
        assert full.shape == (side, side)
        seen = (full - full.min()).clamp_min(0)
        assert centroid(seen) == pytest.approx(centroid((image[0, 1] - 0.1).clamp_min(0)), abs=0.25), name


@both_alignments
def test_merge_puts_every_view_back(align_corners):
    """A mirrored view and a view on another grid, both of one ramp: their mean is the ramp on the larger grid."""

    def view(n, mirrored):
        place = torch.linspace(-1, 1, n) if align_corners else (2 * torch.arange(n) + 1) / n - 1
        ramp = (place[:, None] + 2 * place).expand(1, 4, n, n)
        ramp = ramp.flip(-1) if mirrored else ramp
        logits = torch.full((1, 4), float(n))
        return ERCNOutput(logits, logits, logits, ramp, ramp, ramp, ramp[:, :1])

    merged = merge([(view(n, mirrored), mirrored) for n, mirrored in ((5, False), (9, True), (7, True))], align_corners)
    expected = view(9, False)
    inside = ... if align_corners else (..., slice(1, -1), slice(1, -1))  # beyond the outer centres of cells it is flat
    for name in ("cam", "refined_cam"):
        torch.testing.assert_close(getattr(merged, name)[inside], getattr(expected, name)[inside])
    assert torch.equal(merged.logits, view(5, False).logits) and merged.attention.shape == (1, 1, 9, 9)


@both_alignments
def test_enlarge(align_corners):
    """Corners stay on the corner pixels, or cells cover their pixels."""
    heat = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    row = enlarge(heat, 8, align_corners)[0, 3]
    expected = torch.linspace(0, 1, 8) if align_corners else ((torch.arange(8) + 0.5) / 4 - 0.5).clamp(0, 1)
    torch.testing.assert_close(row, expected)


@both_alignments
@pytest.mark.parametrize("stride, n", [(8, 5), (5, 7)])
def test_the_ceiling_of_a_stride(align_corners, stride, n):
    """An element's share of a mask by a triangle that ends at its neighbours' places, drawn by interpolation."""
    place = stride * np.arange(n) if align_corners else stride * (np.arange(n) + 0.5) - 0.5
    side = stride * (n - 1) + 1 if align_corners else stride * n
    pixel = np.arange(side)
    weight = np.maximum(1 - np.abs(place[:, None] - pixel) / stride, 0)
    weight /= weight.sum(1, keepdims=True)
    draw = np.stack([np.interp(pixel, place, one) for one in np.eye(n)])  # [n, side]
    mask = np.random.default_rng(0).random((side, side)) < 0.2
    found = ceiling_of(mask, (n, n), align_corners)
    assert found.shape == mask.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, draw.T @ (weight @ mask @ weight.T) @ draw, atol=1e-6)
    assert not ceiling_of(np.zeros_like(mask), (n, n), align_corners).any()
    np.testing.assert_allclose(ceiling_of(np.ones_like(mask), (n, n), align_corners), 1, atol=1e-6)


@both_alignments
def test_the_ceiling_of_a_lesion_of_one_element(align_corners):
    """The element has all of the mask but the corners of its triangle, which its eight neighbours have."""
    side = 33 if align_corners else 40
    mask = np.zeros((side, side), bool)
    if align_corners:
        mask[13:20, 5:12] = True  # 7 pixels a side about element (2, 1)
    else:
        mask[16:24, 16:24] = True  # the cell of element (2, 2)
    found = ceiling_of(mask, (5, 5), align_corners)
    own, beside = (0.6875, 0.09375) if align_corners else (0.75, 0.125)  # sums of 1 - |d| / 8, over 8
    if align_corners:
        assert found[16, 8] == found.max() == pytest.approx(own**2)
        assert found[8, 8] == found[16, 16] == pytest.approx(own * beside)
        assert found[8, 16] == pytest.approx(beside**2) and found[0].max() == 0 == found[:, 24:].max()
    else:
        assert found.max() == pytest.approx(((15 * own + beside) / 16) ** 2)  # between pixels, 1/16 to the neighbours
    seen = np.argwhere(found > found.max() - 1e-5).mean(0)
    assert seen == pytest.approx(np.argwhere(mask).mean(0))


FLAT = {"relu": ("nowhere", "constant", "low"), "softplus": ("constant", "low")}
FLAT |= {"gem": FLAT["softplus"], "lse": FLAT["relu"], "topk": FLAT["relu"], "linear": FLAT["relu"]}


@pytest.mark.parametrize("cam_pool", FLAT)
def test_flat(cam_pool):
    """A softplus leaves evidence in a negative CAM; one spot in one channel is a peak, a slope is none."""
    slope = torch.linspace(0, 1, 36).view(6, 6)
    spot = torch.zeros(6, 6)
    spot[2, 3] = 1
    channels = {
        "nowhere": -3 + 2 * slope,
        "constant": torch.full((6, 6), 0.7),
        "low": torch.full((6, 6), -60.0),
        "spot": spot * 4 - 2,
        "gentle": 5 + slope,
    }
    cam = torch.stack([torch.stack([channel] * 4) for channel in channels.values()])
    found = flat(cam, replace(CONFIG, cam_pool=cam_pool))
    assert found.dtype == torch.bool and found.shape == (len(channels),)
    expected = {*FLAT[cam_pool], "gentle"}
    assert {name for name, is_flat in zip(channels, found.tolist()) if is_flat} == expected
    cam[1, 2] = channels["spot"]
    assert flat(cam, replace(CONFIG, cam_pool=cam_pool)).tolist()[1:] == [False, True, False, True]
    assert flat(cam.half(), replace(CONFIG, cam_pool=cam_pool)).tolist()[1:] == [False, True, False, True]


def test_extent():
    cam = torch.full((4, 2, 6, 6), -1.0)
    cam[1], cam[2, 1, 2, 3], cam[3, 0, :2] = 0.5, 4.0, 3.0
    cam[2, 0, :3], cam[3, 1, 2:5] = 1.9, 1.6  # of two channels the largest is the measure
    found = extent(cam.half(), replace(CONFIG, cam_pool="lse"))
    torch.testing.assert_close(found, torch.tensor([0, 1, 1 / 36, 5 / 6]))


def test_flat_begins_at_a_tenth():
    for low, is_flat in ((0.88, False), (0.92, True)):
        cam = torch.full((1, 1, 10, 10), low)
        cam[..., 0, 0] = 1  # the mean is low + (1 - low) / 100
        assert flat(cam, replace(CONFIG, cam_pool="relu")).item() is is_flat


@pytest.mark.parametrize("cam_pool", ["relu", "gem"])
@pytest.mark.parametrize("evidence", ["shared", "classwise", "additive", "separate"])
def test_the_evidence_map(evidence, cam_pool):
    """Attention times the activation of the CAM; the CAM of the additive form already has the attention."""
    generator = torch.Generator().manual_seed(0)
    cam = torch.randn(2, 4, 6, 7, generator=generator)
    scores = torch.randn(2, 4 if evidence == "classwise" else 1, 6, 7, generator=generator)
    logits = torch.randn(2, 4, generator=generator)
    output = ERCNOutput(logits, logits, logits, cam, torch.rand(2, 5, 6, 7, generator=generator), cam[:, :1], scores)
    maps = heat_maps(output, replace(CONFIG, evidence=evidence, cam_pool=cam_pool), True)
    if evidence == "separate":
        assert "evidence" not in maps
        return
    act = torch.log1p(cam.exp()) if cam_pool == "gem" else cam.clamp_min(0)
    if evidence != "additive":
        act = act * scores.exp() / scores.exp().sum((2, 3), keepdim=True)
    expected = logits.sigmoid()[:, :, None, None] * act / act.amax((2, 3), keepdim=True)
    torch.testing.assert_close(maps["evidence"], expected.amax(1), rtol=2e-3, atol=0)  # EPS in the denominator
    assert torch.equal(maps["evidence"], maps["cam"]) == (evidence == "additive")


def test_the_grades_are_those_of_the_picture_as_it_is():
    model, image = symmetric(), torch.rand(2, 3, 97, 97, dtype=torch.float64)
    with torch.no_grad():
        one, several = see(model, image, ONE_VIEW), see(model, image, VIEWS)
    torch.testing.assert_close(several.logits, one.logits, rtol=0, atol=0)
    assert not torch.equal(several.cam.mean(), one.cam.mean())


@both_alignments
def test_the_mean_map_is_the_mean_of_the_maps_that_there_are(align_corners):
    side = SIDES[align_corners]
    output = see(Tents(8, align_corners), torch.rand(2, 3, side, side), ONE_VIEW)
    maps = heat_maps(output, CONFIG, align_corners)
    torch.testing.assert_close(maps["mean"], (maps["cam"] + maps["refined_cam"] + maps["attention"]) / 3)
    one = merge([(output._replace(attention=None), False)], align_corners)
    without = heat_maps(one, replace(CONFIG, pool="none"), align_corners)
    assert list(without) == ["cam", "refined_cam", "mean"]
    torch.testing.assert_close(without["mean"], (without["cam"] + without["refined_cam"]) / 2)
    finer = output._replace(refined_cam=resize(output.refined_cam, (side, side), align_corners))
    maps = heat_maps(finer, CONFIG, align_corners)
    assert maps["refined_cam"].shape == maps["mean"].shape == (2, side, side)
    assert maps["cam"].shape == output.cam[:, 0].shape
    fine = [enlarge(maps[name], side, align_corners) for name in ("cam", "refined_cam", "attention")]
    torch.testing.assert_close(maps["mean"], sum(fine) / 3)


@pytest.mark.parametrize("confidence", ["absolute", "relative"])
def test_the_refined_map_is_as_hot_as_it_is_confident(confidence):
    """Each channel's share of its maximum, times its probability once, also with absolute confidence."""
    generator = torch.Generator().manual_seed(0)
    share, cam = 0.4 * torch.rand(2, 4, 6, 6, generator=generator), torch.randn(2, 4, 6, 6, generator=generator)
    logits = torch.randn(2, 4, generator=generator)
    p = logits.sigmoid()[:, :, None, None]
    refined = add_background(p * share if confidence == "absolute" else share)
    output = ERCNOutput(logits, logits, None, cam, refined, refined[:, :1], None)
    heat = heat_maps(output, replace(CONFIG, confidence=confidence, pool="none"), True)
    expected = (p * share / share.amax((2, 3), keepdim=True)).amax(1)
    torch.testing.assert_close(heat["refined_cam"], expected, rtol=1e-3, atol=0)  # EPS in the denominator


@pytest.mark.parametrize("config", [EvaluateConfig, PredictConfig])
def test_the_picture_itself_is_always_a_view(config):
    with pytest.raises(ValueError, match=r"scales must have 1, .* got \(0.5, 2.0\)"):
        config(scales=(0.5, 2.0))
    with pytest.raises(ValueError, match="scales must be above 0"):
        config(scales=(1.0, 0.0))
