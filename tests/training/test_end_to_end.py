"""The commands as a user runs them, on a folder in EyePACS' layout."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from _pictures import write_eyepacs_tree
from PIL import Image

from ercn.checkpoint import load_model
from ercn.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PredictConfig,
    PrepareConfig,
    RunConfig,
    TrainConfig,
)
from ercn.data import DataError, Geometry, Manifest, prepare
from ercn.training import evaluate, module, predict, train
from ercn.training.fit import check_classes

BACKBONE = "mobilenetv3_small_050"


def ercn(*argv, code=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "ercn", *argv], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tree with one truncated picture, prepared; two pre-training runs and a training run."""
    root = tmp_path_factory.mktemp("eyepacs")
    write_eyepacs_tree(root / "raw", patients=20)
    cut = root / "raw" / "train" / "12_left.jpeg"
    cut.write_bytes(cut.read_bytes()[:2000])
    options = ["--size", "96", "--fractions", "[0.6,0.2,0.2]", "--out", str(root / "data")]
    ercn("prepare", "--dataset", "eyepacs", "--root", str(root / "raw"), *options)
    small = ["--data.root", str(root / "data"), "--data.image_size", "64", "--data.batch_size", "6"]
    small += ["--run.epochs", "2"]
    for method in ("simclr", "moco_v2"):
        ercn("pretrain", *small, "--method", method, "--backbone", BACKBONE, "--run.out", str(root / method))
    model = ["--model.backbone", BACKBONE, "--model.embed_dim", "16", "--init", str(root / "moco_v2")]
    printed = ercn("train", *small, *model, "--data.balance", "sampler", "--run.out", str(root / "run"))
    assert "the CAM is flat" not in printed
    ercn("evaluate", "--run", str(root / "run"), "--bootstrap", "200")
    return root


def test_the_run_folder_is_complete(root):
    run = root / "run"
    for name in (
        *("config.yaml", "environment.json", "metrics.csv", "report.html"),
        *("checkpoints/last.ckpt", "checkpoints/best.ckpt"),
        *("export/model.safetensors", "export/model.json", "export/model_card.md"),
        *("evaluation/val.json", "evaluation/test.json", "evaluation/test_predictions.csv"),
    ):
        assert (run / name).stat().st_size > 0, name
    assert [row["epoch"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    history = rows(run / "metrics.csv")
    assert {"loss", "loss_cls", "loss_er", "val_kappa", "val_accuracy", "val_flat_cam", "lr"} <= history[0].keys()
    assert all(0 <= float(row[name]) <= 1 for name in ("val_flat_cam", "val_cam_extent") for row in history)
    exported = json.loads((run / "export" / "model.json").read_text())
    assert exported["flat_cam"] == float(history[exported["epoch"] - 1]["val_flat_cam"])
    started = exported["pretrained"]
    assert started["source"] == str(root / "moco_v2/export/backbone.safetensors")
    assert started["layout"] == "ercn pretrain"
    for method in ("simclr", "moco_v2"):
        assert {"loss", "top1"} <= rows(root / method / "metrics.csv")[1].keys()
        assert (root / method / "export" / "backbone.safetensors").exists()
        assert (root / method / "report.html").exists()


def test_evaluation_agrees_with_its_predictions(root):
    result = json.loads((root / "run" / "evaluation" / "test.json").read_text())
    predictions = rows(root / "run" / "evaluation" / "test_predictions.csv")
    manifest = Manifest.load(root / "data")
    assert {row["id"] for row in predictions} == {record.id for record in manifest.split("test")}
    probability = np.array([[float(row[f"p{k}"]) for k in range(5)] for row in predictions])
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)
    truth = np.array([int(row["grade"]) for row in predictions])
    assert result["metrics"]["accuracy"]["value"] == pytest.approx((probability.argmax(1) == truth).mean())
    assert result["bootstrap"]["draws"] == 200 and result["manifest"] == manifest.hash
    assert result["localization"] is None  # EyePACS has no lesion masks


def test_the_report_is_one_file_with_texts_for_its_pictures(root):
    page = (root / "run" / "report.html").read_text()
    assert page.count("<img") == page.count('src="data:image/') == page.count('alt="') > 10
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"base64,[\w+/=]+", "", page))
    assert "Not a medical device" in page and "phantom" not in page
    assert "Results on test" in page and "Results on val" in page


