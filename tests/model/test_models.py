"""The network, its objective and the presets, on small backbones and small pictures."""

import dataclasses
import doctest
import importlib.resources
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from ercn import config as configs
from ercn import losses, models
from ercn.config import LossConfig, ModelConfig, TrainConfig, from_dict, preset
from ercn.elements import resize
from ercn.maps import heat_maps
from ercn.models import ERCN, create_backbone, foreground_channels, grade_probabilities, targets_from_grades
from ercn.objective import ercn_loss
from ercn.training.fit import check_losses, check_patches
from ercn.transforms import Flip, Identity, Rescale, sample_transform

SMALL = ModelConfig(backbone="test_resnet", embed_dim=16, pool_dim=8, cam_pool="relu", refinement=("affinity",))
WHOLE = LossConfig(er=0.1, ecr=1.0, consistency=0.1, transform="flip", warmup_epochs=0)


def build(**changes):
    torch.manual_seed(0)
    return ERCN(replace(SMALL, **changes))


def pictures(batch=2, h=65, w=97):
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "backbone, stride",
    [(name, stride) for name in ("resnet10t", "mobilenetv3_small_050", "regnetx_002") for stride in (8, 16, 32)]
    + [("convnext_atto", 32)],
)
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_output_shapes(backbone, stride, size):
    """Aligned corners have one element more than cells, and both picture sizes give the same grid."""
    model = build(backbone=backbone, output_stride=stride).eval()
    assert model.align_corners == (backbone != "convnext_atto")
    out = model(pictures(2, *size))
    h, w = 64 // stride + model.align_corners, 96 // stride + model.align_corners
    shapes = {name: tuple(value.shape) for name, value in out._asdict().items()}
    assert shapes == {
        "logits": (2, 4),
        "cam_logits": (2, 4),
        "mil_logits": (2, 4),
        "cam": (2, 4, h, w),
        "refined_cam": (2, 5, h, w),
        "mask": (2, 1, h, w),
        "attention": (2, 1, h, w),
    }


def drawn(model):
    """The model with random parameters outside of the backbone, since priors and biases begin at 0."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def test_output_is_what_it_says():
    model = drawn(build(cam_scale=3.0)).eval()
    out = model(pictures())
    torch.testing.assert_close(out.cam_logits, 3 * out.cam.relu().mean((2, 3)) + model.prior)
    torch.testing.assert_close(out.logits, (out.cam_logits + out.mil_logits) / 2)
    assert (out.refined_cam >= 0).all() and (out.refined_cam <= 1 + 1e-6).all()
    *_, last = model.backbone(pictures())
    torch.testing.assert_close(out.cam, torch.einsum("fd,bdhw->bfhw", model.classifier.weight[:, :, 0, 0], last))


@pytest.mark.parametrize("heads", ["shared", "classwise", "additive", "separate"])
@pytest.mark.parametrize("pool", ["gated", "plain"])
def test_evidence(heads, pool):
    """MIL logits and CAM of each form, by its formula, in float64."""
    model = drawn(build(evidence=heads, pool=pool, output_stride=8).double()).eval()
    image = pictures().double()
    out, last = model(image), model.backbone(image)[-1]
    n = out.cam[0, 0].numel()
    attention = out.attention.flatten(2).softmax(2).view_as(out.attention)  # [B, heads, h, w]
    assert attention.shape[1] == (4 if heads == "classwise" else 1)
    tight = {"rtol": 1e-11, "atol": 1e-11}
    if heads == "additive":
        first, _, second = model.classifier
        assert first.weight.shape[0] == model.config.pool_dim and second.bias is None
        hidden = torch.einsum("ld,bdhw->blhw", first.weight[:, :, 0, 0], n * attention * last)
        hidden = (hidden + first.bias[:, None, None]).clamp_min(0)
        cam = torch.einsum("fl,blhw->bfhw", second.weight[:, :, 0, 0], hidden)
        mil = cam.sum((2, 3)) / n + model.mil_bias
    else:
        cam = torch.einsum("fd,bdhw->bfhw", model.classifier.weight[:, :, 0, 0], last)
        if heads == "separate":
            pooled = torch.einsum("bhw,bdhw->bd", attention[:, 0], last)
            mil = pooled @ model.mil_classifier.weight.T + model.mil_classifier.bias
        else:
            mil = (attention * cam).sum((2, 3)) + model.mil_bias
    torch.testing.assert_close(out.cam, cam, **tight)
    torch.testing.assert_close(out.mil_logits, mil, **tight)
    assert ("mil_classifier.weight" in model.state_dict()) == (heads == "separate")
    assert ("mil_bias" in model.state_dict()) == (heads != "separate")


@pytest.mark.parametrize("heads", ["shared", "classwise", "additive"])
def test_the_evidence_map_sums_to_the_mil_logit(heads):
    """Attention times CAM, before clipping at 0 and division by its maximum, sums to the MIL logit."""
    model = drawn(build(evidence=heads, output_stride=8, cam_pool="linear")).eval()
    model.classifier.requires_grad_(False)
    out = model(pictures())
    weight = out.attention.flatten(2).softmax(2).view_as(out.attention)
    evidence = out.cam / out.cam[0, 0].numel() if heads == "additive" else weight * out.cam
    torch.testing.assert_close(evidence.sum((2, 3)) + model.mil_bias, out.mil_logits)
    positive = evidence.relu()
    expected = out.logits.sigmoid()[:, :, None, None] * positive / positive.amax((2, 3), keepdim=True).clamp_min(1e-30)
    heat = heat_maps(out, model.config, model.align_corners)["evidence"]
    torch.testing.assert_close(heat, expected.amax(1), rtol=1e-2, atol=1e-3)  # EPS in the denominator


def pooled_by_loop(cam, kind):
    """[B, F, h, w] -> [B, F], the formulas of ``ModelConfig.cam_pool`` on lists of floats."""

    def pool(values):
        n = len(values)
        soft = [math.log1p(math.exp(-abs(v))) + max(v, 0.0) for v in values]
        return {
            "relu": lambda: sum(max(v, 0.0) for v in values) / n,
            "softplus": lambda: sum(soft) / n,
            "gem": lambda: (sum(v**3 for v in soft) / n) ** (1 / 3),
            "lse": lambda: max(values) + math.log(sum(math.exp(v - max(values)) for v in values) / n),
            "topk": lambda: sum(sorted(values)[-max(1, n // 10) :]) / max(1, n // 10),
            "linear": lambda: sum(values) / n,
        }[kind]()

    return torch.tensor([[pool(channel.flatten().tolist()) for channel in one] for one in cam], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["relu", "softplus", "gem", "lse", "topk", "linear"])
def test_cam_pool(kind):
    """Maps of 117 and of 6 elements; and which pooling has a gradient where the CAM is nowhere positive."""
    model = drawn(build(cam_pool=kind, cam_scale=3.0, output_stride=8).double()).eval()
    prior = 0 if kind == "linear" else model.prior
    for size in ((65, 97), (9, 17)):
        out = model(pictures(2, *size).double())
        expected = 3 * pooled_by_loop(out.cam.detach(), kind) + prior
        torch.testing.assert_close(out.cam_logits, expected, rtol=1e-12, atol=1e-12)
    assert ("prior" in model.state_dict()) == (kind != "linear")

    cam = (-2 - torch.rand(2, 4, 9, 13, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(model._pool_cam(cam).sum(), cam)
    assert (gradient >= 0).all()
    fed = (gradient > 0).sum((2, 3))
    assert (fed == {"relu": 0, "topk": 11}.get(kind, 9 * 13)).all()


def test_confidence():
    """With absolute confidence, a picture without probability of a lesion stays empty; relative ignores the logits."""
    foreground = {}
    for confidence in ("absolute", "relative"):
        model = build(confidence=confidence, output_stride=8).eval()
        for prior in (0.0, -1000.0):
            model.prior.data.fill_(prior)
            with torch.no_grad():
                foreground[confidence, prior] = model(pictures()).refined_cam[:, 1:]
    assert (foreground["absolute", -1000.0] < 1e-6).all() and foreground["absolute", 0.0].max() > 0.2
    assert torch.equal(foreground["relative", -1000.0], foreground["relative", 0.0])
    assert foreground["relative", 0.0].max() > 0.5


class Drawn(torch.nn.Module):
    """A classifier whose CAM has both signs in every channel."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        shape = len(x), self.channels, *x.shape[2:]
        return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)


