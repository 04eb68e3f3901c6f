"""Places of map elements: gradients of real networks, turned pictures, and resizing that moves nothing."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ercn import models
from ercn.config import ModelConfig
from ercn.elements import BinomialPool, CentredConv2d, aligned_corners, centre, exact_side, resize, symmetrize
from ercn.models import ERCN, create_backbone, stages

TOLERANCE = 0.15  # of an element


def pictures_of(stride, n, align_corners):
    """The exact side of a map of n elements, and one pixel less, which is resized to it."""
    side = stride * (n - 1) + 1 if align_corners else stride * n
    assert exact_side(side, stride, align_corners) == exact_side(side - 1, stride, align_corners) == side
    return side, side - 1


def offsets(backbone, side, n, places, *, draws, power):
    """Distances of the centroids of |gradient|^power from the elements' places, in elements: [places, 2]."""
    stride, corners = backbone.feature_info.reduction()[-1], backbone.align_corners
    exact = exact_side(side, stride, corners)
    image = torch.rand(draws, 3, side, side, requires_grad=True)
    last = stages(backbone, resize(image, (exact, exact), corners))[-1]
    assert last.shape[2:] == (n, n)
    pixels, found = torch.arange(side, dtype=torch.float64), []
    for row, column in places:
        cotangent = torch.randn(draws, last.shape[1]) if power == 2 else torch.rand(draws, last.shape[1])
        seen = (last[:, :, row, column] * cotangent).sum()
        (gradient,) = torch.autograd.grad(seen, image, retain_graph=True)
        density = gradient.double().abs().pow(power).sum(1)
        density = (density / density.sum((1, 2), keepdim=True)).mean(0)
        centroid = torch.stack([density.sum(1) @ pixels, density.sum(0) @ pixels])
        place = torch.tensor([row, column], dtype=torch.float64)
        place = place * (side - 1) / (n - 1) if corners else (place + 0.5) * side / n - 0.5
        found.append((centroid - place) / (side / n))
    return torch.stack(found)


def frozen(name, stride, kwargs=None):
    torch.manual_seed(0)
    return create_backbone(name, stride, kwargs=kwargs).eval().requires_grad_(False)