def test_evaluation_of_another_data_set_and_of_wrong_input(root):
    prepare(PrepareConfig(size=64, patients=24, fractions=(0.4, 0.3, 0.3), out=str(root / "phantom"), progress=False))
    config = EvaluateConfig(run=str(root / "run"), data=str(root / "phantom"), split="all", bootstrap=50)
    evaluate(config)
    result = json.loads((root / "run" / "evaluation" / "phantom-all.json").read_text())
    maps = result["localization"]["maps"]
    assert set(maps) == {"cam", "refined_cam", "attention", "evidence", "mean"}
    for values in maps.values():
        assert 0 < values["aupr"]["low"] < values["aupr"]["high"] < 1
        assert "iou" not in values and 0 < values["iou_best"]["value"] < 1  # no masks in validation, so no threshold
    assert result["map_thresholds"] is None
    assert "are a <strong>phantom</strong>" not in (root / "run" / "report.html").read_text()
    assert "phantom (synthetic)" in (root / "run" / "report.html").read_text()

    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        evaluate(EvaluateConfig(run=str(root / "simclr")))
    with pytest.raises(DataError, match="prepare.json"):
        evaluate(replace(config, data=str(root / "raw")))
    four = replace(Manifest.load(root / "data"), class_names=list("abcd"))
    with pytest.raises(ValueError, match="grades 5 classes .* has 4: a, b, c, d"):
        check_classes(TrainConfig(), four)


def test_predict_draws_maps_at_full_resolution_and_goes_on_after_bad_files(root):
    pictures, out = root / "raw" / "train", root / "predictions"
    (pictures / "text.jpg").write_text("not a picture")
    printed = ercn("predict", "--run", str(root / "run"), "--input", str(pictures), "--out", str(out))
    (pictures / "text.jpg").unlink()
    assert "text.jpg" in printed and "12_left.jpeg" in printed
    predictions = rows(out / "predictions.csv")
    assert len(predictions) == 39 and {"12_left", "text"}.isdisjoint(row["id"] for row in predictions)
    assert len(json.loads((out / "predictions.json").read_text())["unreadable"]) == 2
    for row in predictions[:5]:
        assert sum(float(row[f"p{k}"]) for k in range(5)) == pytest.approx(1, abs=1e-5)
        size = Image.open(row["file"]).size
        for kind in ("cam", "refined_cam", "attention"):
            assert Image.open(out / "overlays" / f"{row['id']}_{kind}.jpg").size == size
        maps = np.load(out / "maps" / f"{row['id']}.npz")
        assert maps["attention"].max() == 1 and 0 <= maps["cam"].min() <= maps["cam"].max() <= 1
        fields = ("width", "height", "left", "top", "side", "size")
        geometry = Geometry(*(int(maps[f"geometry_{name}"]) for name in fields))
        assert maps["corners"] == 64 and maps["cam"].shape == (5, 5)
        assert geometry.to_original(maps["cam"], int(maps["corners"])).shape == size[::-1]

    config = PredictConfig(run=str(root / "run"), input=str(pictures), out=str(out), workers=0)
    with pytest.raises(ValueError, match="nothing is overwritten"):
        predict(config)
    with pytest.raises(DataError, match="more than max_unreadable 0: .*12_left.jpeg"):
        predict(replace(config, out=str(root / "none"), max_unreadable=0))
    with pytest.raises(ValueError, match="'heat' is none"):
        predict(replace(config, out=str(root / "none"), overlays=("heat",)))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        predict(replace(config, out=str(root / "none"), input=str(root / "nowhere")))


def test_prediction_of_a_prepared_picture_equals_its_evaluation(root):
    manifest = Manifest.load(root / "data")
    record = manifest.split("test")[0]
    source = root / "raw" / record.source
    ercn("predict", "--run", str(root / "run"), "--input", str(source), "--out", str(root / "one"), "--overlays", "[]")
    (one,) = rows(root / "one" / "predictions.csv")
    same = next(r for r in rows(root / "run" / "evaluation" / "test_predictions.csv") if r["id"] == record.id)
    # the prepared picture went through one more JPEG
    assert [float(one[f"p{k}"]) for k in range(5)] == pytest.approx([float(same[f"p{k}"]) for k in range(5)], abs=0.02)


def test_weights_trained_in_half_precision_are_exported_in_float32(root, monkeypatch, capsys):
    """At the end, a warning says that the CAM is flat."""
    monkeypatch.setattr(module, "flat", lambda cam, config: torch.ones(len(cam), dtype=torch.bool))
    config = TrainConfig(
        data=DataConfig(root=str(root / "data"), image_size=64, batch_size=6, workers=0),
        model=ModelConfig(backbone=BACKBONE, embed_dim=8),
        run=RunConfig(out=str(root / "half"), epochs=1, precision="bf16-true", accelerator="cpu"),
    )
    model, info = load_model(train(config))
    sentence = "the CAM is flat in 100% of the val pictures with disease: its maps point at nothing"
    assert info.flat_cam == 1 and sentence in capsys.readouterr().out.splitlines()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (root / "half" / "evaluation" / "val.json").exists()


def test_an_init_of_another_backbone_is_refused(root):
    config = TrainConfig(
        data=DataConfig(root=str(root / "data")),
        model=ModelConfig(backbone="resnet10t"),
        run=RunConfig(out=str(root / "other")),
        init=str(root / "simclr"),
    )
    with pytest.raises(ValueError, match=f"pre-trained {BACKBONE}, but model.backbone is resnet10t"):
        train(config)
    assert not (root / "other").exists()