@pytest.mark.parametrize("targets", ["ordinal", "onehot", "referable"])
@pytest.mark.parametrize("cam_pool", ["relu", "softplus", "lse"])
def test_absolute_confidence_keeps_every_class(targets, cam_pool):
    """p_k · act_k / max act_k of each channel, independent of the others; the background is 1 minus the largest."""
    changes = {"refinement": (), "mask": "off", "evidence": "separate", "targets": targets, "cam_pool": cam_pool}
    model = drawn(build(**changes).double()).eval()
    model.classifier = Drawn(foreground_channels(model.config))
    out = model(pictures().double())
    logits = out.logits
    p = F.pad(logits, (1, 0)).softmax(1)[:, 1:] if targets == "onehot" else logits.sigmoid()
    act = torch.log1p(out.cam.exp()) if cam_pool == "softplus" else out.cam.clamp_min(0)
    foreground = p[:, :, None, None] * act / act.amax((2, 3), keepdim=True)
    if foreground.shape[1] > 1:
        assert ((foreground > 0.01).sum(1) > 1).any()  # relative confidence would keep only one
    torch.testing.assert_close(out.refined_cam[:, 1:], foreground, rtol=1e-3, atol=0)  # EPS in the denominator
    assert torch.equal(out.refined_cam[:, 0], 1 - out.refined_cam[:, 1:].amax(1))


@pytest.mark.parametrize("cam_pool", ["relu", "softplus"])
def test_relative_confidence_is_that_of_seam(cam_pool):
    changes = {"refinement": (), "mask": "off", "evidence": "separate", "confidence": "relative", "cam_pool": cam_pool}
    model = build(**changes).eval()
    model.classifier = Drawn(4)
    out = model(pictures())
    evidence = F.softplus(out.cam) if cam_pool == "softplus" else out.cam
    assert torch.equal(out.refined_cam, losses.normalize_cam(evidence))
    assert ((out.refined_cam[:, 1:] > 0).sum(1) <= 1).all()


