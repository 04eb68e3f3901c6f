"""Exported weights are read back unchanged, and errors name everything that does not fit."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _stubs import info_of
from safetensors.torch import load_file, save_file

from ercn.checkpoint import load_model, save_model, save_weights
from ercn.config import ModelConfig, TrainConfig
from ercn.elements import GEOMETRY
from ercn.maps import enlarge, heat_maps
from ercn.models import ERCN
from ercn.report.model_card import write_model_card
from ercn.report.page import write_report

DATA = Path(__file__).parents[1] / "data" / "golden"

SMALL = {"embed_dim": 8, "pool_dim": 8, "mask_thresholds": (0.1,)}
CONFIG = TrainConfig(model=ModelConfig(backbone="mobilenetv3_small_050", **SMALL))
INFO = info_of(CONFIG, thresholds={"referable": 0.4, "maps": {}}, epoch=3, contrast="")


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = ERCN(CONFIG.model).to(memory_format=torch.channels_last).eval()
    save_model(tmp_path, model, INFO)
    return tmp_path, model


def test_what_is_saved_comes_back(run):
    folder, model = run
    loaded, info = load_model(folder)
    assert info == INFO and info.packages["torch"] == torch.__version__.split("+")[0]
    written = json.loads((folder / "export" / "model.json").read_text())
    assert "medical device" in written["notice"] and written["contrast"] == ""
    assert written["config"] == json.loads(json.dumps(asdict(CONFIG)))
    fields = [name for name, value in vars(INFO).items() if value is not None and name != "packages"]
    assert list(written) == ["format", "notice", "packages", *fields]
    image = torch.randn(1, 3, 64, 64)
    assert not loaded.training and info.geometry == loaded.geometry == GEOMETRY == 4 and loaded.align_corners
    torch.testing.assert_close(loaded(image).logits, model(image).logits)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["model.json", "model.safetensors"]


def test_fields_that_came_later_have_the_value_of_before(run):
    folder, _ = run
    path = folder / "export" / "model.json"
    about = json.loads(path.read_text())
    kept = ("format", "config", "geometry", "class_names", "image_size", "prepared_size", "mean", "std", "manifest")
    path.write_text(json.dumps({name: about[name] for name in (*kept, "thresholds")} | {"from_a_later_version": 1}))
    _, info = load_model(folder)
    assert info == replace(INFO, packages={}, epoch=None, contrast=None)
    assert (info.normalize, info.temperature, info.trained_classes, info.unreadable) == ("none", 1, list("abcde"), [])
    (folder / "config.yaml").write_text(json.dumps(about["config"]))  # JSON is YAML
    (folder / "environment.json").write_text('{"python": "3.10.0", "git": null}')
    card = write_model_card(folder, info).read_text()
    assert "Written by an unrecorded version of `ercn` from" in card and "of an unrecorded epoch," in card
    assert "- Software: unrecorded versions; Python 3.10.0." in card
    assert "Manifest and splits" in write_report(folder).read_text()


def test_model_json_has_these_keys(run):
    folder, _ = run
    path = folder / "export" / "model.json"
    written = {
        "format": 1,
        "notice": "For research only. Not a medical device; not for diagnosis.",
        "packages": {"ercn": "0.0.1"},
        "config": json.loads(json.dumps(asdict(CONFIG))),
        "geometry": 3,
        "class_names": ["low", "high"],
        "trained_classes": ["none", "some", "much"],
        "image_size": 96,
        "prepared_size": 128,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "normalize": "average",
        "dataset": "idrid",
        "manifest": "ab",
        "data": {"label": "grade", "splits": {}},
        "pretrained": {"layout": "timm"},
        "unreadable": [{"id": "a", "reason": "empty"}],
        "epoch": 7,
        "temperature": 1.5,
        "thresholds": {"referable": 0.25},
        "contrast": "box_9",
        "parameters": 12,
        "flat_cam": 0.125,
    }
    path.write_text(json.dumps(written))
    model, info = load_model(folder)
    assert (info.temperature, info.normalize, info.trained_classes) == (1.5, "average", ["none", "some", "much"])
    assert (info.geometry, info.contrast, info.flat_cam, info.epoch) == (3, "box_9", 0.125, 7)
    save_model(folder, model, info)
    assert list(json.loads(path.read_text()).items()) == list(written.items())


def test_weights_of_another_model_list_what_differs(run):
    folder, _ = run
    path = folder / "export" / "model.safetensors"
    state = load_file(path)
    state["extra.weight"] = torch.zeros(1)
    del state["classifier.weight"]
    state["mil_bias"] = torch.zeros(9)
    save_file(state, path)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    parts = "1 missing (classifier.weight)", "1 unexpected (extra.weight)", "mil_bias [9] instead of [4]"
    for part in parts:
        assert part in str(error.value)


def test_a_model_json_of_another_backbone_is_refused(run):
    folder, _ = run
    path = folder / "export" / "model.json"
    info = json.loads(path.read_text())
    info["config"]["model"]["backbone"] = "resnet10t"
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="another model than resnet10t"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_weights_are_named(run, keep):
    folder, _ = run
    path = folder / "export" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_model(folder)


def test_damaged_or_newer_description_is_named(run):
    folder, _ = run
    path = folder / "export" / "model.json"
    text = path.read_text()
    path.write_text(text[:50])
    with pytest.raises(ValueError, match="model.json is damaged"):
        load_model(folder)
    path.write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="has format 7; this version of ercn reads format 1"):
        load_model(folder)
    path.write_text(text.replace('"geometry": 4', '"geometry": 5'))
    with pytest.raises(ValueError, match="has geometry 5; this version of ercn reads 1 to 4"):
        load_model(folder)
    path.write_text(text.replace('"backbone"', '"bakcbone"'))
    with pytest.raises(ValueError, match=r"model\.json: config\.model\.bakcbone"):
        load_model(folder)
    path.write_text('{"format": 1, "config": {}}')
    with pytest.raises(ValueError, match=r"model\.json is damaged: it lacks class_names, .*thresholds"):
        load_model(folder)


def filled(state):
    """Random values by the order of the keys, independent of the network's own initialisation."""
    generator = torch.Generator().manual_seed(0)
    for key, value in sorted(state.items()):
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
        elif key.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.copy_(0.5 + 0.2 * torch.randn(value.shape, generator=generator))
    return state


