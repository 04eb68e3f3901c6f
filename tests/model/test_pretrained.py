"""Weights of files: every layout gives the features of its own network, and nothing is loaded or lost silently."""

import argparse
import json
import os
import pickle
import re
from dataclasses import replace

import pytest
import timm
import torch
from _stubs import info_of
from safetensors.torch import save_file
from torchvision import models as torchvision
from torchvision.models.convnext import CNBlockConfig

from ercn.checkpoint import load_model, save_model, save_weights
from ercn.config import DataConfig, ModelConfig, PrepareConfig, RunConfig, TrainConfig, from_dict
from ercn.data import prepare
from ercn.models import ERCN, create_backbone, stages
from ercn.pretrained import _tensors
from ercn.training import fit, train
from ercn.training.fit import check_start

VIT = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2}
SWIN = {"img_size": 64, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
HIERA = {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}
BACKBONE = ModelConfig(backbone="mobilenetv3_small_050", embed_dim=8, pool_dim=8)


def loaded_from(path, name, stride, **kwargs):
    """The backbone without corrections, whose features are those of the file's network."""
    torch.manual_seed(7)
    return create_backbone(name, stride, pretrained=str(path), kwargs=kwargs, geometry=1).eval()


def vary(network):
    """Random scales, shifts and statistics instead of 1 and 0, so that mixed-up tensors show."""
    generator = torch.Generator().manual_seed(1)
    for key, value in network.state_dict().items():
        if value.is_floating_point() and value.ndim < 2 or "layer_scale" in key:
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return network.eval()


def tokens(vit, image):
    """The last block's output of torchvision's ViT as a map."""
    x = vit._process_input(image)
    x = torch.cat([vit.class_token.expand(len(x), -1, -1), x], 1) + vit.encoder.pos_embedding
    x = vit.encoder.layers(x)[:, 1:]
    return x.unflatten(1, (2, 2)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "make, last, name, stride, kwargs, side, layout",
    [
        (
            torchvision.resnet18,
            lambda m, x: m.layer4(m.layer3(m.layer2(m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x)))))))),
            "resnet18",
            32,
            {},
            64,
            "timm",  # the layout of the names
        ),
        (
            torchvision.regnet_x_400mf,
            lambda m, x: m.trunk_output(m.stem(x)),
            "regnetx_004_tv",
            32,
            {},
            64,
            "torchvision's RegNet",
        ),
        (
            torchvision.regnet_y_400mf,
            lambda m, x: m.trunk_output(m.stem(x)),
            "regnety_004",
            32,
            {},
            64,
            "torchvision's RegNet",
        ),
        (
            torchvision.efficientnet_b0,
            lambda m, x: m.features[:8](x),
            "efficientnet_b0",
            32,
            {},
            64,
            "torchvision's EfficientNet",
        ),
        (
            lambda: torchvision.ConvNeXt(
                [CNBlockConfig(8 * k, 8 * k + 8 if k < 4 else None, 1 + k % 2) for k in (1, 2, 3, 4)]
            ),
            lambda m, x: m.features(x),
            "convnext_tiny",
            32,
            {"depths": [2, 1, 2, 1], "dims": [8, 16, 24, 32]},
            64,
            "torchvision's ConvNeXt",
        ),
        (
            lambda: torchvision.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4]),
            lambda m, x: m.features(x).permute(0, 3, 1, 2),
            "swin_tiny_patch4_window7_224",
            8,
            SWIN,
            64,
            "torchvision's Swin",
        ),
        (
            lambda: torchvision.VisionTransformer(32, 16, 3, 2, 32, 128),
            tokens,
            "vit_tiny_patch16_224",
            16,
            VIT,
            32,
            "torchvision's ViT",
        ),
    ],
)
def test_torchvision(tmp_path, make, last, name, stride, kwargs, side, layout):
    torch.manual_seed(0)
    source = vary(make())
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    backbone = loaded_from(tmp_path / "weights.pth", name, stride, **kwargs)
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(stages(backbone, image)[-1], last(source, image), rtol=1e-3, atol=1e-4)
    loaded = backbone.loaded
    assert loaded.layout == layout and loaded.prefix == "model." and not loaded.missing and not loaded.resized
    assert set(loaded.unused) <= {"fc", "head", "heads", "classifier", "features", "norm", "encoder"}
    assert f"{loaded.tensors} tensors of {tmp_path / 'weights.pth'} ({layout} layout, below 'model.')" in str(loaded)


