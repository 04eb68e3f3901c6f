"""The layers: published weights through their conversions, every kind of input, and frozen parameter names."""

import doctest
import math
import re
from statistics import stdev

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ercn.nn
from ercn.nn import GatedAttentionPool, PixelAdaptiveRefinement, PixelCorrelation

U = {torch.float32: 2**-24, torch.float64: 2**-53}


def seam_weights(conv4=10, conv5=12, f8_3=6, f8_4=8, f9=16, dtype=torch.float32):
    return {
        "f8_3.weight": torch.randn(f8_3, conv4, 1, 1, dtype=dtype),
        "f8_4.weight": torch.randn(f8_4, conv5, 1, 1, dtype=dtype),
        "f9.weight": torch.randn(f9, 3 + f8_3 + f8_4, 1, 1, dtype=dtype),
    }


def seam_refinement(weights, cam, conv4, conv5, image):
    """SEAM's formula in plain torch with the N×N matrix, in float64."""
    weights = {key: value.double() for key, value in weights.items()}
    b, c, h, w = cam.shape
    resized = F.interpolate(image.double(), (h, w), mode="bilinear", align_corners=True)
    low = torch.einsum("oc,bchw->bohw", weights["f8_3.weight"][..., 0, 0], conv4.double()).clamp(min=0)
    mid = torch.einsum("oc,bchw->bohw", weights["f8_4.weight"][..., 0, 0], conv5.double()).clamp(min=0)
    feat = torch.einsum("oc,bchw->bohw", weights["f9.weight"][..., 0, 0], torch.cat([resized, low, mid], 1)).flatten(2)
    feat = feat / (feat.norm(dim=1, keepdim=True) + 1e-5)
    affinity = (feat.transpose(1, 2) @ feat).clamp(min=0)
    affinity = affinity / (affinity.sum(1, keepdim=True) + 1e-5)
    return (cam.double().flatten(2) @ affinity).view(b, c, h, w)


def seam_inputs(dtype, h=9, w=7):
    cam = torch.rand(2, 4, h, w, dtype=dtype)
    features = [torch.randn(2, channels, h, w, dtype=dtype) for channels in (10, 12)]
    return cam, features, torch.randn(2, 3, 8 * h, 8 * w, dtype=dtype)


@pytest.mark.parametrize("prefix", ["", "module.", "net.seam."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixel_correlation_is_seams(dtype, prefix):
    weights = seam_weights(dtype=dtype)
    state = {prefix + key: value for key, value in weights.items()} | {"fc8.weight": torch.zeros(1)}
    layer = PixelCorrelation.from_seam(state)
    cam, features, image = seam_inputs(dtype)
    # The embedding sums 3 + 14 products of sums of 12, is normalised over 16 and correlated over 16 channels, and the
    # affinities are summed over 63 elements: fewer than 128 roundings of values of at most twice the result's size.
    expected = seam_refinement(weights, cam, *features, image)
    torch.testing.assert_close(layer(cam, features, image).double(), expected, rtol=0, atol=256 * U[dtype])


def test_pixel_correlation_gradients_are_seams():
    weights = {key: value.requires_grad_() for key, value in seam_weights(dtype=torch.float64).items()}
    layer = PixelCorrelation.from_seam({key: value.detach() for key, value in weights.items()})
    cam, features, image = seam_inputs(torch.float64)
    upstream = torch.randn_like(cam)
    expected = torch.autograd.grad(seam_refinement(weights, cam, *features, image), weights.values(), upstream)
    actual = torch.autograd.grad(layer(cam, features, image), layer.parameters(), upstream)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_pixel_correlation_resizes_to_the_grid_of_the_cam():
    layer = PixelCorrelation((4, 6), 8).double()
    cam = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    features = [torch.randn(2, c, h, w, dtype=torch.float64) for c, h, w in ((4, 20, 24), (6, 10, 12))]
    image = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    resized = [F.interpolate(x, (5, 6), mode="bilinear", align_corners=True) for x in (*features, image)]
    torch.testing.assert_close(layer(cam, features, image), layer(cam, resized[:2], resized[2]), rtol=0, atol=0)


def test_pixel_correlation_keeps_constants_and_range():
    layer = PixelCorrelation((4, 6), 8, steps=3).double()
    features = [torch.randn(2, c, 5, 6, dtype=torch.float64) for c in (4, 6)]
    image = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    constant = layer(torch.full((2, 2, 5, 6), 0.7, dtype=torch.float64), features, image)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.7), rtol=4e-5, atol=0)  # 3 steps of eps / row sum
    cam = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    out = layer(cam, features, image)
    assert (out >= cam.amin((2, 3), keepdim=True) * (1 - 4e-5)).all() and (out <= cam.amax((2, 3), keepdim=True)).all()


