"""The layers: conversions of published weights, every kind of input, and fixed parameter names."""

import doctest
import itertools
import math
import re
import warnings
from statistics import stdev

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ercn.nn
from ercn.nn import GatedAttentionPool, PixelAdaptiveRefinement, PixelCorrelation
from ercn.ops import reference

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
    """With a large common part all cosines are near 1: the layer averages, except with ``center``."""
    torch.manual_seed(0)
    plain, centred = (PixelCorrelation((4,), 8, proj_channels=(8,), center=c).double() for c in (False, True))
    centred.load_state_dict(plain.state_dict())
    with torch.no_grad():  # positive projections, which the ReLU does not change
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


class Published(nn.Module):
    """A published attention layer, written after its formula with the parameter names of its code: layers ``v``, ``w``
    and, where it is gated, ``u``, by their names in the state dict; {} counts heads. Returns scores [B, K, N].
    """

    def __init__(self, v, u, w, *, activation=torch.tanh, lists=1, heads=1, last_bias=True, dim=12, hidden=8):
        super().__init__()
        self.names, self.activation, self.lists = (v, u, w), activation, lists
        for i in range(lists):
            for name, layer in (
                (v, nn.Linear(dim, hidden)),
                (u, nn.Linear(dim, hidden)),
                (w, nn.Linear(hidden, heads, bias=last_bias)),
            ):
                owner, parts = self, name.format(i).split(".") if name else ()
                for part in parts[:-1]:
                    if not hasattr(owner, part):
                        owner.add_module(part, nn.Module())
                    owner = getattr(owner, part)
                if name:
                    owner.add_module(parts[-1], layer)

    def forward(self, h):
        scores = []
        for i in range(self.lists):
            v, u, w = (name and self.get_submodule(name.format(i)) for name in self.names)
            hidden = self.activation(v(h))
            scores.append(w(hidden * u(h).sigmoid() if u else hidden))
        return torch.cat(scores, 2).transpose(1, 2)


def clam_plain(dropout):
    return Published("module.0", None, "module.3" if dropout else "module.2", heads=3)


def torchmil(v="fc1.module", u="fc_gated.module", **kwargs):
    return Published(v, u, "fc2", last_bias=False, **kwargs)


TRIDENT = ("attention_heads.{}.0", "gating_layers.{}.0", "branching_layers.{}")
CLAM = ("attention_a.0", "attention_b.0", "attention_c")
PUBLISHED = {  # layout of to_state_dict, module, arguments of from_state_dict
    "AMLab gated": ("AMLab", lambda: Published("attention_V.0", "attention_U.0", "attention_w"), {}),
    "AMLab plain": ("AMLab", lambda: Published("attention.0", None, "attention.2"), {}),
    "AMLab 2020": ("AMLab 2020", lambda: Published("attention_V.0", "attention_U.0", "attention_weights", heads=2), {}),
    "AMLab 2018": ("AMLab 2020", lambda: Published("attention.0", None, "attention.2"), {}),
    "CLAM gated": ("CLAM", lambda: Published(*CLAM, heads=3), {"dropout": 0.0}),
    "CLAM plain": ("CLAM", lambda: clam_plain(dropout=False), {}),
    "CLAM plain with dropout": ("CLAM", lambda: clam_plain(dropout=True), {"dropout": 0.25}),
    "MIL-Lab gated": ("MIL-Lab", lambda: Published(*CLAM), {"dropout": 0.25}),
    "MIL-Lab plain": ("MIL-Lab", lambda: clam_plain(dropout=True), {"dropout": 0.0}),
    "torchmil gated": ("torchmil", torchmil, {}),
    "torchmil plain": ("torchmil", lambda: torchmil(u=None), {}),
    "torchmil relu": ("torchmil", lambda: torchmil(activation=F.relu), {"activation": "relu"}),
    "torchmil gelu": ("torchmil", lambda: torchmil(u=None, activation=F.gelu), {"activation": "gelu"}),
    "torchmil CAMIL gated": ("torchmil CAMIL", lambda: torchmil("fc1", "fc_gated"), {}),
    "torchmil CAMIL plain": ("torchmil CAMIL", lambda: torchmil("fc1", None), {}),
    "TRIDENT gated": ("TRIDENT", lambda: Published(*TRIDENT, lists=3, heads=2), {}),
    "TRIDENT plain": ("TRIDENT", lambda: Published(TRIDENT[0], None, TRIDENT[2], lists=4), {}),
    "TRIDENT one head": ("TRIDENT", lambda: Published(*TRIDENT, heads=2), {}),
}