def mae(side, dim=32, depth=3):
    """A masked autoencoder's checkpoint of a ViT for pictures of ``side`` px, as RETFound's: a decoder and settings."""
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", **(VIT | {"img_size": side}), num_classes=0)
    state = {key: torch.randn_like(value) for key, value in vit.state_dict().items()}
    grid = side // 16
    state |= {"mask_token": torch.zeros(1, 1, dim), "decoder_pos_embed": torch.zeros(1, grid * grid + 1, 16)}
    state |= {f"decoder_blocks.{i}.norm1.weight": torch.ones(16) for i in range(2)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    return {"model": state, "optimizer": optimizer, "args": argparse.Namespace(lr=1e-3, device="cuda"), "epoch": 799}


def test_retfound_at_another_size(tmp_path):
    saved = mae(48)
    torch.save(saved, tmp_path / "RETFound_cfp_weights.pth")
    own = loaded_from(tmp_path / "RETFound_cfp_weights.pth", "vit_tiny_patch16_224", 16, **(VIT | {"img_size": 48}))
    large = loaded_from(tmp_path / "RETFound_cfp_weights.pth", "vit_tiny_patch16_224", 16, **(VIT | {"img_size": 96}))
    for backbone in (own, large):
        state = backbone.state_dict()
        for key, value in state.items():
            if not key.endswith("pos_embed"):
                assert torch.equal(value, saved["model"][key.removeprefix("model.")]), key
    given, grown = saved["model"]["pos_embed"], large.state_dict()["model.pos_embed"]
    assert torch.equal(own.state_dict()["model.pos_embed"], given)
    assert torch.equal(grown[:, 0], given[:, 0])  # position of the class token
    grid = given[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(grown[:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2), expected)
    loaded = large.loaded
    assert (
        loaded.resized == {"model.pos_embed": "[1, 10, 32] to [1, 37, 32]"}
        and loaded.missing == ()
        and not own.loaded.resized
    )
    assert loaded.unused == {"mask_token": 1, "decoder_pos_embed": 1, "decoder_blocks": 2, "norm": 2, "optimizer": 1}
    assert "interpolated: model.pos_embed [1, 10, 32] to [1, 37, 32]" in str(loaded)
    assert "decoder_blocks (2)" in str(loaded)


def test_tables_of_relative_positions_are_interpolated(tmp_path):
    source = create_backbone("swin_tiny_patch4_window7_224", 8, kwargs=SWIN)
    save_file(source.state_dict(), tmp_path / "swin.safetensors")
    backbone = loaded_from(
        tmp_path / "swin.safetensors", "swin_tiny_patch4_window7_224", 8, **(SWIN | {"window_size": 8})
    )
    assert len(backbone.loaded.resized) == 4 and set(backbone.loaded.resized.values()) == {
        "[49, 1] to [225, 1]",
        "[49, 2] to [225, 2]",
    }
    assert backbone.loaded.layout == "timm" and backbone.loaded.missing == ()


@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (lambda one, other: one, ""),
        (lambda one, other: {f"module.{key}": value for key, value in one.items()}, "module."),
        (
            lambda one, other: {"teacher": {f"backbone.{k}": v for k, v in one.items()}, "student": other},
            "teacher.backbone.",
        ),
        (
            lambda one, other: {
                "state_dict": {f"module.encoder_k.{k}": v for k, v in other.items()}
                | {f"module.encoder_q.{k}": v for k, v in one.items()}
            },
            "state_dict.module.encoder_q.",
        ),
        (lambda one, other: {"state_dict": other, "state_dict_ema": one}, "state_dict_ema."),
    ],
)
@pytest.mark.parametrize("name, stride", [("test_resnet", 16), ("test_convnext", 32)])
def test_what_stands_before_the_names_is_found(tmp_path, wrap, prefix, name, stride):
    """timm's whole networks have other names than its feature extractors: stages.0 becomes stages_0."""
    torch.manual_seed(0)
    source, other = timm.create_model(name), timm.create_model(name)
    torch.save(wrap(source.state_dict(), other.state_dict()), tmp_path / "weights.pt")
    backbone = loaded_from(tmp_path / "weights.pt", name, stride)
    assert backbone.loaded.prefix == prefix and not backbone.loaded.missing and backbone.loaded.tensors
    given = {key.replace(".", "_"): value for key, value in source.state_dict().items()}
    assert all(torch.equal(value, given[key.replace(".", "_")]) for key, value in backbone.state_dict().items())


