"""Maps of several views: the same where the network is equivariant, and in place where a view is mirrored."""

from dataclasses import replace

import pytest
import torch
from _stubs import Tents

from ercn.config import EvaluateConfig, ModelConfig, PredictConfig
from ercn.elements import GEOMETRY, exact_side, resize
from ercn.models import ERCN, ERCNOutput
from ercn.training.infer import ONE_VIEW, Views, forward, see
from ercn.training.maps import NAMES, enlarge, heat_maps, merge

CONFIG = ModelConfig(confidence="relative", evidence="separate")
VIEWS = Views((1.0, 0.5, 2.0), True)
SIDES = {True: 97, False: 96}  # of pictures whose map is exact at a stride of 8, by whether corners are aligned
both_alignments = pytest.mark.parametrize("align_corners", [True, False])


def green(side, left=0, top=0, width=0, height=0):
    """A picture with a green spot that is symmetric about nothing."""
    image = torch.zeros(1, 3, side, side)
    image[:, 1, top : top + height, left : left + width] = 1
    image[:, 1, top : top + height // 3, left : left + width // 2] = 0.4
    return image


def centroid(heat):
    """(x, y) of [h, w] in its own elements."""
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


@pytest.mark.parametrize("changes", [{}, {"refine_stride": 4, "evidence": "classwise"}], ids=str)
@pytest.mark.parametrize("side", [97, 96])
def test_of_an_equivariant_network_mirrored_views_change_nothing(side, changes):
    model, image = symmetric(**changes), torch.rand(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        one, two = see(model, image, ONE_VIEW), see(model, image, Views((1.0,), True))
    before, after = (heat_maps(x, model.config, model.align_corners) for x in (one, two))
    assert list(before) == list(NAMES) == list(after)
    for name, heat in after.items():
        torch.testing.assert_close(heat, before[name], msg=name, rtol=0, atol=1e-5)


def test_maps_of_geometry_1_were_not_in_their_place():
    """What the test above would have seen: as timm has it, the network moves the mirrored map by nearly an element."""
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
    """A mirrored view and one of another grid, of one ramp: their mean is the ramp on the larger grid."""

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
    without = heat_maps(one, CONFIG, align_corners)
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
    """Absolutely it is the refined CAM itself; relatively its channels' shares of their maxima, times probabilities."""
    generator = torch.Generator().manual_seed(0)
    refined = 0.4 * torch.rand(2, 5, 6, 6, generator=generator)
    logits = torch.randn(2, 4, generator=generator)
    output = ERCNOutput(logits, logits, None, torch.randn(2, 4, 6, 6, generator=generator), refined, refined, None)
    heat = heat_maps(output, replace(CONFIG, confidence=confidence), True)["refined_cam"]
    foreground = refined[:, 1:]
    if confidence == "relative":
        foreground = logits.sigmoid()[:, :, None, None] * foreground / (foreground.amax((2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(heat, foreground.amax(1))


@pytest.mark.parametrize("config", [EvaluateConfig, PredictConfig])
def test_the_picture_itself_is_always_a_view(config):
    with pytest.raises(ValueError, match=r"scales must have 1, .* got \(0.5, 2.0\)"):
        config(scales=(0.5, 2.0))
    with pytest.raises(ValueError, match="scales must be above 0"):
        config(scales=(1.0, 0.0))
