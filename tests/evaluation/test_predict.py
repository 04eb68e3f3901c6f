"""Prediction writes its table after every batch, and refuses unknown devices."""

import csv

import pytest
import torch
from _stubs import info_of
from PIL import Image

from ercn.checkpoint import save_model
from ercn.config import ModelConfig, PredictConfig, TrainConfig
from ercn.evaluation import predicting as prediction
from ercn.models import ERCN
from ercn.training import predict


def test_rows_are_on_disk_after_every_batch(tmp_path, monkeypatch):
    config = TrainConfig(model=ModelConfig(backbone="mobilenetv3_small_050", embed_dim=8, pool_dim=8))
    torch.manual_seed(0)
    save_model(tmp_path / "run", ERCN(config.model), info_of(config))
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        Image.new("RGB", (70, 60), (40 * i, 30, 20)).save(tmp_path / "pictures" / f"{i}.png")
    whole, seen = prediction.forward, []

    def watched(*args):
        for batch in whole(*args):
            yield batch
            with open(tmp_path / "out" / "predictions.csv", newline="") as file:
                seen.append([row["id"] for row in csv.DictReader(file)])

    monkeypatch.setattr(prediction, "forward", watched)
    options = {"input": str(tmp_path / "pictures"), "out": str(tmp_path / "out"), "workers": 0, "accelerator": "cpu"}
    predict(PredictConfig(run=str(tmp_path / "run"), batch_size=2, overlays=(), **options))
    assert seen == [["0", "1"], ["0", "1", "2", "3"], ["0", "1", "2", "3", "4"]]


def test_devices_without_operators_are_refused():
    with pytest.raises(ValueError, match="accelerator must be one of auto, cpu, gpu, cuda; got 'mps'"):
        prediction.pick_device("mps")