@pytest.mark.parametrize("prefix", ["", "attention_net.3.", "model.{}.pool."])
@pytest.mark.parametrize("name", PUBLISHED)
def test_attention_takes_published_weights_and_gives_them_back(name, prefix):
    layout, make, given = PUBLISHED[name]
    published = make().double()
    state = {prefix + key: value for key, value in published.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = GatedAttentionPool.from_state_dict(state | {"classifiers.weight": torch.zeros(1)}, **given)
    assert pool.dropout == given.get("dropout", 0)
    h = torch.randn(2, 11, 12, dtype=torch.float64)
    scores = published(h)
    actual_pooled, actual_scores = pool.eval()(h)
    torch.testing.assert_close(actual_scores, scores, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual_pooled, scores.softmax(2) @ h, rtol=1e-12, atol=1e-12)

    back = pool.to_state_dict(layout, prefix)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in back)
    again = GatedAttentionPool.from_state_dict(back, **given)
    assert repr(again) == repr(pool)
    for key, value in pool.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.zero_()
    assert all(torch.equal(back[key], value) and value.any() for key, value in state.items())  # both were copies


def test_heads_of_a_list_stay_apart_in_training():
    published = Published(*TRIDENT, lists=3, heads=2).double()
    pool = GatedAttentionPool.from_state_dict(published.state_dict())
    settings = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [torch.optim.SGD(layer.parameters(), **settings) for layer in (published, pool)]
    h, upstream = torch.randn(2, 9, 12, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)
    for _ in range(3):
        for optimizer, pooled in zip(optimizers, (published(h).softmax(2) @ h, pool(h)[0])):
            optimizer.zero_grad()
            (pooled * upstream).sum().backward()
            optimizer.step()
    back = pool.to_state_dict("TRIDENT")
    for key, value in published.state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, prefix, seen",
    [
        ("CLAM plain with dropout", "", "without weights before 'module.3'"),
        ("MIL-Lab plain", "model.global_attn.", "without weights before 'model.global_attn.module.3'"),
        ("CLAM gated", "attention_net.3.", "has its attention at 'attention_net.3'"),
        ("CLAM gated", "attention_net.2.", None),
        ("CLAM gated", "", None),
        ("CLAM plain", "attention_net.3.", None),
        ("AMLab gated", "attention_net.3.", None),
    ],
)
def test_attention_warns_where_the_source_had_dropout(name, prefix, seen):
    state = {prefix + key: value for key, value in PUBLISHED[name][1]().state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert GatedAttentionPool.from_state_dict(state).dropout == 0
        for dropout in (0.0, 0.25):
            assert GatedAttentionPool.from_state_dict(state, dropout=dropout).dropout == dropout
    assert len(caught) == (seen is not None)
    for warning in caught:
        assert seen in str(warning.message) and "dropout=0.25" in str(warning.message)
        assert warning.filename == __file__


def test_attention_takes_weights_with_any_biases():
    state = PUBLISHED["AMLab gated"][1]().state_dict()
    for kept in itertools.product((False, True), repeat=3):
        layers = ("attention_V.0", "attention_U.0", "attention_w")
        dropped = {f"{layer}.bias" for layer, keep in zip(layers, kept) if not keep}
        part = {key: value for key, value in state.items() if key not in dropped}
        pool = GatedAttentionPool.from_state_dict(part)
        assert [f"{x}_bias" in pool.state_dict() for x in "vuw"] == list(kept)
        assert pool.to_state_dict("AMLab").keys() == part.keys()


def test_attention_finds_its_layer_beside_mlps():
    blocks = {
        f"blocks.{i}.mlp.fc{j}.{kind}": torch.zeros(shape)
        for i in range(3)
        for j, rows in ((1, 16), (2, 4))
        for kind, shape in (("weight", (rows, 20 - rows)), ("bias", (rows,)))
    }
    for name in ("torchmil plain", "torchmil CAMIL plain", "torchmil CAMIL gated"):
        own = {f"pool.{key}": value for key, value in PUBLISHED[name][1]().state_dict().items()}
        pool = GatedAttentionPool.from_state_dict(blocks | own)
        assert torch.equal(pool.w_weight, own["pool.fc2.weight"])
        assert (pool.u_weight is None) == name.endswith("plain")
    with pytest.raises(ValueError, match="found none"):
        GatedAttentionPool.from_state_dict(blocks)
    mlp = {"fc1.weight": torch.zeros(8, 12), "fc1.bias": torch.zeros(8)}
    wide = {"fc2.weight": torch.zeros(5, 8)}
    with_bias = {"fc2.weight": torch.zeros(1, 8), "fc2.bias": torch.zeros(1)}
    for last in (wide, with_bias):
        with pytest.raises(ValueError, match="found none"):
            GatedAttentionPool.from_state_dict(mlp | last)


def test_attention_rejects_other_weights():
    told = r"found none.*AMLab gated: attention_V\.0\.weight.*CLAM plain.*Keys found: V, U"
    with pytest.raises(ValueError, match=told):
        GatedAttentionPool.from_state_dict({"V": torch.zeros(1), "U": torch.zeros(1)})
    plain = PUBLISHED["AMLab plain"][1]().state_dict()
    two = {f"{p}.{key}": value for p in "ab" for key, value in plain.items()}
    with pytest.raises(ValueError, match=r"found AMLab plain at 'a\.', AMLab plain at 'b\.'"):
        GatedAttentionPool.from_state_dict(two)
    for name in ("AMLab gated", "torchmil gated", "TRIDENT gated"):  # a part of a gated layer is not a plain layer
        half = PUBLISHED[name][1]().state_dict()
        del half[next(key for key in half if re.match("attention_U|fc_gated|gating", key) and key.endswith("weight"))]
        with pytest.raises(ValueError, match="found none"):
            GatedAttentionPool.from_state_dict(half)


def test_attention_takes_matrices_alone():
    state = PUBLISHED["AMLab plain"][1]().state_dict()
    state["attention.0.weight"] = state["attention.0.weight"][..., None]  # a convolution's
    with pytest.raises(ValueError, match=r"AMLab plain at '' needs matrices; got \[\[8, 12, 1\], \[1, 8\]\]"):
        GatedAttentionPool.from_state_dict(state)


@pytest.mark.parametrize(
    "name, key, change, told",
    [
        ("AMLab gated", "attention_U.0.weight", lambda x: x[:, 1:], "float32 [8, 12] on cpu to fit"),
        ("AMLab gated", "attention_w.weight", lambda x: x[:, 1:], "got torch.float32 [1, 7] on cpu"),
        ("AMLab gated", "attention_V.0.bias", lambda x: x[1:], "got torch.float32 [7] on cpu"),
        ("AMLab gated", "attention_w.weight", lambda x: x.double(), "got torch.float64 [1, 8] on cpu"),
        ("AMLab gated", "attention_w.weight", lambda x: x.to("meta"), "got torch.float32 [1, 8] on meta"),
        ("TRIDENT gated", "attention_heads.2.0.weight", lambda x: x[1:], "got torch.float32 [7, 12] on cpu"),
        ("TRIDENT gated", "branching_layers.1.weight", None, "is missing"),
        ("TRIDENT gated", "branching_layers.2.bias", None, "is missing"),
    ],
)
def test_attention_names_weights_that_do_not_fit(name, key, change, told):
    state = {f"net.{key}": value for key, value in PUBLISHED[name][1]().state_dict().items()}
    value = state.pop(f"net.{key}")
    if change is not None:
        state[f"net.{key}"] = change(value)
    with pytest.raises(ValueError, match=re.escape(f"'net.{key}'") + ".*" + re.escape(told)):
        GatedAttentionPool.from_state_dict(state)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attention_stays_where_its_weights_are_and_draws_nothing(dtype, device):
    state = PUBLISHED["CLAM gated"][1]().to(device, dtype).state_dict()
    before = torch.get_rng_state()
    pool = GatedAttentionPool.from_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in pool.named_parameters():
        assert value.dtype == dtype and value.device.type == device and value.requires_grad, key
    assert all(x.device.type == device and x.dtype == dtype for x in pool.to_state_dict("CLAM").values())


def test_attention_refuses_layouts_without_room_for_it():
    known = "AMLab, AMLab 2020, CLAM, torchmil, torchmil CAMIL, TRIDENT, MIL-Lab"
    with pytest.raises(ValueError, match=f"layout must be one of {known}; got 'clam'"):
        GatedAttentionPool(4).to_state_dict("clam")
    for pool, has in (
        (GatedAttentionPool(4, heads=2, bias=(True, True, False)), "heads = 2, no b_w"),
        (GatedAttentionPool(4), "heads = 1, a b_w"),
    ):
        for layout in ("torchmil", "torchmil CAMIL"):
            with pytest.raises(ValueError, match=f"'{layout}' has one head and no b_w; this layer has {has}"):
                pool.to_state_dict(layout)
    with pytest.raises(ValueError, match="'CLAM' has no groups, only TRIDENT has; this layer has 2"):
        GatedAttentionPool(4, heads=2, groups=2).to_state_dict("CLAM")


@pytest.mark.parametrize("gated, letters", [(True, "vuw"), (False, "vw")])
@pytest.mark.parametrize("bias", [True, False, (True, False, False), (False, True, True), (True, True, False)])
def test_attention_names_and_initialisation(gated, letters, bias):
    torch.manual_seed(3)
    pool = GatedAttentionPool(400, 100, heads=3, gated=gated, bias=bias)
    biases = dict(zip("vuw", (bias,) * 3 if isinstance(bias, bool) else bias))
    torch.manual_seed(3)
    shapes = {"v": (400, 100), "u": (400, 100), "w": (100, 3)}
    linears = {letter: nn.Linear(*shapes[letter], bias=biases[letter]) for letter in letters}
    expected = {
        f"{letter}_{kind}": value for letter, linear in linears.items() for kind, value in linear.named_parameters()
    }
    assert list(pool.state_dict()) == list(expected)
    for key, value in expected.items():  # the bound is computed in another order
        torch.testing.assert_close(pool.state_dict()[key], value.detach(), rtol=1e-5, atol=0)
    there = tuple(biases[x] and x in letters for x in "vuw")
    told = bias if isinstance(bias, bool) else there
    assert repr(pool) == f"GatedAttentionPool(400, hidden=100, heads=3, gated={gated}, bias={told})"


def test_attention_shows_its_other_settings():
    pool = GatedAttentionPool(8, 6, heads=2, activation="relu", dropout=0.25, groups=2)
    settings = "activation='relu', dropout=0.25, groups=2"
    assert repr(pool) == f"GatedAttentionPool(8, hidden=6, heads=2, gated=True, bias=True, {settings})"
    assert pool.w_weight.shape == (2, 3) and pool.w_weight.abs().max() > 6**-0.5 / 2


@pytest.mark.parametrize("gated", [True, False])
def test_attention_is_made_on_a_device_and_reset_there(gated):
    meta = GatedAttentionPool(400, 100, heads=4, gated=gated, groups=2, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in meta.parameters())
    pool = meta.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.fill_(torch.nan)
    pool.reset_parameters()
    for name, parameter in pool.named_parameters():
        bound = (50 if name.startswith("w") else 400) ** -0.5
        largest = parameter.abs().max()
        assert largest <= bound and largest > (0.9 if parameter.numel() > 20 else 0.2) * bound, name
    assert GatedAttentionPool(4, dtype=torch.bfloat16).v_bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "given, told",
    [
        ({"bias": (True, False)}, r"three for b_V, b_U and b_w; got \(True, False\)"),
        ({"activation": "sigmoid"}, "'tanh', 'relu' or 'gelu'; got 'sigmoid'"),
        ({"dropout": 1.5}, "0 to 1; got 1.5"),
        ({"dropout": -0.1}, "0 to 1; got -0.1"),
        ({"groups": 2}, "divide heads 1 and hidden 128; got 2"),
        ({"groups": 3, "heads": 3}, "divide heads 3 and hidden 128; got 3"),
        ({"groups": 0}, "got 0"),
    ],
)
def test_attention_says_what_it_needs(given, told):
    with pytest.raises(ValueError, match=told):
        GatedAttentionPool(4, **given)


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