def test_centred_pixel_correlation_does_not_see_what_all_pixels_share():
    """With a large common part all cosines are near 1: the plain layer averages, the centred one does not notice."""
    torch.manual_seed(0)
    plain, centred = (PixelCorrelation((4,), 8, proj_channels=(8,), center=c).double() for c in (False, True))
    centred.load_state_dict(plain.state_dict())
    with torch.no_grad():  # projections stay positive, so that the ReLU passes them on
        for layer in (plain, centred):
            layer.projections[0].weight.abs_()
    cam, image = torch.rand(1, 2, 5, 6, dtype=torch.float64), torch.rand(1, 3, 5, 6, dtype=torch.float64)
    feature = torch.rand(1, 4, 5, 6, dtype=torch.float64)
    once, shifted = (centred(cam, [feature + shift], image) for shift in (0, 1000))
    torch.testing.assert_close(shifted, once, rtol=1e-9, atol=1e-9)
    mean = cam.mean((2, 3), keepdim=True)
    assert (plain(cam, [feature + 1000], image) - mean).abs().max() < 1e-3
    assert (once - mean).abs().max() > 1e-2


def test_pixel_correlation_names_and_initialisation():
    layer = PixelCorrelation((512, 1024))
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "projections.0.weight": (64, 512, 1, 1),
        "projections.1.weight": (128, 1024, 1, 1),
        "embed.weight": (192, 195, 1, 1),
    }
    assert layer.projections[1].weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.02)  # Kaiming-normal
    bound = 4 * (6 / (195 + 192)) ** 0.5  # Xavier-uniform, gain 4
    assert 0.99 * bound < layer.embed.weight.abs().max().item() <= bound


def test_pixel_correlation_without_picture_or_with_other_pyramids():
    layer = PixelCorrelation((4, 6, 8), 8, proj_channels=(2, 3, 5), image_channels=0)
    features = [torch.randn(1, c, 4, 4) for c in (4, 6, 8)]
    assert layer(torch.rand(1, 2, 4, 4), features).shape == (1, 2, 4, 4)


def test_pixel_correlation_errors():
    with pytest.raises(ValueError, match=r"proj_channels needs one entry for each of the 3 feature maps"):
        PixelCorrelation((4, 6, 8))
    with pytest.raises(ValueError, match="expected 2 feature maps; got 1"):
        PixelCorrelation((4, 6))(torch.rand(1, 2, 4, 4), [torch.rand(1, 4, 4, 4)], torch.rand(1, 3, 8, 8))
    layer, maps = PixelCorrelation((4, 6)), [torch.rand(1, 4, 4, 4), torch.rand(1, 6, 4, 4)]
    for image, got in ((None, "none"), (torch.rand(1, 1, 8, 8), r"\[1, 1, 8, 8\]")):
        with pytest.raises(ValueError, match=rf"image must be \[B, 3, H, W\] \(image_channels\); got {got}"):
            layer(torch.rand(1, 2, 4, 4), maps, image)
    with pytest.raises(ValueError, match=r"f8_3\.weight, f8_4\.weight, f9\.weight\. Keys found: f8_3\.weight, other"):
        PixelCorrelation.from_seam({"f8_3.weight": torch.zeros(1), "other": torch.zeros(1)})
    narrow = seam_weights() | {"f9.weight": torch.zeros(4, 5, 1, 1)}
    with pytest.raises(ValueError, match=r"'f9.weight' reads 5 channels, fewer than the 6 \+ 8"):
        PixelCorrelation.from_seam(narrow)


class AMLabGated(nn.Module):
    """Ilse et al.'s gated attention, written after the paper with the parameter names of their code."""

    def __init__(self, dim=12, hidden=8, heads=1):
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(dim, hidden), nn.Sigmoid())
        self.attention_w = nn.Linear(hidden, heads)

    def forward(self, h):
        return self.attention_w(self.attention_V(h) * self.attention_U(h))


class AMLabPlain(nn.Module):
    def __init__(self, dim=12, hidden=8, heads=1):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, heads))

    def forward(self, h):
        return self.attention(h)


