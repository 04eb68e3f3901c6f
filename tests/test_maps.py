"""Maps of several views: the same where the network is equivariant, and in place where a view is mirrored."""

import pytest
import torch
import torch.nn.functional as F

from ercn.config import EvaluateConfig, ModelConfig, PredictConfig
from ercn.models import ERCNOutput
from ercn.training.infer import ONE_VIEW, Views, forward, see
from ercn.training.maps import NAMES, heat_maps, merge

CONFIG = ModelConfig()
VIEWS = Views((1.0, 0.5, 2.0), True)


class Bright(torch.nn.Module):
    """A network whose maps are the picture's first channel, pooled over 8 × 8 pixels: it commutes with flips."""

    def forward(self, image):
        cam = F.avg_pool2d(image[:, :1], 8)
        logits = cam.mean((2, 3)).expand(-1, 4)
        refined = torch.cat([1 - cam, cam.expand(-1, 4, -1, -1)], 1)
        return ERCNOutput(logits, logits, logits, cam.expand(-1, 4, -1, -1), refined, cam, 5 * cam)


def test_of_an_equivariant_network_mirrored_views_change_nothing():
    image = torch.rand(2, 3, 64, 64)
    one, two = see(Bright(), image, ONE_VIEW), see(Bright(), image, Views((1.0,), True))
    for name, heat in heat_maps(two, CONFIG).items():
        torch.testing.assert_close(heat, heat_maps(one, CONFIG)[name], msg=name)


def test_several_views_have_the_finest_grid_and_the_spot_in_its_place():
    image = torch.zeros(1, 3, 96, 96)
    image[:, :, 16:32, 56:72] = 1  # center (24, 64)
    ((_, _, maps),) = forward(Bright(), CONFIG, [{"image": image}], torch.device("cpu"), VIEWS)
    assert set(maps) == set(NAMES)
    for name, heat in maps.items():
        assert heat.shape == (1, 24, 24) and 0 <= heat.min() <= heat.max() <= 1
        excess = (heat[0] - heat.median()).clamp_min(0)
        y, x = ((torch.arange(24) + 0.5) * 4 @ excess.sum(dim) / excess.sum() for dim in (1, 0))
        assert (float(y), float(x)) == pytest.approx((24, 64), abs=0.5), name  # all views are symmetric about the spot


def test_the_grades_are_those_of_the_picture_as_it_is():
    image = torch.rand(1, 3, 64, 64)
    one, several = see(Bright(), image, ONE_VIEW), see(Bright(), image, VIEWS)
    torch.testing.assert_close(several.logits, one.logits, rtol=0, atol=0)
    assert not torch.equal(several.cam.mean(), one.cam.mean())


def test_the_mean_map_is_the_mean_of_the_maps_that_there_are():
    output = see(Bright(), torch.rand(2, 3, 64, 64), ONE_VIEW)
    maps = heat_maps(output, CONFIG)
    torch.testing.assert_close(maps["mean"], (maps["cam"] + maps["refined_cam"] + maps["attention"]) / 3)
    without = heat_maps(merge([(output._replace(attention=None), False)]), CONFIG)
    assert list(without) == ["cam", "refined_cam", "mean"]
    torch.testing.assert_close(without["mean"], (without["cam"] + without["refined_cam"]) / 2)


@pytest.mark.parametrize("config", [EvaluateConfig, PredictConfig])
def test_the_picture_itself_is_always_a_view(config):
    with pytest.raises(ValueError, match=r"scales must have 1, .* got \(0.5, 2.0\)"):
        config(scales=(0.5, 2.0))
    with pytest.raises(ValueError, match="scales must be above 0"):
        config(scales=(1.0, 0.0))