def test_one_bag_needs_no_batch():
    pool, bag = GatedAttentionPool(6, 4, heads=2).double(), torch.randn(7, 6, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    for given in ({}, {"mask": mask}, {"key_padding_mask": mask == 0}):
        pooled, scores = pool(bag, **given)
        batched = pool(bag[None], **{name: value[None] for name, value in given.items()})
        assert torch.equal(pooled, batched[0][0]) and torch.equal(scores, batched[1][0])
        assert pooled.shape == (2, 6) and scores.shape == (2, 7)


@pytest.mark.parametrize("kind", ["bags", "maps"])
def test_masks_of_any_kind_are_one(kind):
    pool = GatedAttentionPool(6, 4, heads=2).double()
    mask = torch.rand(2, 3, 4) > 0.4
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    if kind == "bags":
        x, mask = x.flatten(2).transpose(1, 2), mask.flatten(1)
    pooled, scores = pool(x, mask)
    assert scores.shape[2:] == mask.shape[1:] and torch.equal(torch.isneginf(scores), ~mask[:, None].expand_as(scores))
    for given in ({"mask": mask.float()}, {"mask": mask.long()}, {"key_padding_mask": ~mask}):
        for actual, expected in zip(pool(x, **given), (pooled, scores)):
            assert torch.equal(actual, expected)
        torch.testing.assert_close(pool.scores(x, **given), scores, rtol=1e-12, atol=1e-12)
    finite = pool(x, mask, masked_score=-7.0)
    assert torch.equal(finite[0], pooled) and torch.equal(finite[1], scores.masked_fill(~mask[:, None], -7.0))
    torch.testing.assert_close(pool.scores(x, mask, masked_score=-7.0), finite[1], rtol=1e-12, atol=1e-12)


def test_scores_are_those_of_the_pool():
    pool, x = GatedAttentionPool(6, 4, heads=2, gated=False, groups=2).double(), torch.randn(8, 6, dtype=torch.float64)
    ends = torch.tensor([0, 3, 3, 8])
    for given in ((x,), (x[None],), (x.T.reshape(1, 6, 2, 4),), (x, None, ends)):
        torch.testing.assert_close(pool.scores(*given), pool(*given)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_dropout_is_that_of_the_reference(layout, activation, gated):
    pool = GatedAttentionPool(6, 70, heads=2, gated=gated, activation=activation, dropout=0.3).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    if layout == "ragged":
        x, given = x.flatten(0, 1), {"cu_seqlens": torch.tensor([0, 5, 18])}
        bags = x.split([5, 13])
    else:
        given, bags = {}, x
    generator = torch.Generator().manual_seed(11)
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(11))
    v, u = reference.dropout_factors(seed, 0.3, torch.arange(18), 70, torch.float64)
    pooled, scores = pool(x, generator=generator, **given)
    start = 0
    for i, bag in enumerate(bags):
        rows = slice(start, start := start + len(bag))
        act = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu}[activation]
        hidden = act(F.linear(bag, pool.v_weight, pool.v_bias)) * v[rows]
        if gated:
            hidden = hidden * F.linear(bag, pool.u_weight, pool.u_bias).sigmoid() * u[rows]
        expected = F.linear(hidden, pool.w_weight, pool.w_bias).T
        actual = scores[:, rows] if layout == "ragged" else scores[i]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pooled[i], expected.softmax(1) @ bag, rtol=1e-12, atol=1e-12)