def test_exports_of_ours(tmp_path):
    """Runs of pre-training and training, given as folder, export folder or file, load bit by bit."""
    torch.manual_seed(1)
    model = ERCN(BACKBONE)
    save_weights(tmp_path / "pre/export", "backbone", model.backbone.state_dict(), {"backbone": BACKBONE.backbone})
    save_model(tmp_path / "run", model, info_of(TrainConfig(model=BACKBONE)))
    places = [("pre", "pretrain"), ("pre/export", "pretrain"), ("pre/export/backbone.safetensors", "pretrain")]
    places += [("run", "train"), ("run/export", "train"), ("run/export/model.safetensors", "train")]
    for place, command in places:
        torch.manual_seed(2)
        started = ERCN(replace(BACKBONE, pretrained=str(tmp_path / place)))
        pairs = zip(model.backbone.state_dict().values(), started.backbone.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not torch.equal(started.classifier.weight, model.classifier.weight)
        loaded = started.backbone.loaded
        assert loaded.layout == f"ercn {command}" and loaded.prefix == ("backbone." if command == "train" else "")
        assert json.loads(json.dumps(loaded.as_dict())) == loaded.as_dict() and len(loaded.sha256) == 64
    unused = ERCN(replace(BACKBONE, pretrained=str(tmp_path / "run"))).backbone.loaded.unused
    assert unused["classifier"] == 1 and unused["pool"] == 6


def test_an_export_of_another_backbone_or_shape_is_refused(tmp_path):
    source = ERCN(BACKBONE)
    state, info = source.backbone.state_dict(), {"backbone": BACKBONE.backbone}
    save_weights(tmp_path / "export", "backbone", state, info)
    with pytest.raises(ValueError, match="pre-trained mobilenetv3_small_050, but model.backbone is test_resnet"):
        loaded_from(tmp_path, "test_resnet", 16)
    first = next(iter(state))
    save_weights(tmp_path / "export", "backbone", state | {first: torch.zeros(7)}, info)
    with pytest.raises(
        ValueError, match=r"another model than mobilenetv3_small_050: 1 of another shape .*\[7\] instead of"
    ):
        loaded_from(tmp_path, BACKBONE.backbone, 16)
    save_weights(tmp_path / "export", "backbone", {k: v for k, v in state.items() if k != first}, info)
    with pytest.raises(ValueError, match=f"tensors that it needs, .* are there. It needs, for one, {first}"):
        loaded_from(tmp_path, BACKBONE.backbone, 16)
    (tmp_path / "export" / "backbone.json").write_text('{"format": 1, "notice": "", "packages": {}}')
    with pytest.raises(ValueError, match="backbone.json is damaged: KeyError"):
        loaded_from(tmp_path, BACKBONE.backbone, 16)


SMALL = {"channels": (8, 8, 8, 8)}  # narrow; the names are those of the full ResNet


def test_another_networks_weights_name_what_is_needed_and_what_is_there(tmp_path):
    state = timm.create_model("resnet18", **SMALL).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(ValueError) as error:
        loaded_from(tmp_path / "resnet18.pth", "resnet34", 32, **SMALL)  # whose names are these and as many others
    needed = [key for key in timm.create_model("resnet34", num_classes=0, **SMALL).state_dict() if "num_ba" not in key]
    there = [key for key in state if key in needed]
    assert (
        f"resnet18.pth does not hold the weights of resnet34: of {len(needed)} tensors that it needs, {len(there)}"
        in str(error.value)
    )
    assert "It needs, for one, layer1.2.conv1.weight, " in str(error.value)
    assert "the file has fc.weight, fc.bias" in str(error.value)
    with pytest.raises(ValueError, match="needs, for one, .* the file has conv1.weight, bn1.weight, "):
        loaded_from(tmp_path / "resnet18.pth", "test_convnext", 32)


def test_what_a_file_lacks_is_reported(tmp_path):
    state = timm.create_model("resnet18", **SMALL).state_dict()
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "w.pth")
    backbone = loaded_from(tmp_path / "w.pth", "resnet18", 32, **SMALL)
    assert backbone.loaded.missing == ("layer4.1.conv2.weight",)
    assert "1 not in the file, as drawn: layer4.1.conv2.weight" in str(backbone.loaded)
    old = {key: value for key, value in state.items() if "num_batches_tracked" not in key}  # before torch counted them
    torch.save(old, tmp_path / "old.pth")
    assert loaded_from(tmp_path / "old.pth", "resnet18", 32, **SMALL).loaded.missing == ("layer4.1.conv2.weight",)