class CLAMGated(nn.Module):
    def __init__(self, dim=12, hidden=8, heads=3):
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Dropout(0.25))
        self.attention_b = nn.Sequential(nn.Linear(dim, hidden), nn.Sigmoid(), nn.Dropout(0.25))
        self.attention_c = nn.Linear(hidden, heads)

    def forward(self, h):
        return self.attention_c(self.attention_a(h) * self.attention_b(h))


class CLAMPlain(nn.Module):
    def __init__(self, dim=12, hidden=8, heads=3, dropout=False):
        super().__init__()
        middle = [nn.Dropout(0.25)] if dropout else []
        self.module = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), *middle, nn.Linear(hidden, heads))

    def forward(self, h):
        return self.module(h)


PUBLISHED = {
    "AMLab gated": (AMLabGated, "vuw"),
    "AMLab plain": (AMLabPlain, "vw"),
    "CLAM gated": (CLAMGated, "vuw"),
    "CLAM plain": (CLAMPlain, "vw"),
    "CLAM plain with dropout": (lambda: CLAMPlain(dropout=True), "vw"),
}


@pytest.mark.parametrize("prefix", ["", "attention_net.3."])
@pytest.mark.parametrize("name", PUBLISHED)
def test_attention_takes_published_weights(name, prefix):
    make, letters = PUBLISHED[name]
    published = make().double().eval()
    state = {prefix + key: value for key, value in published.state_dict().items()}
    pool = GatedAttentionPool.from_state_dict(state | {"classifiers.weight": torch.zeros(1)})
    assert [key for key in pool.state_dict()] == [f"{x}_{kind}" for x in letters for kind in ("weight", "bias")]
    h = torch.randn(2, 11, 12, dtype=torch.float64)
    scores = published(h).transpose(1, 2)  # [B, K, N]
    actual_pooled, actual_scores = pool(h)
    torch.testing.assert_close(actual_scores, scores, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual_pooled, scores.softmax(2) @ h, rtol=1e-12, atol=1e-12)


def test_attention_takes_weights_without_biases():
    state = {key: value for key, value in AMLabGated().state_dict().items() if key.endswith("weight")}
    pool = GatedAttentionPool.from_state_dict(state)
    assert list(pool.state_dict()) == ["v_weight", "u_weight", "w_weight"]
    assert torch.equal(pool.u_weight, state["attention_U.0.weight"])


def test_attention_rejects_other_weights():
    told = r"found none.*AMLab gated: attention_V\.0\.weight.*CLAM plain.*Keys found: V, U"
    with pytest.raises(ValueError, match=told):
        GatedAttentionPool.from_state_dict({"V": torch.zeros(1), "U": torch.zeros(1)})
    two = {f"{p}.{key}": value for p in "ab" for key, value in AMLabPlain().state_dict().items()}
    with pytest.raises(ValueError, match=r"found AMLab plain at 'a\.', AMLab plain at 'b\.'"):
        GatedAttentionPool.from_state_dict(two)
    half = AMLabGated().state_dict()
    del half["attention_U.0.weight"]
    with pytest.raises(ValueError, match="found none"):
        GatedAttentionPool.from_state_dict(half)


@pytest.mark.parametrize("gated, letters", [(True, "vuw"), (False, "vw")])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_names_and_initialisation(gated, letters, bias):
    pool = GatedAttentionPool(400, 100, heads=3, gated=gated, bias=bias)
    kinds = ("weight", "bias") if bias else ("weight",)
    assert list(pool.state_dict()) == [f"{x}_{kind}" for x in letters for kind in kinds]
    assert pool.v_weight.shape == (100, 400) and pool.w_weight.shape == (3, 100)
    assert 0.99 / 20 < pool.v_weight.abs().max() <= 1 / 20 and 0.9 / 10 < pool.w_weight.abs().max() <= 1 / 10
    assert repr(pool) == f"GatedAttentionPool(400, hidden=100, heads=3, gated={gated}, bias={bias})"


@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_on_feature_maps(channels_last):
    pool = GatedAttentionPool(12, 8, heads=2).double()
    fmap = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    fmap = fmap.to(memory_format=torch.channels_last) if channels_last else fmap
    pooled, scores = pool(fmap)
    assert pooled.shape == (2, 2, 12) and scores.shape == (2, 2, 3, 5)
    bags = fmap.permute(0, 2, 3, 1).reshape(2, 15, 12)
    expected_pooled, expected_scores = pool(bags)
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.flatten(2), expected_scores, rtol=1e-12, atol=1e-12)