def test_dropout_is_for_training_alone():
    pool, x = GatedAttentionPool(6, 32, dropout=0.5).double(), torch.randn(2, 40, 6, dtype=torch.float64)
    plain = GatedAttentionPool(6, 32).double()
    plain.load_state_dict(pool.state_dict())
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(pool(x)[1])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    torch.manual_seed(1)
    torch.testing.assert_close(pool.scores(x), outputs[0], rtol=1e-12, atol=1e-12)
    before = torch.get_rng_state()
    pool.eval()
    for actual, expected in zip(pool(x, generator=torch.Generator()), plain(x)):
        assert torch.equal(actual, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert (outputs[0] - plain(x)[1]).abs().max() > 0.01


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
    cam = ((x - 37) / 12 + 0.5).clamp(0, 1).expand(1, 1, 24, 64)  # its middle is 5.5 px from the edge

    def wrong(m):
        low, high = m.amin(), m.amax()
        return ((m > (low + high) / 2) != side.bool()).float().mean().item() * 64

    assert wrong(cam) == 6
    refined = PixelAdaptiveRefinement()(cam, image)
    assert wrong(refined) < 0.1
    gap = refined[..., 33] - refined[..., 30]
    assert gap.min() > 0.25 > (cam[..., 33] - cam[..., 30]).max()
    assert wrong(PixelAdaptiveRefinement()(cam, torch.rand_like(image))) > 3  # not without the edge


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adaptive_refinement_dtypes(dtype):
    refine = PixelAdaptiveRefinement(dilations=(1, 3), steps=4)
    cam, image = torch.rand(1, 2, 9, 8).to(dtype).requires_grad_(), torch.rand(1, 3, 9, 8, requires_grad=True)
    out = refine(cam, image)
    assert out.dtype == dtype
    grad, nothing = torch.autograd.grad(out.sum(), (cam, image), allow_unused=True)
    assert grad.dtype == dtype and grad.abs().sum() > 0 and nothing is None  # for the map, not for the picture
    full = torch.promote_types(dtype, torch.float32)
    assert torch.equal(out, refine(cam.to(full), image.to(full)).to(dtype))  # half precision: rounded once, at the end
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
    with pytest.raises(ValueError, match=r"got \(\)"):
        PixelAdaptiveRefinement(())
    with pytest.raises(ValueError, match=r"at least one distance of 1.*got .1, 0"):
        PixelAdaptiveRefinement((1, 0))
    with pytest.raises(ValueError, match="got -1"):
        PixelAdaptiveRefinement(steps=-1)
    with pytest.raises(ValueError, match="got 'crf'"):
        PixelAdaptiveRefinement(form="crf")


def test_docstring_examples():
    result = doctest.testmod(ercn.nn)
    assert result.attempted and not result.failed