@pytest.mark.parametrize(
    "name, stride, kwargs, lost, first",
    [
        ("resnet18", 32, SMALL, ("conv1.", "bn1."), "conv1.weight"),
        ("vit_tiny_patch16_224", 16, VIT, ("patch_embed.",), "patch_embed.proj.weight"),
    ],
)
def test_a_file_without_the_first_layer_is_refused(tmp_path, name, stride, kwargs, lost, first):
    state = timm.create_model(name, num_classes=0, **kwargs).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith(lost)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"there, but not the first layer's\. It needs, for one, (model\.)?{first}"):
        loaded_from(tmp_path / "w.pth", name, stride, **kwargs)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet").state_dict()


@pytest.mark.filterwarnings("ignore")  # torch warns of the rare kinds
@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda x: x.to(torch.int8), "is torch.int8 instead of torch.float32"),
        (lambda x: x > 0, "is torch.bool instead of torch.float32"),
        (lambda x: torch.complex(x, x), "is torch.complex64 instead of torch.float32"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is torch.qint8 instead of torch.float32"),
        (lambda x: x.to_sparse(), "is torch.sparse_coo, not dense"),
        (lambda x: torch.nested.nested_tensor([x]), "is nested, not dense"),
        (lambda x: x.to("meta"), r"has no values \(device meta\)"),
        (lambda x: torch.where(x == x.max(), torch.nan, x), "has values that are not finite"),
        (lambda x: x.double() * 1e300, "has values that are not finite"),  # in float32
    ],
)
def test_what_cannot_be_a_weight_is_refused(tmp_path, resnet, change, fault):
    torch.save(resnet | {"conv1.0.weight": change(resnet["conv1.0.weight"])}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"cannot be weights of test_resnet, 1 in all: conv1.0.weight {fault}$"):
        loaded_from(tmp_path / "w.pth", "test_resnet", 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_floats_of_another_width_are_loaded(tmp_path, resnet, dtype):
    """Half precision turns counts of batches into floats too; these are not loaded."""
    given = {key: value.to(dtype) for key, value in resnet.items()}
    torch.save(given, tmp_path / "w.pth")
    backbone = loaded_from(tmp_path / "w.pth", "test_resnet", 16)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, given[key].to(value.dtype)), key
    assert backbone.loaded.tensors == sum("num_batches" not in key for key in backbone.state_dict())


def test_a_file_in_circles_and_deeper_than_the_stack(tmp_path, resnet):
    saved = {"model": resnet}
    saved["self"], saved["list"] = saved, [saved]
    torch.save(saved, tmp_path / "w.pth")
    assert loaded_from(tmp_path / "w.pth", "test_resnet", 16).loaded.prefix == "model."
    deep = resnet
    for _ in range(5000):
        deep = [deep]
    assert len(dict(_tensors(deep))) == len(resnet)


def test_lists_of_state_dicts_and_files_without_tensors(tmp_path, resnet):
    other = {key: torch.zeros_like(value) for key, value in resnet.items()}
    torch.save([resnet, other], tmp_path / "w.pth")
    backbone = loaded_from(tmp_path / "w.pth", "test_resnet", 16)
    assert backbone.loaded.prefix == "0." and backbone.loaded.unused == {"fc": 2, "1": len(resnet)}
    assert torch.equal(backbone.state_dict()["conv1.0.weight"], resnet["conv1.0.weight"])
    for saved, words in (
        ([other], "0.conv1.0.weight, "),
        (torch.zeros(3), "a tensor without a name$"),
        ({"epoch": 3}, "no tensors$"),
        ({key: resnet[key] for key in ("conv1.0.weight", "conv1.1.weight")}, "nothing else$"),
    ):
        torch.save(saved, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=f"; the file has {words}"):
            loaded_from(tmp_path / "w.pth", "test_convnext" if saved == [other] else "test_resnet", 32)


