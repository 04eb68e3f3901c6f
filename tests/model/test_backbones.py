"""Families of backbones: each trains, its elements lie in their places, and wrong arguments raise one sentence."""

import copy
import json
import re
import shlex
from dataclasses import replace

import _ranks
import _steps
import pytest
import torch
from _stubs import info_of
from torch import nn

from ercn import cli
from ercn.checkpoint import load_model, save_model
from ercn.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    PrepareConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
    from_dict,
)
from ercn.data import prepare
from ercn.elements import CentredConv2d, centre
from ercn.grad_checkpointing import checkpoint_blocks
from ercn.models import ERCN, check_side, create_backbone, stages
from ercn.objective import ercn_loss
from ercn.training import planning
from ercn.training.fit import check_size
from ercn.training.planning import footprint
from ercn.training.pretraining import Contrastive, pretrain
from ercn.transforms import Flip

SMALL = ModelConfig(embed_dim=8, pool_dim=8, refinement=("affinity",))
SWIN = {"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
MAXVIT = {"embed_dim": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "stem_width": 16}
EDGENEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "heads": [2, 2, 2, 2]}
# name, output stride, arguments, an exact side of the picture, aligned corners
FAMILIES = {
    "resnet": ("resnet18", 16, {}, 65, True),
    "convnext": ("convnext_atto", 32, {}, 64, False),
    "regnety": ("regnety_002", 16, {}, 65, True),
    "efficientnet": ("efficientnet_b0", 16, {}, 65, True),
    "mobilenet": ("mobilenetv3_small_050", 16, {}, 65, True),
    "nfnet": ("test_nfnet", 16, {}, 65, True),
    "edgenext": ("edgenext_xx_small", 32, EDGENEXT, 96, False),
    "swin": ("swin_tiny_patch4_window7_224", 32, SWIN | {"img_size": 96}, 96, False),
    "swin_v2_cr": ("swinv2_cr_tiny_ns_224", 32, SWIN | {"img_size": 96}, 96, False),
    "swin, any size": ("swin_tiny_patch4_window7_224", 32, SWIN | {"strict_img_size": False}, 128, False),
    "vit": ("vit_tiny_patch16_224", 16, VIT | {"img_size": 64}, 64, False),
    "vit, any size": ("vit_tiny_patch16_224", 16, VIT | {"dynamic_img_size": True}, 96, False),
    "vit of 14": ("vit_small_patch14_dinov2", 14, VIT | {"img_size": 56, "out_indices": [0, 1, 3]}, 56, False),
    "maxvit": ("maxvit_rmlp_pico_rw_256", 32, MAXVIT | {"img_size": 96}, 96, False),
    "maxvit_tf": ("maxvit_tiny_tf_224", 32, MAXVIT | {"img_size": 64}, 64, False),
}