@pytest.mark.parametrize(
    "backbone, stride, refine, grid",
    [
        ("test_resnet", 16, 0, (5, 7)),
        ("test_resnet", 16, 8, (9, 13)),
        ("test_resnet", 16, 4, (17, 25)),
        ("test_resnet", 8, 8, (9, 13)),
        ("test_resnet", 8, 1, (65, 97)),
        ("convnext_atto", 32, 4, (16, 24)),
    ],
)
def test_refine_stride(backbone, stride, refine, grid):
    """The affinity has its own grid, with the listed stages and the picture; mask and CAM stay on theirs."""
    config = {"backbone": backbone, "output_stride": stride, "refine_stride": refine}
    model = build(**config, refine_stages=(0, -2)).eval()
    image = pictures(2, 65, 97) if model.align_corners else pictures(2, 64, 96)
    out, (propagated, features, picture) = capture_propagated(model, image)
    assert out.refined_cam.shape == (2, 5, *grid) and propagated.shape[2:] == grid
    assert out.mask.shape[2:] == out.cam.shape[2:] == tuple(side // stride + model.align_corners for side in (64, 96))
    stages = models.stages(model.backbone, image)
    assert torch.equal(features[0], stages[0]) and torch.equal(features[1], stages[-2])
    if refine:
        torch.testing.assert_close(picture, resize(image, grid, model.align_corners, antialias=True))
    else:
        assert picture is image


def same_weights(model, **changes):
    """A network with other settings, and with the model's weights and mode."""
    other = ERCN(replace(model.config, **changes))
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


@pytest.mark.parametrize("refine_stride", [0, 4])
@pytest.mark.parametrize("size", [(65, 97), (64, 96)])
def test_the_refined_map_is_on_the_grid_of_its_last_refinement(refine_stride, size):
    """The grid of the CAM, of the affinity, or of the exact picture; PAMR is left out in training."""
    model = drawn(build(output_stride=8, refine_stride=refine_stride, pamr_steps=2)).eval()
    cam, affinity, picture = (9, 13), (17, 25) if refine_stride else (9, 13), (65, 97)
    grids = {
        (): (cam, cam),
        ("affinity",): (affinity, affinity),
        ("pamr",): (picture, cam),
        ("affinity", "pamr"): (picture, affinity),
    }
    seen = {}
    for refinement, (grid, trained) in grids.items():
        other = same_weights(model, refinement=refinement)
        seen[refinement] = other(pictures(2, *size)).refined_cam
        assert seen[refinement].shape == (2, 5, *grid)
        assert other.train()(pictures(2, *size)).refined_cam.shape == (2, 5, *trained)
        assert (seen[refinement] >= 0).all() and (seen[refinement] <= 1 + 1e-5).all()
        if not refinement or refinement[-1] == "pamr":
            assert torch.equal(seen[refinement][:, 0], 1 - seen[refinement][:, 1:].amax(1))
    assert not torch.equal(seen["pamr",], seen["affinity", "pamr"])


def test_pamr_is_left_out_while_training():
    model = drawn(build(output_stride=8)).train()
    image = pictures()
    lists = (), ("pamr",), ("affinity",), ("affinity", "pamr")
    refined = {names: same_weights(model, refinement=names)(image).refined_cam for names in lists}
    assert torch.equal(refined["pamr",], refined[()])
    assert torch.equal(refined["affinity", "pamr"], refined["affinity",])
    assert not torch.equal(refined["affinity",], refined[()])


@pytest.mark.parametrize("refinement", [("affinity",), ("affinity", "pamr")])
def test_without_refinement_the_map_is_the_masked_one(refinement, monkeypatch):
    model = drawn(build(output_stride=8, refinement=refinement)).eval()
    expected = same_weights(model, refinement=())(pictures())
    monkeypatch.setattr(models, "PixelAdaptiveRefinement", None)  # neither is called
    monkeypatch.setattr(model.refinement, "forward", None)
    out = model(pictures(), refine=False)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(out, name), value), name


@pytest.mark.parametrize("reach, steps", [(0.3, 20), (0.05, 3)])
def test_pamr_of_the_model(reach, steps, monkeypatch):
    """PAMR refines the masked CAM at the exact size; its distances are a share of the shorter side."""
    model = drawn(build(output_stride=8, refinement=("pamr",), pamr_reach=reach, pamr_steps=steps)).eval()
    made = []

    class Watched(models.PixelAdaptiveRefinement):
        def forward(self, cam, image):
            made.append((self, cam, image))
            return super().forward(cam, image)

    monkeypatch.setattr(models, "PixelAdaptiveRefinement", Watched)
    image = pictures(2, 64, 96)
    out = model(image)
    ((layer, cam, seen),) = made
    assert layer.dilations == ((1, 2, 4, 8, 16, 20) if reach == 0.3 else (1, 2, 3)) and layer.steps == steps
    torch.testing.assert_close(seen, resize(image, (65, 97), True))
    masked = model(image, refine=False).refined_cam[:, 1:]
    torch.testing.assert_close(cam, resize(masked, (65, 97), True))
    torch.testing.assert_close(out.refined_cam, losses.add_background(layer(cam, seen)))
    assert not out.refined_cam.requires_grad and not torch.equal(out.refined_cam[:, 1:], cam)


@pytest.mark.parametrize(
    "side, reach, expected",
    [(161, 0.3, [1, 2, 4, 8, 16, 32, 48]), (100, 0.32, [1, 2, 4, 8, 16, 32]), (10, 0.01, [1]), (20, 0.1, [1, 2])],
)
def test_dilations(side, reach, expected):
    assert models.dilations(side, reach) == expected


@pytest.mark.parametrize("name", ["elements", "models", "grad_checkpointing", "evaluation.calibration"])
def test_docstring_examples(name):
    module = importlib.import_module(f"ercn.{name}")
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("fusion", ["cam", "mil", "mean"])
def test_fusion(fusion):
    out = build(fusion=fusion).eval()(pictures())
    expected = {"cam": out.cam_logits, "mil": out.mil_logits, "mean": (out.cam_logits + out.mil_logits) / 2}
    assert torch.equal(out.logits, expected[fusion])


def test_without_mil():
    model = build(pool="none", fusion="cam").eval()
    out = model(pictures())
    assert out.mil_logits is None and out.attention is None and torch.equal(out.logits, out.cam_logits)
    assert not any(key.startswith(("pool", "mil")) for key in model.state_dict())


@pytest.mark.parametrize("targets, channels", [("ordinal", 3), ("onehot", 3), ("referable", 1)])
def test_foreground_channels(targets, channels):
    model = build(targets=targets, num_grades=4).eval()
    out = model(pictures())
    assert foreground_channels(model.config) == channels
    assert out.cam.shape[1] == out.logits.shape[1] == channels and out.refined_cam.shape[1] == 1 + channels


def capture_propagated(model, image):
    seen = []
    handle = model.refinement.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    out = model(image)
    handle.remove()
    return out, seen[0]