@pytest.mark.parametrize("about", ['{"notice": "of others"}', "[]", "3", '{"format": "pt", "config": {}}'])
def test_a_foreign_description_beside_a_file_says_nothing(tmp_path, resnet, about):
    save_file(resnet, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(about)
    assert loaded_from(tmp_path / "w.safetensors", "test_resnet", 16).loaded.layout == "timm"


def test_suffixes_in_capitals(tmp_path, resnet):
    save_file(resnet, tmp_path / "W.SAFETENSORS")
    assert loaded_from(tmp_path / "W.SAFETENSORS", "test_resnet", 16).loaded.layout == "timm"
    described = {"format": 1, "notice": "", "packages": {}, "backbone": "resnet18"}
    (tmp_path / "W.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="holds a pre-trained resnet18, but model.backbone is test_resnet"):
        loaded_from(tmp_path / "W.SAFETENSORS", "test_resnet", 16)


@pytest.mark.parametrize(
    "name, stride, kwargs, key, axis, lengths",
    [
        ("vit_tiny_patch16_224", 16, VIT, "pos_embed", 1, (0, 1, 3, 7)),
        ("swin_tiny_patch4_window7_224", 8, SWIN, "layers.0.blocks.0.attn.relative_position_bias_table", 0, (0, 3, 7)),
        ("hiera_tiny_224", 32, HIERA, "pos_embed", 1, (4,)),  # its patch embedding has no grid size
    ],
)
def test_positions_that_are_no_square_are_refused(tmp_path, name, stride, kwargs, key, axis, lengths):
    state = timm.create_model(name, num_classes=0, **kwargs).state_dict()
    for length in lengths:
        shape = [length if i == axis else n for i, n in enumerate(state[key].shape)]
        torch.save(state | {key: torch.zeros(shape)}, tmp_path / "w.pth")
        message = f"1 of another shape ({key} {shape} instead of {list(state[key].shape)})"
        with pytest.raises(ValueError, match=re.escape(message)):
            loaded_from(tmp_path / "w.pth", name, stride, **kwargs)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_runs(tmp_path):
    torch.save({"model": Runs(tmp_path / "made")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"cannot be read without running code that it brings \(\w+.mkdir\)"):
        loaded_from(tmp_path / "weights.pth", "test_resnet", 16)
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "made"), protocol=2))
    with pytest.raises(ValueError, match="cannot be read without running code"):
        loaded_from(tmp_path / "weights.pkl", "test_resnet", 16)
    assert not (tmp_path / "made").exists()


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nothing does not exist: give a run of ercn pretrain or ercn train, or a"
    ):
        loaded_from(tmp_path / "nothing", "test_resnet", 16)
    with pytest.raises(FileNotFoundError, match="has no export/backbone.safetensors or export/model.safetensors; ercn"):
        loaded_from(tmp_path, "test_resnet", 16)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "weights.pth")
    whole = (tmp_path / "weights.pth").read_bytes()
    for name, data in (("a.pth", whole[:1500]), ("b.pth", b""), ("c.pth", b"hello"), ("d.safetensors", b"hello" * 9)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} .*damaged"):
            loaded_from(tmp_path / name, "test_resnet", 16)
    with pytest.raises(ValueError, match="of .* tensors that it needs, 0 are there.* the file has a$"):
        loaded_from(tmp_path / "weights.pth", "test_resnet", 16)


def test_the_setting():
    assert from_dict(TrainConfig, {"model": {"pretrained": "runs/x"}}).model.pretrained == "runs/x"
    assert from_dict(TrainConfig, {"model": {"pretrained": True}}).model.pretrained is True
    with pytest.raises(ValueError, match=r"model\.pretrained must be bool or str; got 3"):
        from_dict(TrainConfig, {"model": {"pretrained": 3}})
    with pytest.raises(ValueError, match=r"model\.pretrained must be true, false or a path; got ''"):
        from_dict(TrainConfig, {"model": {"pretrained": ""}})
    with pytest.raises(
        ValueError, match="init runs/a and model.pretrained runs/b both say what the backbone starts from"
    ):
        check_start(TrainConfig(model=ModelConfig(pretrained="runs/b"), init="runs/a"))


def test_a_run_tells_what_it_started_from(tmp_path, capsys, monkeypatch):
    """The terminal, model.json and the model card tell it."""
    monkeypatch.setattr(fit, "write_report", lambda run: None)
    monkeypatch.setattr(fit, "BOOTSTRAP", 20)
    prepare(PrepareConfig(out=str(tmp_path / "data"), patients=12, size=64, workers=1, progress=False))
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("test_resnet").state_dict()}, tmp_path / "published.pth")
    config = TrainConfig(
        data=DataConfig(root=str(tmp_path / "data"), image_size=64, workers=0),
        model=ModelConfig(backbone="test_resnet", embed_dim=8, pool_dim=8, pretrained=str(tmp_path / "published.pth")),
        run=RunConfig(out=str(tmp_path / "run"), epochs=1, accelerator="cpu", progress=False),
    )
    train(config)
    loaded = ERCN(config.model).backbone.loaded
    assert str(loaded) in capsys.readouterr().out.splitlines()
    (tmp_path / "published.pth").unlink()  # the run needs it no longer
    _, info = load_model(tmp_path / "run")
    assert info.pretrained == loaded.as_dict() and info.config == config
    card = (tmp_path / "run/export/model_card.md").read_text()
    assert f"- Start: the backbone's weights from `published.pth` (timm; {loaded.tensors} tensors" in card
    assert loaded.sha256 in card and str(tmp_path) not in card