def test_attention_masks_maps_and_bags_alike():
    pool = GatedAttentionPool(6, 4).double()
    fmap = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    mask = torch.rand(2, 3, 4) > 0.4
    mask[1] = False
    pooled, scores = pool(fmap, mask)
    kept = fmap[0].flatten(1).T[mask[0].flatten()]
    torch.testing.assert_close(pooled[0], pool(kept[None])[0][0], rtol=1e-12, atol=1e-12)
    assert torch.isneginf(scores[0, 0][~mask[0]]).all() and (pooled[1] == 0).all()
    torch.testing.assert_close(pool(fmap.flatten(2).transpose(1, 2), mask.flatten(1))[0], pooled, rtol=0, atol=0)


def test_attention_on_ragged_bags():
    pool = GatedAttentionPool(6, 4, heads=2).double()
    bags = [torch.randn(n, 6, dtype=torch.float64) for n in (3, 0, 5)]
    ends = torch.tensor([0, 3, 3, 8])
    pooled, scores = pool(torch.cat(bags), cu_seqlens=ends)
    assert scores.shape == (2, 8) and (pooled[1] == 0).all()
    for i in (0, 2):
        torch.testing.assert_close(pooled[i], pool(bags[i][None])[0][0], rtol=1e-12, atol=1e-12)


def test_layers_train_under_autocast():
    correlation, pool = PixelCorrelation((4, 6), 8), GatedAttentionPool(6, 4)
    features = [torch.randn(1, c, 5, 6) for c in (4, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        refined = correlation(torch.rand(1, 2, 5, 6), features, torch.randn(1, 3, 20, 24))
        pooled, _ = pool(features[1])
    assert refined.dtype == torch.float32
    (refined.sum() + pooled.float().square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in (*correlation.parameters(), *pool.parameters()))


def pamr_reference(cam, image, dilations, steps):
    """PAMR pixel by pixel, in Python floats."""
    (channels, h, w), picture = cam.shape, image.tolist()

    def at(plane, y, x):
        return plane[min(max(y, 0), h - 1)][min(max(x, 0), w - 1)]

    window = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    around = [move for move in window if move != (0, 0)]
    m = cam.tolist()
    weights = {}
    for y in range(h):
        for x in range(w):
            kernel = [0.0] * len(around)
            for plane in picture:
                sigma = stdev(at(plane, y + dy, x + dx) for dy, dx in window)
                for j, (dy, dx) in enumerate(around):
                    kernel[j] -= abs(plane[y][x] - at(plane, y + dy, x + dx)) / (1e-8 + 0.1 * sigma) / len(picture)
            powers = [math.exp(k) for k in kernel]
            weights[y, x] = [p / sum(powers) for p in powers]
    for _ in range(steps):
        m = [
            [
                [sum(p * at(m[c], y + dy, x + dx) for p, (dy, dx) in zip(weights[y, x], around)) for x in range(w)]
                for y in range(h)
            ]
            for c in range(channels)
        ]
    return torch.tensor(m, dtype=torch.float64)


@pytest.mark.parametrize("dilations, steps", [((1,), 1), ((1, 2, 4), 3), ((2, 24), 2)])
def test_adaptive_refinement_is_the_formula(dilations, steps):
    cam = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    image = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    image[1, :, :3] = 0.25  # flat parts, where the standard deviation is 0
    actual = PixelAdaptiveRefinement(dilations, steps)(cam, image)
    expected = torch.stack([pamr_reference(c, i, dilations, steps) for c, i in zip(cam, image)])
    # |I(i) - I(j)| is at most √27 σ for three dilations, so exponents reach -52; some 20 roundings of them are 1000 of
    # a weight.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2**10 * U[torch.float64])


def test_adaptive_refinement_keeps_constants_and_range():
    refine = PixelAdaptiveRefinement()
    image = torch.rand(2, 3, 20, 31)
    image[1, :, :, 9:] = 0.5
    constant = refine(torch.full((2, 2, 20, 31), 0.7), image)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.7), rtol=480 * U[torch.float32], atol=0)
    cam = torch.randn(2, 4, 20, 31)
    low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    out, slack = refine(cam, image), 480 * U[torch.float32] * cam.abs().max()  # 10 steps of 48 roundings
    assert (out >= low - slack).all() and (out <= high + slack).all()
    assert (out - cam).abs().max() > 1
    assert torch.equal(PixelAdaptiveRefinement(steps=0)(cam, image), cam)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_adaptive_refinement_turns_with_its_inputs(turns, flip):
    def turn(x):
        return torch.rot90(x.flip(3) if flip else x, turns, (2, 3))

    refine = PixelAdaptiveRefinement()
    cam, image = torch.rand(1, 2, 13, 18, dtype=torch.float64), torch.rand(1, 3, 13, 18, dtype=torch.float64)
    torch.testing.assert_close(refine(turn(cam), turn(image)), turn(refine(cam, image)), rtol=1e-12, atol=1e-12)