def test_patches_are_encoded_each_on_its_own():
    """With patches, the features are the means over every crop at its exact side, in the crop's place."""
    model = build(patch=32, output_stride=16).eval()
    assert model.align_corners is False
    image = pictures(h=64, w=96)
    out, (_, features, _) = capture_propagated(model, image)
    assert out.cam.shape[2:] == out.attention.shape[2:] == (2, 3)
    for row in range(2):
        for column in range(3):
            crop = image[:, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            low, mid, last = (x.mean((2, 3)) for x in model.backbone(resize(crop, (33, 33), True))[-3:])
            torch.testing.assert_close(out.cam[:, :, row, column], last @ model.classifier.weight[:, :, 0, 0].T)
            torch.testing.assert_close(features[0][:, :, row, column], low)
            torch.testing.assert_close(features[1][:, :, row, column], mid)
    old = ERCN(model.config, geometry=2).eval()  # exports from before patches were resized
    old.load_state_dict(model.state_dict())
    low = old.backbone(image[:, :, :32, :32])[-1].mean((2, 3)) @ model.classifier.weight[:, :, 0, 0].T
    torch.testing.assert_close(old(image).cam[:, :, 0, 0], low)
    assert not torch.allclose(out.cam[:, :, 0, 0], low, rtol=1e-3)
    with pytest.raises(ValueError, match="patches of 32 px need sides that are multiples of it; got 64 x 80 px"):
        model(pictures(h=64, w=80))
    with pytest.raises(ValueError, match="patch must be a multiple of output_stride 16, or 0; got 40"):
        build(patch=40)


def test_of_no_refinements_the_refined_map_is_the_masked_one():
    model = build(refinement=(), output_stride=8, confidence="relative").eval()
    out = model(pictures())
    confidence = losses.normalize_cam(out.cam)
    torch.testing.assert_close(out.refined_cam[:, 1:], out.mask * confidence[:, 1:])
    torch.testing.assert_close(out.refined_cam.detach()[:, 0], 1 - out.refined_cam.detach()[:, 1:].amax(1))
    assert model.state_dict().keys() == build().state_dict().keys()  # the refinement changes no weights


@pytest.mark.parametrize("mode", ["soft", "hard", "off"])
def test_spatial_mask(mode):
    thresholds = (0.2, 0.3, 0.4)
    model = build(mask=mode, output_stride=8, confidence="relative").eval()
    out, (propagated, _, _) = capture_propagated(model, pictures() * torch.linspace(0, 4, 97))
    confidence = losses.normalize_cam(out.cam)[:, 1:]
    largest = confidence.amax(1, keepdim=True)
    fraction = sum((largest >= t).float() for t in thresholds) / 3
    expected = {"soft": fraction, "hard": (largest >= 0.4).float(), "off": torch.ones_like(largest)}[mode]
    torch.testing.assert_close(out.mask, torch.ones_like(largest) if mode == "off" else fraction)
    if mode != "off":
        assert len(out.mask.unique()) == 4  # 0, 1/3, 2/3 and 1 all occur
    torch.testing.assert_close(propagated[:, 1:], expected * confidence)
    torch.testing.assert_close(propagated[:, :1], 1 - expected * largest)


def test_refinement_reads_the_two_stages_before_the_last_and_the_picture():
    model = build(backbone="resnet18", output_stride=16).eval()
    image = pictures()
    _, (_, features, picture) = capture_propagated(model, image)
    low, mid = model.backbone(image)[-3:-1]
    assert picture is image and torch.equal(features[0], low) and torch.equal(features[1], mid)
    assert [p.weight.shape[1] for p in model.refinement.projections] == [128, 256]


@pytest.mark.parametrize("detach", [True, False])
def test_detach(detach):
    model = build(detach=detach).eval()
    model(pictures()).refined_cam.square().sum().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "classifier" in reached or detach
    through_the_probability = {"pool", "mil_bias", "prior"}
    assert reached == {"refinement"} | (set() if detach else {"backbone", "classifier"} | through_the_probability)


def test_dropout_is_on_the_last_feature_map():
    model = build(dropout=0.5)
    torch.manual_seed(0)
    first, second = model(pictures()), model(pictures())
    assert not torch.equal(first.cam, second.cam) and not torch.equal(first.mil_logits, second.mil_logits)
    model.eval()
    assert torch.equal(model(pictures()).cam, model(pictures()).cam)


def test_blank_maps_stay_finite():
    model = build()
    torch.nn.init.zeros_(model.classifier.weight)
    out = model(pictures())
    assert (out.mask == 0).all() and (out.refined_cam[:, 1:] == 0).all()
    assert (out.refined_cam[:, 0] > 0.99).all()
    (out.refined_cam.sum() + out.logits.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def own_shapes(state):
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith("backbone.")}


def test_state_dict_keys_are_frozen():
    state = build().state_dict()
    low, mid, last = create_backbone("test_resnet", 16).feature_info.channels()[-3:]
    assert own_shapes(state) == {
        "prior": (4,),
        "classifier.weight": (4, last, 1, 1),
        "refinement.projections.0.weight": (64, low, 1, 1),
        "refinement.projections.1.weight": (128, mid, 1, 1),
        "refinement.embed.weight": (16, 195, 1, 1),
        "pool.v_weight": (8, last),
        "pool.v_bias": (8,),
        "pool.u_weight": (8, last),
        "pool.u_bias": (8,),
        "pool.w_weight": (1, 8),
        "pool.w_bias": (1,),
        "mil_bias": (4,),
    }
    shared = own_shapes(state)
    changed = {
        "separate": {"mil_classifier.weight": (4, last), "mil_classifier.bias": (4,)},
        "classwise": {"mil_bias": (4,), "pool.w_weight": (4, 8), "pool.w_bias": (4,)},
        "additive": {
            "mil_bias": (4,),
            "classifier.0.weight": (8, last, 1, 1),
            "classifier.0.bias": (8,),
            "classifier.2.weight": (4, 8, 1, 1),
        },
    }
    for evidence, own in changed.items():
        kept = shared.keys() - {"mil_bias"} - ({"classifier.weight"} if evidence == "additive" else set())
        assert own_shapes(build(evidence=evidence).state_dict()) == {key: shared[key] for key in kept} | own
    plain = build(pool="plain").state_dict()
    assert set(state) - set(plain) == {"pool.u_weight", "pool.u_bias"} and set(plain) <= set(state)


def test_backbone_keys_do_not_depend_on_the_stride():
    model = build(output_stride=8)
    backbone = create_backbone("test_resnet", 32)
    torch.nn.init.ones_(next(backbone.parameters()))
    model.backbone.load_state_dict(backbone.state_dict())
    assert (next(model.backbone.parameters()) == 1).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"backbone": "resnet999"}, "unknown backbone 'resnet999'"),
        (
            {"backbone": "test_mambaout", "output_stride": 8},
            "'test_mambaout' does not support output_stride 8; it supports 32",
        ),
        ({"backbone": "test_vit", "output_stride": 32}, "'test_vit' does not support output_stride 32; it supports 16"),
        ({"output_stride": 64}, "'test_resnet' does not support output_stride 64; it supports 8, 16, 32"),
        (
            {"backbone": "convnext_atto", "output_stride": 16},
            "'convnext_atto' does not support output_stride 16; it supports 32",
        ),
        ({"pool": "none"}, "fusion must be 'cam' but is 'mean'"),
        (
            {"pool": "none", "fusion": "cam", "evidence": "additive"},
            "evidence 'additive' is what attention makes of the features: pool must not be 'none'",
        ),
        ({"cam_scale": 0.0}, "cam_scale must be above 0; got 0.0"),
        ({"refine_stride": -4}, "refine_stride must be at least 0; got -4"),
        ({"refine_stride": 3}, "refine_stride must divide output_stride 16, or be 0; got 3"),
        ({"refine_stride": 32}, "refine_stride must divide output_stride 16, or be 0; got 32"),
        ({"patch": 32, "refine_stride": 4}, "finer than the patches: it must be 0 with patch > 0"),
        (
            {"refine_stages": (0, 5)},
            r"refine_stages must be among the 5 stages of test_resnet, 0 to 4 or negative; got \[0, 5\]",
        ),
        ({"refine_stages": (-6, 0)}, r"among the 5 stages of test_resnet, 0 to 4 or negative; got \[-6, 0\]"),
        ({"num_grades": 1}, "targets 'ordinal' need num_grades >= 2; got 1"),
        ({"num_grades": 2, "targets": "referable"}, "targets 'referable' need num_grades >= 3; got 2"),
    ],
)
def test_configuration_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("backbone, stride", [("test_mambaout", 32), ("test_vit", 16), ("test_efficientnet", 16)])
def test_other_kinds_of_feature_extractor(backbone, stride):
    """Channels-last stages, a single-resolution transformer, and a network whose features have no layout attribute."""
    model = build(backbone=backbone, output_stride=stride).eval()
    out = model(pictures(1, 160, 160))
    assert model.align_corners == (backbone != "test_vit")
    assert out.cam.shape == (1, 4, *[160 // stride + model.align_corners] * 2)


def test_channels_last_and_odd_sizes():
    model = build().eval()
    image = pictures(1, 71, 93)
    expected = model(image)
    out = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
    for name in ("logits", "cam", "refined_cam", "attention"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_autocast():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = ercn_loss(
            model, pictures(), torch.tensor([0, 3]), SMALL, replace(WHOLE, min_pool=1.0), Rescale(0.5)
        )
        out = model(pictures())
    assert total.dtype == out.refined_cam.dtype == torch.float32 and all(t.isfinite() for t in terms.values())
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(backend):
    torch.compiler.reset()
    model = build().eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out, expected = compiled(pictures()), model(pictures())
    for name in expected._fields:
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    expected.refined_cam.sum().backward()
    want = model.refinement.embed.weight.grad.clone()
    model.zero_grad()
    out.refined_cam.sum().backward()
    torch.testing.assert_close(model.refinement.embed.weight.grad, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"pool": "none", "fusion": "cam"}])
def test_export(changes):
    model = build(**changes).eval()
    program = torch.export.export(model, (pictures(),))
    out, expected = program.module()(pictures()), model(pictures())
    for a, e in zip(out, expected):
        assert (a is None and e is None) or torch.allclose(a, e, rtol=1e-4, atol=1e-5)


def test_targets():
    grade = torch.tensor([0, 1, 2, 4])
    ordinal = targets_from_grades(grade, SMALL)
    assert ordinal.dtype == torch.float32
    assert ordinal.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    onehot = targets_from_grades(grade, replace(SMALL, targets="onehot"))
    assert onehot.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert targets_from_grades(grade, replace(SMALL, targets="referable")).tolist() == [[0], [0], [1], [1]]


@pytest.mark.parametrize("targets, columns", [("ordinal", 5), ("onehot", 5), ("referable", 2)])
def test_probabilities(targets, columns):
    config = replace(SMALL, targets=targets)
    logits = 5 * torch.randn(50, foreground_channels(config), generator=torch.Generator().manual_seed(0))
    p = grade_probabilities(logits, config)
    assert p.shape == (50, columns) and (p >= 0).all()
    torch.testing.assert_close(p.sum(1), torch.ones(50))
    assert grade_probabilities(logits.bfloat16(), config).dtype == torch.float32
    assert grade_probabilities(logits.double(), config).dtype == torch.float64


def test_probabilities_by_hand():
    logit = torch.logit(torch.tensor([[0.9, 0.6, 0.7, 0.1]]))  # P(grade >= 3) may not exceed P(grade >= 2)
    expected = torch.tensor([[0.1, 0.3, 0.0, 0.5, 0.1]])
    torch.testing.assert_close(grade_probabilities(logit, SMALL), expected)
    p = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]])
    logits = (p[:, 1:] / p[:, :1]).log()
    torch.testing.assert_close(grade_probabilities(logits, replace(SMALL, targets="onehot")), p)
    referable = grade_probabilities(torch.logit(torch.tensor([[0.3]])), replace(SMALL, targets="referable"))
    torch.testing.assert_close(referable, torch.tensor([[0.7, 0.3]]))
    for targets in ("ordinal", "onehot"):  # certain targets give their grade back
        config = replace(SMALL, targets=targets)
        grade = torch.arange(5)
        certain = 20 * (2 * targets_from_grades(grade, config) - 1)
        assert torch.equal(grade_probabilities(certain, config).argmax(1), grade)