def test_exports_from_before_there_was_a_geometry_are_read_with_theirs(tmp_path):
    """model.json and outputs are those of the version before (ercn at ee8fed6), for a network of these weights."""
    about = json.loads((DATA / "geometry_1.json").read_text())
    config = ModelConfig(backbone="test_resnet", output_stride=8, evidence="separate", embed_dim=8, pool_dim=8)
    state = filled(ERCN(config, geometry=1).state_dict())
    save_weights(tmp_path / "export", "model", state, about)
    assert "geometry" not in json.loads((tmp_path / "export" / "model.json").read_text())
    model, info = load_model(tmp_path)
    assert model.geometry == info.geometry == 1 and model.align_corners is False
    expected = {name: torch.from_numpy(value) for name, value in np.load(DATA / "geometry_1.npz").items()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        square, odd = (model(torch.randn(1, 3, *size, generator=generator)) for size in ((64, 64), (71, 93)))
    heats = heat_maps(square, info.config.model, model.align_corners)
    assert list(heats) == ["cam", "refined_cam", "attention", "mean"]
    found = {f"heat_{name}": heat for name, heat in heats.items()}
    found |= {f"square_{name}": getattr(square, name) for name in ("logits", "cam", "refined_cam", "attention")}
    found |= {f"odd_{name}": getattr(odd, name) for name in ("logits", "cam")}
    found["enlarged"] = enlarge(heats["cam"], 24, model.align_corners)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")

    save_model(tmp_path / "again", model, info)
    again, info = load_model(tmp_path / "again")
    assert again.geometry == info.geometry == 1


def test_a_folder_without_export_says_which_command_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing; ercn train writes it"):
        load_model(tmp_path)


def test_a_failed_write_leaves_the_old_file(run, monkeypatch):
    folder, model = run
    before = (folder / "export" / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("ercn.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(folder, model, INFO)
    assert (folder / "export" / "model.safetensors").read_bytes() == before
    assert len(list((folder / "export").iterdir())) == 2