SWIN = {"img_size": 160, "embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
VIT = {"img_size": 80, "embed_dim": 32, "depth": 4, "num_heads": 2}
MAXVIT = {"img_size": 160, "embed_dim": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "stem_width": 16}


@pytest.mark.parametrize(
    "name, stride, n, draws, kwargs",
    [
        ("swin_tiny_patch4_window7_224", 32, 5, 4, SWIN),
        ("vit_tiny_patch16_224", 16, 5, 8, VIT),
        ("maxvit_rmlp_pico_rw_256", 32, 5, 16, MAXVIT),
        ("test_resnet", 8, 13, 16, {}),
        ("test_resnet", 16, 9, 8, {}),
        ("test_resnet", 32, 5, 8, {}),
        ("resnet10t", 8, 11, 8, {}),
        ("resnet10t", 16, 7, 8, {}),
        ("resnet18", 32, 5, 2, {}),
        ("regnety_002", 8, 7, 2, {}),
        ("regnety_002", 32, 5, 2, {}),
        ("convnext_atto", 32, 5, 4, {}),
    ],
)
def test_gradients_of_a_new_network_are_centred_on_the_element(name, stride, n, draws, kwargs):
    backbone = frozen(name, stride, kwargs)
    for side in pictures_of(stride, n, backbone.align_corners):
        places = [(n // 2, n // 2), (n // 2 - 1, n // 2 + 1)]
        assert offsets(backbone, side, n, places, draws=draws, power=2).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "name, stride, n, draws",
    [
        ("test_resnet", 8, 19, 16),
        ("test_resnet", 32, 9, 4),
        ("resnet10t", 16, 11, 4),
        ("regnety_002", 16, 15, 1),
        ("convnext_atto", 32, 7, 4),
    ],
)
def test_no_branch_of_a_network_moves_the_element(name, stride, n, draws):
    """Residual branches, 0 in a new network, get a share; kernels are random but positive, so that the contributions to
    an element add up, and their fourth power, of half the width, ends inside of the picture."""
    backbone = frozen(name, stride)
    for key, parameter in backbone.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.abs() / parameter.abs().flatten(1).sum(1).view(-1, *[1] * (parameter.ndim - 1))
        elif "bias" not in key:
            parameter.data = 0.5 + torch.rand_like(parameter)
    for side in pictures_of(stride, n, backbone.align_corners):
        places = [(n // 2, n // 2), (n // 2 - 1, n // 2 + 1)]
        assert offsets(backbone, side, n, places, draws=draws, power=4).abs().max() < TOLERANCE


def symmetric_model(config):
    """Symmetric kernels, so that only the geometry can break a symmetry; norms fit the features."""
    torch.manual_seed(0)
    model = ERCN(config)
    for key, parameter in model.named_parameters():
        if key.startswith("backbone.") and parameter.ndim == 4:
            kernel = parameter.data
            kernel = kernel + kernel.flip(2)
            kernel = kernel + kernel.flip(3)
            parameter.data = kernel + kernel.transpose(2, 3)
        elif "bias" not in key and parameter.ndim < 2:  # norms, and gains of branches
            parameter.data = 0.5 + torch.rand_like(parameter)
        elif key.startswith("pool."):
            parameter.data *= 3
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for layer in norms:
        layer.momentum = None
    with torch.no_grad():
        side = 3 * config.patch or 97
        model.double().train()(torch.randn(2, 3, side, side, dtype=torch.float64))
    return model.eval()


def assert_turns_with_the_picture(model, side):
    """Mirrored and turned by 90 degrees, the maps are the picture's own, to 1e-5 of their range, in float64."""
    image = torch.randn(1, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        one = model(image)
        for move in (lambda x: x.flip(3), lambda x: x.rot90(1, (2, 3))):
            other = model(move(image))
            for name in ("cam", "refined_cam", "attention"):
                before, after = getattr(one, name), getattr(other, name)
                spread = before.amax() - before.amin()
                assert spread > 1e-6, name
                error = (move(before) - after).abs().max() / spread
                assert error < 1e-5, (name, float(error))


@pytest.mark.parametrize(
    "name, stride",
    [(name, stride) for name in ("test_resnet", "resnet10t", "mobilenetv3_large_100") for stride in (8, 16, 32)]
    + [("test_nfnet", 8), ("test_nfnet", 32), ("resnet18", 8), ("resnet18", 32), ("resnet50", 16)]
    + [("regnety_002", 8), ("regnety_002", 32), ("efficientnet_b0", 16), ("tf_efficientnet_b0", 8)]
    + [("tf_efficientnet_b0", 32), ("convnext_atto", 32)],
)
def test_turned_pictures_have_turned_maps(name, stride):
    model = symmetric_model(ModelConfig(backbone=name, output_stride=stride, embed_dim=8, pool_dim=16, mask="off"))
    for side in (97, 96) if stride == 32 else (65, 64):
        assert_turns_with_the_picture(model, side)


@pytest.mark.parametrize("patch, stride", [(32, 8), (32, 32), (48, 16)])
def test_turned_pictures_have_turned_patches(patch, stride):
    config = ModelConfig(
        backbone="test_resnet", output_stride=stride, patch=patch, embed_dim=8, pool_dim=16, mask="off", refinement=()
    )
    assert_turns_with_the_picture(symmetric_model(config), 3 * patch)


@pytest.mark.parametrize("evidence", ["shared", "classwise", "additive", "separate"])
@pytest.mark.parametrize("refine_stride", [0, 4])
@pytest.mark.parametrize("name, stride", [("test_resnet", 16), ("convnext_atto", 32)])
def test_turned_pictures_have_turned_evidence_and_refinement(name, stride, refine_stride, evidence):
    config = ModelConfig(backbone=name, output_stride=stride, embed_dim=8, pool_dim=16, mask="off", evidence=evidence)
    settings = {"refine_stride": refine_stride, "refine_stages": (0, 1) if refine_stride else (-3, -2)}
    model = symmetric_model(ModelConfig(**vars(config) | settings | {"refinement": ("affinity",)}))
    for side in (65, 64):
        assert_turns_with_the_picture(model, side)


def test_the_picture_moved_by_an_element_moves_the_map():
    """Elements are a stride apart: inside, the map of a moved picture is the moved map."""
    backbone = frozen("test_resnet", 8)
    image = torch.zeros(1, 3, 321, 321)
    image[:, :, 140:180, 140:180] = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        blank, one, two = (stages(backbone, x)[-1] for x in (0 * image, image, image.roll((8, 16), (2, 3))))
    torch.testing.assert_close((two - blank)[..., 3:-3, 3:-3], (one - blank).roll((1, 2), (2, 3))[..., 3:-3, 3:-3])
    assert (one - blank).abs().amax() > 0.1


@pytest.mark.parametrize("size", [(6, 9), (1, 1), (7, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_binomial_pool(size, stride):
    """[1, 2, 1] ⊗ [1, 2, 1] / 16 of the picture with its edge repeated, at the places of a 3 × 3 convolution."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    expected = nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), "replicate"), kernel, stride=stride, groups=3)
    torch.testing.assert_close(BinomialPool(stride)(x), expected, rtol=0, atol=1e-14)
    assert expected.shape[2:] == nn.Conv2d(3, 1, 3, stride, 1, dtype=torch.float64)(x).shape[2:]
    constant = torch.full_like(x, 3.0)
    torch.testing.assert_close(BinomialPool(stride)(constant), torch.full_like(expected, 3.0), rtol=0, atol=1e-14)


def test_symmetrize_replaces_average_pools_of_two():
    import timm

    plain = timm.create_model("resnet10t", features_only=True)
    pools = [name for name, module in plain.named_modules() if isinstance(module, nn.AvgPool2d)]
    keys = list(plain.state_dict())
    assert symmetrize(plain) is plain and list(plain.state_dict()) == keys
    found = {name: module.stride for name, module in plain.named_modules() if isinstance(module, BinomialPool)}
    assert list(found) == pools and set(found.values()) == {2}
    other = nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2))
    assert [type(module) for module in symmetrize(other)] == [nn.AvgPool2d, nn.MaxPool2d]


def of_timm(name, stride, correct=lambda backbone: backbone):
    import timm

    return lambda side: correct(timm.create_model(name, features_only=True, output_stride=stride))


def test_what_is_not_symmetric_is_seen():
    assert aligned_corners(of_timm("resnet10t", 16), stages, 16) is None
    assert aligned_corners(of_timm("resnet10t", 16, symmetrize), stages, 16) is True
    assert aligned_corners(of_timm("convnext_atto", 16), stages, 16) is None
    assert aligned_corners(of_timm("convnext_atto", 32), stages, 32) is False
    with pytest.raises(ValueError, match="'convnext_atto' does not support output_stride 16; it supports 32"):
        create_backbone("convnext_atto", 16)


@pytest.mark.parametrize("geometry", [3, 4])
@pytest.mark.parametrize(
    "name, stride, kwargs, corners",
    [
        ("eca_nfnet_l0", 32, {"depths": [1, 1, 1, 1]}, True),
        ("nf_resnet26", 16, {}, True),
        ("resnetv2_50x1_bit", 32, {}, True),
        ("dm_nfnet_f0", 32, {"depths": [1, 1, 1, 1]}, True),  # pads its standardised convolutions as TensorFlow does
        ("edgenext_xx_small", 32, {}, False),
        ("edgenext_small", 32, {}, False),
    ],
)
def test_networks_of_older_exports_are_measured(name, stride, kwargs, corners, geometry):
    """Standardised weights are 0 where kernels are constant; a position code hides a picture that is nearly black."""
    with torch.device("meta"):
        assert create_backbone(name, stride, kwargs=kwargs, geometry=geometry).align_corners is corners


@pytest.mark.parametrize("geometries", [(3, 4), (4, 3)])
def test_older_exports_have_no_centred_convolutions(geometries, monkeypatch):
    """With that geometry, networks that need centred convolutions are refused, also after a later one was measured."""
    monkeypatch.setattr(models, "_ALIGNED", {})
    for geometry in geometries:
        if geometry == 4:
            backbone = create_backbone("test_convnext", 32, kwargs={"stem_type": "overlap"})
            assert sum(isinstance(module, CentredConv2d) for module in backbone.modules()) == 2
        else:
            with pytest.raises(ValueError, match="'test_convnext' does not support output_stride 32"):
                create_backbone("test_convnext", 32, kwargs={"stem_type": "overlap"}, geometry=geometry)


def test_where_elements_lie_does_not_depend_on_how_a_network_is_built(monkeypatch):
    """Plans and FLOP counts build networks without data; runs build them under other default dtypes."""
    before = torch.get_default_dtype()
    for context in (torch.no_grad, torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")):
        monkeypatch.setattr(models, "_ALIGNED", {})
        with context():
            assert create_backbone("test_resnet", 16).align_corners is True
    for dtype in (torch.bfloat16, torch.float64):
        monkeypatch.setattr(models, "_ALIGNED", {})
        torch.set_default_dtype(dtype)
        try:
            backbone = create_backbone("test_resnet", 16)
            assert backbone.align_corners is True and next(backbone.parameters()).dtype == dtype
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(before)


def test_measuring_draws_no_numbers(monkeypatch):
    monkeypatch.setattr(models, "_ALIGNED", {})
    states = []
    for _ in range(2):  # first measured, then cached
        torch.manual_seed(0)
        states.append((create_backbone("test_resnet", 16).state_dict(), torch.rand(4)))
    assert models._ALIGNED == {("test_resnet", 16, '{"output_stride": 16}', (symmetrize, centre)): (symmetrize, True)}
    (first, drawn), (second, again) = states
    assert torch.equal(drawn, again) and first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_exact_side(stride, corners):
    for side in range(1, 6 * stride):
        exact = exact_side(side, stride, corners)
        assert (exact - corners) % stride == 0 and exact >= stride + corners
        assert abs(exact - side) <= stride // 2 or side < stride
        assert exact_side(exact, stride, corners) == exact


def triangles_by_loop(n, m, corners):
    """Weights of n elements in each of m as floats, by the definition: a tent of the width of the new elements."""
    ratio = (n - 1) / max(1, m - 1) if corners else n / m
    rows = []
    for i in range(m):
        place = i * ratio if corners else (i + 0.5) * ratio - 0.5
        row = [max(0.0, 1 - abs(place - j) / max(1.0, ratio)) for j in range(n)]
        rows.append([weight / sum(row) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("size, to", [((33, 17), (9, 5)), ((32, 30), (8, 7)), ((11, 64), (17, 16)), ((5, 1), (3, 1))])
def test_antialiased_resize(size, to, corners):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = (triangles_by_loop(n, m, corners) for n, m in zip(size, to))
    small = resize(x, to, corners, antialias=True)
    torch.testing.assert_close(small, rows @ x @ columns.T, rtol=0, atol=1e-5)  # weights are float32
    torch.testing.assert_close(resize(x.flip(2, 3), to, corners, antialias=True).flip(2, 3), small, rtol=0, atol=1e-5)
    ones = resize(torch.ones_like(x), to, corners, antialias=True)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("corners", [True, False])
def test_a_ramp_keeps_its_place(corners, antialias):
    """The values are the places, in [-1, 1] between outer centres or outer edges, before and after, except where a tent
    is cut off. Tents between whole elements are sampled unevenly, which costs at most a hundredth of an element."""

    def places(n):
        return torch.linspace(-1, 1, n) if corners else (2 * torch.arange(n) + 1) / n - 1

    for n, m in ((65, 9), (60, 12), (9, 33), (20, 60), (65, 12), (64, 11)):
        ramp = places(n).expand(1, 1, n, n)
        found = resize(ramp, (m, m), corners, antialias=antialias)[0, 0, m // 2]
        edge = 1 + m // n
        whole = (n - corners) % (m - corners) == 0 or m > n
        tolerance = 1e-6 if whole or not antialias else 0.01 * 2 / m
        torch.testing.assert_close(found[edge:-edge], places(m)[edge:-edge], rtol=0, atol=tolerance)


def test_no_resize_is_no_copy():
    x = torch.rand(1, 2, 5, 7)
    assert resize(x, (5, 7), True, antialias=True) is x and resize(x, x.shape[2:], False) is x


def test_a_plain_resize_is_torchs():
    x = torch.rand(1, 2, 9, 13)
    for corners in (True, False):
        expected = nn.functional.interpolate(x, (5, 30), mode="bilinear", align_corners=corners)
        assert torch.equal(resize(x, [5, 30], corners), expected)