EVERY_TERM = LossConfig(er=0.5, ecr=2.0, consistency=0.25, min_pool=3.0)


@pytest.mark.parametrize("kind", ["rescale", "flip", "rot90", "translate", "affine", "none"])
@pytest.mark.parametrize("size", [(64, 96), (81, 81)])
def test_loss_is_the_weighted_sum_of_its_terms(kind, size):
    model = build()
    image, grade = pictures(3, *size), torch.tensor([0, 2, 4])
    transform = sample_transform(kind, torch.Generator().manual_seed(0), size=size, align_corners=True)
    total, terms = ercn_loss(model, image, grade, SMALL, EVERY_TERM, transform, weight_scale=0.5)
    assert list(terms) == ["cls", "er", "ecr", "consistency", "min_pool"]
    assert all(t.isfinite() and t > 0 and not t.requires_grad for t in terms.values())
    others = 0.5 * terms["er"] + 2 * terms["ecr"] + 0.25 * terms["consistency"] + 3 * terms["min_pool"]
    expected = terms["cls"] + 0.5 * others
    torch.testing.assert_close(total.detach(), expected)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [{}, {"refine_stride": 4, "refine_stages": (0, 1)}, {"refine_stride": 8, "cam_pool": "softplus"}],
    ids=str,
)
@pytest.mark.parametrize("scaled", [True, False])
def test_loss_terms_from_the_outputs(scaled, changes):
    """Each term recomputed from the outputs of the two views, for a flip (whose maps need no resizing).

    A refined CAM on a finer grid is compared on the CAM's grid; min-pooling takes the finer grid.
    """
    model = build(**changes).eval()
    image, grade = pictures(), torch.tensor([1, 3])
    transform = Flip(3)
    _, terms = ercn_loss(model, image, grade, model.config, replace(EVERY_TERM, scale_refined=scaled), transform)
    one, two = model(image), model(image.flip(3))
    label = targets_from_grades(grade, SMALL)
    fg = label[:, :, None, None]
    every = torch.cat([torch.ones(2, 1, 1, 1), fg], 1)

    def bce(logits):
        return torch.nn.functional.multilabel_soft_margin_loss(logits, label)

    torch.testing.assert_close(
        terms["cls"], (bce(one.cam_logits) + bce(one.mil_logits) + bce(two.cam_logits) + bce(two.mil_logits)) / 4
    )
    active = F.softplus if "cam_pool" in changes else F.relu
    cam1, cam2 = (losses.max_norm(active(x.cam)) * fg for x in (one, two))
    refined1, refined2 = (resize(x.refined_cam, x.cam.shape[2:], True, antialias=True) for x in (one, two))
    assert (refined1 is one.refined_cam) == (not changes)
    if scaled:
        refined1, refined2 = losses.max_norm(refined1), losses.max_norm(refined2)
    refined1, refined2 = refined1 * every, refined2 * every
    torch.testing.assert_close(terms["er"], (cam1.flip(3) - cam2).abs().mean())
    torch.testing.assert_close(
        terms["ecr"], losses.equivariant_cross_loss(cam1.flip(3), refined1.flip(3), cam2, refined2)
    )
    consistency = [
        losses.refinement_consistency(losses.add_background(cam), refined, view.mask, eps=EVERY_TERM.consistency_eps)
        for cam, refined, view in ((cam1, refined1, one), (cam2, refined2, two))
    ]
    torch.testing.assert_close(terms["consistency"], sum(consistency) / 2)
    min_pool = [losses.min_pooling_loss(view.refined_cam[:, 1:] * fg) for view in (one, two)]
    torch.testing.assert_close(terms["min_pool"], sum(min_pool) / 2)