def test_adaptive_refinement_draws_a_blurred_step_to_the_edge_of_the_picture():
    torch.manual_seed(0)
    x = torch.arange(64.0)
    side = (x >= 32).float()
    image = side.expand(1, 3, 24, 64) + 0.05 * torch.randn(1, 3, 24, 64)
    cam = ((x - 37) / 12 + 0.5).clamp(0, 1).expand(1, 1, 24, 64)  # its middle lies 5.5 px beside the edge

    def wrong(m):
        low, high = m.amin(), m.amax()
        return ((m > (low + high) / 2) != side.bool()).float().mean().item() * 64

    assert wrong(cam) == 6
    refined = PixelAdaptiveRefinement()(cam, image)
    assert wrong(refined) < 0.1
    gap = refined[..., 33] - refined[..., 30]
    assert gap.min() > 0.25 > (cam[..., 33] - cam[..., 30]).max()
    assert wrong(PixelAdaptiveRefinement()(cam, torch.rand_like(image))) > 3  # the edge is what does it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adaptive_refinement_dtypes(dtype):
    refine = PixelAdaptiveRefinement(dilations=(1, 3), steps=4)
    cam, image = torch.rand(1, 2, 9, 8).to(dtype).requires_grad_(), torch.rand(1, 3, 9, 8, requires_grad=True)
    out = refine(cam, image)
    assert out.dtype == dtype
    grad, nothing = torch.autograd.grad(out.sum(), (cam, image), allow_unused=True)
    assert grad.dtype == dtype and grad.abs().sum() > 0 and nothing is None  # of the map, not of the picture
    full = torch.promote_types(dtype, torch.float32)
    assert torch.equal(out, refine(cam.to(full), image.to(full)).to(dtype))  # halves are rounded once, at the end
    assert refine(cam, image.double()).dtype == dtype


def test_adaptive_refinement_takes_bytes_and_any_scale_of_the_picture():
    refine = PixelAdaptiveRefinement()
    cam, image = torch.rand(1, 2, 9, 8), torch.randint(0, 256, (1, 3, 9, 8), dtype=torch.uint8)
    out = refine(cam, image)
    assert torch.equal(out, refine(cam, image.float()))
    torch.testing.assert_close(out, refine(cam, image / 255 - 0.4), rtol=1e-4, atol=1e-4)


def test_adaptive_refinement_says_what_it_needs():
    refine = PixelAdaptiveRefinement()
    for cam, image in (((1, 2, 8, 9), (1, 3, 8, 8)), ((2, 2, 8, 8), (1, 3, 8, 8)), ((1, 2, 8, 8), (1, 3, 8))):
        with pytest.raises(ValueError, match=re.escape(f"of the same B, H and W; got {list(cam)} and {list(image)}")):
            refine(torch.rand(cam), torch.rand(image))
    for cam, image in (((2, 8, 8), (2, 3, 8, 8)), ((0, 2, 8, 8), (0, 3, 8, 8))):
        with pytest.raises(ValueError, match="cam .*must"):
            refine(torch.rand(cam), torch.rand(image))
    with pytest.raises(ValueError, match="floating point.*got torch.int64"):
        refine(torch.ones(1, 1, 8, 8, dtype=torch.int64), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got \[\]"):
        PixelAdaptiveRefinement(())
    with pytest.raises(ValueError, match=r"at least one distance of 1.*got \[1, 0\]"):
        PixelAdaptiveRefinement((1, 0))
    with pytest.raises(ValueError, match="got -1"):
        PixelAdaptiveRefinement(steps=-1)
    with pytest.raises(ValueError, match="got 'crf'"):
        PixelAdaptiveRefinement(form="crf")


def test_docstring_examples():
    result = doctest.testmod(ercn.nn)
    assert result.attempted and not result.failed