def model_of(family, **changes):
    name, stride, kwargs, _, _ = FAMILIES[family]
    torch.manual_seed(0)
    return ERCN(replace(SMALL, backbone=name, output_stride=stride, backbone_kwargs=kwargs, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family(family):
    """A step lowers the loss, every weight of the backbone gets a gradient, and recomputed blocks change no bit."""
    _, stride, _, side, corners = FAMILIES[family]
    model = model_of(family).train()
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    saving = copy.deepcopy(model)
    checkpoint_blocks(saving.backbone)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for network in (model, saving):
        torch.manual_seed(3)
        loss, _ = ercn_loss(network, image, torch.tensor([1, 3]), network.config, LossConfig(), Flip(3))
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] and model.align_corners is corners
    for (name, p), q in zip(model.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (name.startswith("refinement.")), name  # no loss reads it
        assert p.grad is None or torch.equal(p.grad, q.grad) and p.grad.isfinite().all(), name
    optimizer.step()
    loss, _ = ercn_loss(model, image, torch.tensor([1, 3]), model.config, LossConfig(), Flip(3))
    assert float(loss.detach()) < losses[0]
    out = model.eval()(image)
    assert out.cam.shape[2:] == (side // stride + corners,) * 2


def symmetric(backbone):
    """Symmetric kernels and no position codes, so that only the geometry can break a symmetry."""
    for key, parameter in backbone.named_parameters():
        kernel = parameter.data
        if "pos" in key:
            kernel.zero_()
        elif kernel.ndim == 4:
            kernel = kernel + kernel.flip(2)
            kernel = kernel + kernel.flip(3)
            parameter.data = kernel + kernel.transpose(2, 3)
    return backbone.double().eval()


@pytest.mark.parametrize("geometry, turns", [(4, True), (3, False)])
@pytest.mark.parametrize("family", ["edgenext", "vit", "maxvit", "maxvit_tf"])
def test_turned_pictures_have_turned_maps(family, geometry, turns):
    """MaxViT's maps did not turn with geometry 3 of older exports: its strided kernels lay beside its windows."""
    name, stride, kwargs, side, _ = FAMILIES[family]
    turns |= not family.startswith("maxvit")
    torch.manual_seed(0)
    backbone = symmetric(create_backbone(name, stride, kwargs=kwargs, geometry=geometry))
    assert backbone.align_corners is False
    image = torch.randn(1, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        maps = stages(backbone, image)
        for move in (lambda x: x.flip(3), lambda x: x.rot90(1, (2, 3))):
            errors = [(a - move(b)).abs().max() / b.std() for a, b in zip(stages(backbone, move(image)), maps)]
            assert (max(errors) < 1e-9) == turns, errors
            assert turns or errors[-1] > 0.1


@pytest.mark.parametrize(
    "kernel, stride, groups, bias", [(3, 2, 1, True), (3, 2, 6, False), (1, 2, 1, True), (7, 4, 1, False)]
)
def test_a_centred_convolution(kernel, stride, groups, bias):
    """The mean of the convolution on the picture and on the picture moved by a pixel down, right, and both."""
    network = nn.Sequential(
        nn.Conv2d(6, 12, kernel, stride, kernel // 2, groups=groups, bias=bias, dtype=torch.float64)
    )
    plain = copy.deepcopy(network[0])
    keys = list(network.state_dict())
    assert centre(network) is network and type(network[0]) is CentredConv2d and list(network.state_dict()) == keys
    x = torch.randn(2, 6, 16, 24, dtype=torch.float64)
    edge = (kernel + 1 - stride) // 2
    padded = nn.functional.pad(x, (edge,) * 4)
    moved = [padded[:, :, i : padded.shape[2] - 1 + i, j : padded.shape[3] - 1 + j] for i in (0, 1) for j in (0, 1)]
    plain.padding = (0, 0)
    expected = sum(plain(y) for y in moved) / 4
    assert expected.shape[2:] == (16 // stride, 24 // stride)
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-12)
    others = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 2, 2), nn.Conv2d(3, 3, (3, 1), 2))
    assert [type(layer) for layer in centre(others)] == [nn.Conv2d] * 3


def test_what_is_measured_depends_on_the_arguments():
    """A stem that overlaps its patches, and a ViT with other patches: the name alone does not decide."""

    def centred(backbone):
        return [type(m) for m in backbone.modules()].count(CentredConv2d)

    plain = {}
    for overlap in (0, 2, 0):
        backbone = create_backbone("test_convnext", 32, kwargs={"stem_type": "overlap"} if overlap else plain)
        assert backbone.align_corners is False and centred(backbone) == overlap
    coarse = create_backbone("vit_tiny_patch16_224", 32, kwargs=VIT | {"patch_size": 32})
    assert coarse.feature_info.reduction() == [32, 32, 32]
    assert stages(coarse, torch.zeros(1, 3, 224, 224))[0].shape[2:] == (7, 7)


@pytest.mark.parametrize("name, stride, kwargs, side, parts", [
    ("vit_tiny_patch16_224", 16, VIT, 256, [
        "backbone 'vit_tiny_patch16_224' does not take pictures of 256 x 240 px (Input height (256) doesn't match",
        "as it is built, it takes 224 x 224 px: give pictures of that size (data.image_size 224), or backbone_kwargs ",
        '{"img_size": [256, 240]}, or {"dynamic_img_size": true} for all sides that are multiples of 16',
    ]),
    ("vit_tiny_patch16_224", 16, VIT | {"dynamic_img_size": True}, 250, [
        "does not take pictures of 250 x 234 px",
        'it takes sides that are multiples of 16: give backbone_kwargs {"img_size": [256, 240]}',
    ]),
    ("swinv2_cr_tiny_ns_224", 32, SWIN | {"img_size": 96}, 128, [
        "does not take pictures of 128 x 112 px",
        "it takes 96 x 96 px: give pictures of that size (data.image_size 96), or",
    ]),
    ("maxvit_rmlp_pico_rw_256", 32, MAXVIT | {"img_size": 96}, 128, [
        "does not take pictures of 128 x 112 px (height (32) must be divisible by window (3)); as it is built",
    ]),
    ("coatnet_pico_rw_224", 32, {"img_size": 64}, 96, [  # which does not check it itself
        "does not take pictures of 96 x 80 px",
        "it takes 64 x 64 px: give pictures of that size (data.image_size 64), or",
    ]),
])  # fmt: skip
def test_a_picture_of_another_size_is_a_sentence(name, stride, kwargs, side, parts):
    backbone = create_backbone(name, stride, kwargs=kwargs).eval()
    with pytest.raises(ValueError) as error:
        stages(backbone, torch.zeros(1, 3, side, side - 16))
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_other_errors_of_a_backbone_stay_what_they_are():
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        stages(create_backbone("test_resnet", 16), torch.zeros(1, 4, 65, 65))


@pytest.mark.parametrize("kwargs, message", [
    ({"img_sze": 64}, r"backbone_kwargs {'img_sze': 64} are not what timm builds 'vit_tiny_patch16_224' with .*_sze"),
    ({"img_size": [1, 2, 3]}, r"are not what timm builds 'vit_tiny_patch16_224' with \(.*\); it takes img_size, "),
    ({"depth": "many"}, r"with \(unsupported operand .*\); it takes img_size, patch_size, .*dynamic_img_size"),
    ({"output_stride": 8, "in_chans": 1}, "backbone_kwargs must not have output_stride, in_chans: ercn itself sets "),
])  # fmt: skip
def test_arguments_that_timm_does_not_take(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        ERCN(replace(SMALL, backbone="vit_tiny_patch16_224", backbone_kwargs=kwargs))
    assert "; it takes" not in str(error.value) or "num_classes" not in str(error.value)


@pytest.mark.parametrize("name, lists", [
    ("resnet18", "drop_path_rate"), ("regnety_002", "se_ratio"), ("maxvit_rmlp_pico_rw_256", "stem_width"),
    ("mobilenetv3_small_050", "drop_rate"),
])  # fmt: skip
def test_the_arguments_of_a_network_with_a_configuration_are_listed(name, lists):
    with pytest.raises(ValueError, match=f"unexpected keyword argument 'img_sizes'.*; it takes .*{lists}"):
        create_backbone(name, 32, kwargs={"img_sizes": 64})


def test_output_strides_that_a_patch_size_has():
    with pytest.raises(
        ValueError, match="'vit_small_patch14_dinov2' does not support output_stride 16; it supports 14"
    ):
        create_backbone("vit_small_patch14_dinov2", 16, kwargs=VIT)
    with pytest.raises(ValueError, match="it supports none at which its elements lie symmetrically in the picture"):
        create_backbone("xcit_nano_12_p16_224", 16)


def test_a_trained_network_keeps_its_arguments(tmp_path):
    model = model_of("vit", refine_stages=(0, -1)).eval()
    save_model(tmp_path, model, info_of(TrainConfig(model=model.config)))
    loaded, info = load_model(tmp_path)
    assert info.config.model == model.config and loaded.backbone.img_size == (64, 64)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(image).logits, model(image).logits)
    saved = json.loads((tmp_path / "export/model.json").read_text())["config"]["model"]
    assert saved["backbone_kwargs"] == {**VIT, "img_size": 64}


@pytest.mark.parametrize("geometry", [2, 3])
@pytest.mark.parametrize("family", ["convnext", "nfnet", "edgenext", "vit", "maxvit"])
def test_older_exports_are_read(family, geometry, tmp_path):
    name, stride, kwargs, side, corners = FAMILIES[family]
    config = replace(SMALL, backbone=name, output_stride=stride, backbone_kwargs=kwargs)
    model = ERCN(config, geometry=geometry).eval()
    save_model(tmp_path, model, info_of(TrainConfig(model=config), image_size=side, prepared_size=side))
    loaded, info = load_model(tmp_path)
    assert loaded.geometry == info.geometry == geometry and loaded.align_corners is corners
    assert not any(isinstance(module, CentredConv2d) for module in loaded.modules())
    image = torch.randn(1, 3, side, side)
    assert torch.equal(loaded(image).logits, model(image).logits)


def test_the_settings_on_the_command_line_and_in_files():
    options = [
        "--model.backbone_kwargs",
        '{"img_size": [64, 96], "drop_path_rate": 0.1}',
        "--model.pretrained",
        "a/b.pth",
    ]
    model = cli.parse("train", TrainConfig, options).model
    assert model.backbone_kwargs == {"img_size": [64, 96], "drop_path_rate": 0.1} and model.pretrained == "a/b.pth"
    assert cli.parse("train", TrainConfig, ["--model.pretrained", "true"]).model.pretrained is True
    assert cli.parse("pretrain", PretrainConfig, ["--backbone_kwargs", '{"img_size": 64}']).backbone_kwargs == {
        "img_size": 64
    }
    assert hash(model) == hash(replace(model)) and model == replace(model)
    for value in (3, ["img_size"], {3: 4}):
        with pytest.raises(ValueError, match=r"model\.backbone_kwargs must be a mapping of names; got"):
            from_dict(TrainConfig, {"model": {"backbone_kwargs": value}})


def test_pretraining_builds_the_same_backbone():
    name, stride, kwargs, side, _ = FAMILIES["vit"]
    config = PretrainConfig(backbone=name, output_stride=stride, backbone_kwargs=kwargs)
    network = Contrastive(config, 4).online
    assert network(torch.randn(2, 3, side, side)).shape == (2, 128)
    assert network.backbone.state_dict().keys() == model_of("vit").backbone.state_dict().keys()


@pytest.mark.parametrize("family", ["vit", "vit, any size", "resnet"])
def test_pretraining_sees_pictures_at_the_side_at_which_they_are_exact(family):
    """As in ERCN: networks that take only whole patches also take the default side, a multiple plus 1."""
    name, stride, kwargs, side, corners = FAMILIES[family]
    network = Contrastive(PretrainConfig(backbone=name, output_stride=stride, backbone_kwargs=kwargs), 4).online.eval()
    for other in (side - 1, side + 1):
        image = torch.randn(2, 3, other, other)
        exact = nn.functional.interpolate(image, (side, side), mode="bilinear", align_corners=corners)
        assert torch.equal(network(image), network(exact))


def test_pretraining_refuses_pictures_before_the_run_begins_and_what_it_advises_is_taken(tmp_path):
    data = DataConfig(root=str(tmp_path / "data"), image_size=65, batch_size=4, workers=0)
    prepare(PrepareConfig(patients=6, size=65, out=data.root, fractions=(0.5, 0.5, 0.0), progress=False))
    run = RunConfig(out=str(tmp_path / "run"), epochs=1, accelerator="cpu", progress=False)
    name, stride, built = "vit_tiny_patch16_224", 16, VIT | {"img_size": 48}
    config = PretrainConfig(data=data, run=run, backbone=name, output_stride=stride, backbone_kwargs=built)
    with pytest.raises(ValueError, match="pictures of 64 x 64 px") as error:
        pretrain(config)
    assert not (tmp_path / "run" / "config.yaml").exists()
    advice = re.search(r"\(data.image_size (\d+)\), or backbone_kwargs ({.*?}), or ({.*?}) for", str(error.value))
    size, other, free = map(json.loads, advice.groups())
    for side, kwargs in ((size, {}), (65, free), (65, other)):
        changed = replace(config, data=replace(data, image_size=side), backbone_kwargs=built | kwargs)
        check_side(Contrastive(changed, 4).online, side)
    pretrain(changed)
    probed = json.loads((tmp_path / "run/export/backbone.json").read_text())["probe"]
    assert probed["before"].keys() == probed["after"].keys()


def test_pictures_that_the_network_does_not_take_are_refused_before_a_run():
    name, stride, kwargs, _, _ = FAMILIES["vit"]
    model = ModelConfig(backbone=name, output_stride=stride, backbone_kwargs=kwargs, embed_dim=8)
    config = TrainConfig(model=model, data=DataConfig(image_size=97))
    with pytest.raises(ValueError, match="pictures of 96 x 96 px .*it takes 64 x 64 px: give pictures of that size"):
        check_size(ERCN(model), config)
    fits = replace(config, data=DataConfig(image_size=65))  # which is resized to 64
    network = ERCN(model)
    before = copy.deepcopy(network.state_dict())
    check_size(network, fits)
    assert all(module.training for module in network.modules())  # Lightning trains modules in the mode that they have
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    rescaled = replace(fits, loss=LossConfig(transform="rescale", rescale=0.5))
    with pytest.raises(ValueError, match="loss.transform 'rescale' makes pictures of another size: .* 32 x 32 px"):
        check_size(ERCN(model), rescaled)
    check_size(ERCN(replace(model, backbone_kwargs=VIT | {"dynamic_img_size": True})), rescaled)
    check_size(ERCN(replace(model, backbone="test_resnet", backbone_kwargs={})), rescaled)


def config_of(family, side, batch=2):
    name, stride, kwargs, _, corners = FAMILIES[family]
    kwargs = kwargs | {"img_size": side} if "img_size" in kwargs else kwargs
    return TrainConfig(
        data=DataConfig(image_size=side + corners, batch_size=batch),
        model=replace(SMALL, backbone=name, output_stride=stride, backbone_kwargs=kwargs),
        loss=LossConfig(ecr=1.0),
    )


@pytest.mark.parametrize("family", ["regnety", "swin", "vit"])
def test_the_plan_of_every_family(family):
    """The plan has all weights, nothing is read or drawn, and recomputed blocks need less memory."""
    config = config_of(family, 96)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plan = footprint(replace(config, model=replace(config.model, pretrained="not/read")))
    assert torch.equal(torch.get_rng_state(), before)
    network = ERCN(config.model)
    sizes = [p.nbytes for p in network.parameters()]
    assert plan.gradients == sum(sizes)
    assert plan.weights == sum(sizes) + sum(x.nbytes for x in network.buffers())
    recomputed = footprint(replace(config, run=RunConfig(grad_checkpointing=True)))
    assert recomputed.activations < 0.8 * plan.activations and recomputed.weights == plan.weights


@pytest.mark.parametrize("family, side, batch", [
    ("convnext", 192, 2), ("swin", 224, 2), ("vit", 224, 16), ("maxvit", 224, 1),
])  # fmt: skip
def test_predicted_memory_is_what_training_steps_take(family, side, batch, tmp_path):
    """Within a factor of 1.1, as for a ResNet (test_high_resolution)."""
    config = config_of(family, side, batch)
    assert _ranks.run(1, _steps.save_peak, config, str(tmp_path / "peak")) == [0]
    measured, predicted = int((tmp_path / "peak").read_text()), footprint(config).peak
    assert predicted / 1.1 < measured < predicted * 1.1, measured / predicted


def test_advice_for_a_network_of_one_size(monkeypatch):
    """The advice of smaller pictures needs a network that is built for them."""
    built, fixed = (
        replace(config_of("vit", side, 1), run=RunConfig(grad_checkpointing=True, precision="bf16-mixed"))
        for side in (256, 224)
    )
    fixed = replace(fixed, model=replace(fixed.model, backbone_kwargs=VIT))
    found = planning.changes(built, lambda one: False)
    sizes = [
        (change.options["data.image_size"], change.config.model.backbone_kwargs)
        for change in found
        if "data.image_size" in change.options
    ]
    assert sizes == [(size, VIT | {"img_size": size}) for size in (192,)]
    assert planning.changes(fixed, lambda one: False) == []  # nothing is left, and nothing raises
    monkeypatch.setattr(planning, "available", lambda config: found[-1].footprint.peak / 0.9)
    monkeypatch.setattr(planning, "changes", lambda config, fits: found)
    advice = planning.advice(built)
    options = shlex.split(advice[advice.index("--") :])
    again = cli.parse("train", TrainConfig, options)
    assert again.model.backbone_kwargs == {"img_size": sizes[-1][0]} | VIT and again.data.image_size == sizes[-1][0]


def test_the_command_plans_a_transformer(capsys):
    name, stride, kwargs, _, _ = FAMILIES["vit"]
    options = ["--model.backbone", name, "--model.output_stride", str(stride), "--data.image_size", "64"]
    options += ["--memory", "2"]
    assert cli._run("plan", [*options, "--model.backbone_kwargs", json.dumps(kwargs)]) == 0
    assert "fits into 2.00 GB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not take pictures of 64 x 64 px"):
        cli._run("plan", [*options, "--model.backbone_kwargs", json.dumps(VIT)])