def test_the_floor_under_the_logarithm_bounds_the_gradient_of_h():
    """A CAM value just above 0 where the refined CAM is 1: the gradient is at most 1 / eps."""
    refined, mask = torch.ones(1, 2, 1, 1), torch.ones(1, 1, 1, 1)
    for eps in (1e-10, 0.1):
        cam = torch.full((1, 2, 1, 1), 1e-9, requires_grad=True)
        losses.refinement_consistency(cam, refined, mask, eps=eps).backward()
        torch.testing.assert_close(cam.grad, torch.full_like(cam, -1 / (1e-9 + eps)))


def test_one_view_is_chikontwe():
    model = build(pool="none", fusion="cam").eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    image, grade = pictures(), torch.tensor([1, 3])
    loss_config = replace(WHOLE, ecr=0.0, transform="none", scale_refined=True)
    _, terms = ercn_loss(model, image, grade, model.config, loss_config, Identity())
    assert len(calls) == 1 and list(terms) == ["cls", "er", "consistency"]
    out = model(image)
    fg = targets_from_grades(grade, SMALL)[:, :, None, None]
    difference = (losses.max_norm(out.cam) * fg - losses.max_norm(out.refined_cam)[:, 1:] * fg).abs().mean()
    torch.testing.assert_close(terms["er"], difference)


def test_gradients_reach_what_each_term_trains():
    def reached(one_view=False, **weights):
        model, transform = build(), Identity() if one_view else Flip(3)
        off = {"cls": 0.0, "er": 0.0, "ecr": 0.0, "consistency": 0.0, "min_pool": 0.0}
        total, _ = ercn_loss(model, pictures(), torch.tensor([2, 4]), SMALL, LossConfig(**off | weights), transform)
        total.backward()
        return {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    assert reached(cls=1.0) == {"backbone", "classifier", "prior", "pool", "mil_bias"}
    assert reached(er=1.0) == {"backbone", "classifier"}
    assert reached(one_view=True, er=1.0) == {"backbone", "classifier", "refinement"}
    assert reached(ecr=1.0) == reached(min_pool=1.0) == {"refinement"}
    assert reached(consistency=1.0) == {"backbone", "classifier"}
    assert reached(consistency=1.0, detach_refined=False) == {"backbone", "classifier", "refinement"}


@pytest.mark.parametrize(
    "transform, weights, count",
    [
        (Flip(3), {"er": 1.0}, 0),
        (Identity(), {"er": 1.0}, 1),
        (Flip(3), {"ecr": 1.0}, 2),
        (Flip(3), {"min_pool": 1.0}, 2),
        (Identity(), {"consistency": 1.0}, 1),
    ],
    ids=str,
)
def test_a_step_refines_only_where_a_term_reads_it(transform, weights, count):
    model, calls = build(), []
    model.refinement.register_forward_pre_hook(lambda *_: calls.append(1))
    ercn_loss(model, pictures(), torch.tensor([2, 4]), SMALL, LossConfig(**{"er": 0.0} | weights), transform)
    assert len(calls) == count


def test_grade_0_has_no_foreground():
    model = build()
    grade = torch.zeros(2, dtype=torch.long)
    loss_config = replace(EVERY_TERM, consistency_eps=1e-10)
    _, terms = ercn_loss(model, pictures(), grade, SMALL, loss_config, Flip(2))
    assert terms["er"] == 0 and terms["min_pool"] == 0 and abs(terms["consistency"]) < 1e-6


def test_class_weights_scale_the_pictures_of_a_grade():
    model = build().eval()
    image, grade = pictures(3), torch.tensor([0, 2, 2])
    weight = torch.tensor([4.0, 1.0, 0.5, 1.0, 1.0])

    def cls(chosen, **kwargs):
        only = LossConfig(er=0.0, ecr=0.0, consistency=0.0)
        return ercn_loss(model, image[chosen], grade[chosen], SMALL, only, Identity(), **kwargs)[0].item()

    parts = [cls([i]) * weight[grade[i]].item() for i in range(3)]
    assert cls([0, 1, 2], class_weight=weight) == pytest.approx(sum(parts) / 3, rel=1e-5)
    with pytest.raises(ValueError, match=r"one weight for each of the 5 grades; got shape \[4\]"):
        cls([0], class_weight=weight[:4])


def test_training_learns():
    """A few steps under the whole objective teach whether there is a bright square."""
    torch.manual_seed(0)
    image = 0.1 * torch.randn(8, 3, 64, 64)
    grade = torch.tensor([0, 3] * 4)
    image[1::2, :, 16:32, 32:48] += 2
    config = replace(SMALL, output_stride=8, num_grades=4)
    model = ERCN(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        total, _ = ercn_loss(model, image, grade, config, WHOLE, Flip(3))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(grade_probabilities(model(image).logits, config).argmax(1), grade)


# Fields that a preset sets; "ercn" has the defaults, and all other fields equal them. For the demo only the names.
NO_MIL = {"pool": "none", "fusion": "cam"}
OF_SEAM = {"cam_pool": "linear", "cam_scale": 10.0, "center": False, "confidence": "relative"}
OF_SEAM |= {"refinement": ("affinity",), "steps": 1, "refine_stride": 0, "detach": True}
ONE_VIEW = {"er": 1.0, "ecr": 0.0, "consistency": 1.0, "min_pool": 0.0, "transform": "none"}
TWO_VIEWS = {"er": 0.2, "ecr": 1.0, "consistency": 0.0, "min_pool": 1.0, "transform": "rescale", "rescale": 0.3}
PRESETS = {
    "ercn": {},
    "seam": {
        "model": OF_SEAM | NO_MIL | {"output_stride": 8, "embed_dim": 192, "mask": "off", "dropout": 0.5},
        "loss": {"cls": 1.0, **TWO_VIEWS, "scale_refined": True, "hard_fraction": 0.84, "warmup_epochs": 0},
        "run": {"out": "runs/seam", "freeze_batchnorm": True},
    },
    "chikontwe": {
        "model": OF_SEAM | NO_MIL | {"embed_dim": 64, "mask": "hard", "mask_thresholds": (0.2, 0.3, 0.4)},
        "loss": {"cls": 1.0, **ONE_VIEW, "consistency_eps": 1e-10, "scale_refined": True, "detach_refined": False}
        | {"warmup_epochs": 0},
        "run": {"out": "runs/chikontwe"},
    },
    "demo": {
        "data": {"image_size"},
        "model": {"backbone", "output_stride", "embed_dim"},
        "run": {"out", "epochs", "lr"},
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    chosen, base = dataclasses.asdict(preset(name)), dataclasses.asdict(TrainConfig())
    assert chosen["init"] is None
    for section in ("data", "model", "loss", "run"):
        own = PRESETS[name].get(section, {})
        if isinstance(own, dict):
            assert {key: chosen[section][key] for key in own} == own
        differing = {key for key in base[section] if chosen[section][key] != base[section][key]}
        assert differing <= set(own)
    check_losses(preset(name))  # raises nothing
    text = (importlib.resources.files("ercn") / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    assert {k: set(v) if isinstance(v, dict) else v for k, v in written.items()} == {
        k: set(v) if isinstance(v, dict) else v for k, v in base.items()
    }


def test_every_preset_is_tested():
    folder = importlib.resources.files("ercn") / "configs"
    assert {file.name for file in folder.iterdir() if not file.is_dir()} == {f"{name}.yaml" for name in PRESETS}


@pytest.mark.parametrize("name, weight", [("ecr", 0.5), ("min_pool", 2.0)])
@pytest.mark.parametrize("refinement", [(), ("pamr",)])
def test_a_loss_that_could_teach_nothing_is_refused(name, weight, refinement):
    """With the gradient stopped, these terms train only the embedding of an affinity."""
    others = LossConfig(er=1.0, ecr=0.0, consistency=1.0, min_pool=0.0)
    config = TrainConfig(model=replace(SMALL, refinement=refinement), loss=replace(others, **{name: weight}))
    assert config.model.detach
    with pytest.raises(ValueError) as error:
        check_losses(config)
    assert str(error.value) == (
        f"loss.{name} is {weight}, but it trains the embedding of the affinity, which model.refinement "
        f"{list(refinement)} does not have; set it to 0 or add the affinity"
    )
    check_losses(replace(config, loss=others))
    check_losses(replace(config, model=replace(config.model, detach=False)))
    check_losses(replace(config, model=replace(config.model, refinement=("affinity", *refinement))))


def test_pictures_that_patches_do_not_fill_are_refused():
    config = TrainConfig(model=replace(SMALL, patch=32), data=configs.DataConfig(image_size=161))
    message = "data.image_size must be a multiple of model.patch 32; got 161, next to it is 160"
    with pytest.raises(ValueError, match=message):
        check_patches(config)
    check_patches(replace(config, data=configs.DataConfig(image_size=160)))
    check_patches(replace(config, model=SMALL))


@pytest.mark.parametrize("name, taught", [("ercn", False), ("demo", False), ("seam", True), ("chikontwe", True)])
def test_presets_train(name, taught):
    recipe = preset(name)
    model_config = replace(recipe.model, backbone="test_resnet")
    model = ERCN(model_config)
    transform = sample_transform(
        recipe.loss.transform, None, rescale=recipe.loss.rescale, size=97, align_corners=model.align_corners
    )
    total, _ = ercn_loss(model, pictures(2, 97, 97), torch.tensor([1, 4]), model_config, recipe.loss, transform)
    total.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}  # the embedding, which no loss trains
    affinity = {name for name, _ in model.named_parameters() if name.startswith("refinement.")}
    assert without == (set() if taught else affinity)
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name not in without)


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'sesm'; there are chikontwe, demo, ercn, seam"):
        preset("sesm")


@pytest.mark.parametrize(
    "cls",
    [configs.TrainConfig, configs.PretrainConfig, configs.PrepareConfig, configs.EvaluateConfig, configs.PredictConfig],
)
def test_from_dict_inverts_asdict(cls):
    config = cls()
    assert from_dict(cls, dataclasses.asdict(config)) == config
    assert from_dict(cls, yaml.safe_load(yaml.safe_dump(_lists(dataclasses.asdict(config))))) == config
    assert from_dict(cls, {}) == config


def _lists(value):
    """As YAML and JSON hold it: tuples become lists."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def test_from_dict_converts():
    config = from_dict(TrainConfig, {"model": {"mask_thresholds": [0.5, 1]}, "run": {"lr": 1}, "init": "runs/x"})
    assert config.model.mask_thresholds == (0.5, 1.0) and isinstance(config.run.lr, float) and config.init == "runs/x"
    assert from_dict(TrainConfig, {"model": SMALL}).model is SMALL


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modle": {}}, "unknown key modle; TrainConfig has data, model, loss, run, init"),
        ({"run": {"epoch": 3}}, r"unknown key run\.epoch; RunConfig has out, resume"),
        ({"model": 3}, "model must be a mapping of ModelConfig's fields; got 3"),
        ({"model": {"pool": "max"}}, r"model\.pool must be one of 'gated', 'plain', 'none'; got 'max'"),
        ({"model": {"mask": False}}, r"model\.mask must be one of 'soft', 'hard', 'off'; got False"),
        ({"model": {"mask_thresholds": 0.3}}, r"model\.mask_thresholds must be a list; got 0\.3"),
        ({"model": {"mask_thresholds": [0.3, "a"]}}, r"model\.mask_thresholds\[1\] must be float; got 'a'"),
        ({"run": {"lr": "1e-3"}}, r"run\.lr must be float; got '1e-3'"),
        ({"run": {"epochs": 2.5}}, r"run\.epochs must be int; got 2\.5"),
        ({"run": {"epochs": True}}, r"run\.epochs must be int; got True"),
        ({"run": {"resume": 1}}, r"run\.resume must be bool; got 1"),
        ({"init": 3}, "init must be str; got 3"),
        ({"run": {"epochs": 0}}, r"run\.epochs must be at least 1; got 0"),
        ({"run": {"lr": float("nan")}}, r"run\.lr must be at least 0; got nan"),
        ({"data": {"workers": -1}}, r"data\.workers must be at least 0; got -1"),
        ({"loss": {"rescale": 2.0}}, r"loss\.rescale must be above 0 and at most 1; got 2\.0"),
        ({"model": {"mask_thresholds": [0.3, 3]}}, r"model\.mask_thresholds must be .* at most 1; got \(0\.3, 3\.0\)"),
        ({"model": {"mask_thresholds": []}}, r"model\.mask_thresholds must have at least one entry"),
    ],
)
def test_from_dict_errors(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)
    with pytest.raises(ValueError, match="fractions must have 3 entries"):
        from_dict(configs.PrepareConfig, {"fractions": [0.5, 0.5]})


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (configs.RunConfig, {"epochs": "many"}, "epochs must be a number at least 1; got 'many'"),
        (configs.RunConfig, {"epochs": None}, "epochs must be a number at least 1; got None"),
        (configs.RunConfig, {"lr": (0.1,)}, r"lr must be a number at least 0; got \(0.1,\)"),
        (configs.EvaluateConfig, {"scales": [1.0]}, r"scales must be a tuple of numbers above 0; got \[1.0\]"),
        (configs.RunConfig, {"ema": 1.0}, "ema must be at least 0 and below 1; got 1.0"),
        (configs.PretrainConfig, {"momentum": 2}, "momentum must be at least 0 and at most 1; got 2"),
        (configs.PrepareConfig, {"fractions": (1.0, -0.1, 0.1)}, r"fractions must be at least 0; got \(1.0, .*"),
        (configs.PredictConfig, {"scales": (0.5,)}, r"scales must have 1, .*; got \(0.5,\)"),
    ],
)
def test_ranges_hold_in_python_too(cls, values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        cls(**values)
    assert configs.PretrainConfig(momentum=None).momentum is None


def test_layers_import_without_timm():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import ercn.nn, ercn.losses, ercn.transforms, ercn.models\n"
        "try: ercn.models.create_backbone('resnet18', 32)\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "ercn.models needs timm: pip install 'ercn[train]'"
