"""Several processes: the same contrastive gradients as one with the whole batch, and a whole training run."""

import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from _ntxent import contrastive_gradient
from lightly.loss import NTXentLoss
from safetensors.torch import load_file

from ercn.config import DataConfig, PrepareConfig, PretrainConfig, TrainConfig
from ercn.data import DataError, Manifest, prepare
from ercn.training.module import ERCNModule
from ercn.training.pretraining import Contrastive


def test_negatives_of_all_ranks_with_correct_gradients(tmp_path):
    torch.manual_seed(0)
    weight, views = torch.randn(6, 4, dtype=torch.float64), torch.randn(2, 6, 6, dtype=torch.float64)
    views[:, 2:] *= 3  # ranks that differ show a wrong average
    mp.spawn(contrastive_gradient, (3, weight, views, str(tmp_path)), nprocs=3)
    weight.requires_grad_()
    whole = NTXentLoss(0.5)(*(view @ weight for view in views))
    whole.backward()
    expected = torch.stack([whole.detach(), *weight.grad.flatten()])
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), expected)


def test_a_rank_without_readable_pictures_stops_instead_of_leaving_the_others_waiting():
    config = DataConfig(batch_size=3)
    train = ERCNModule(torch.nn.Identity(), TrainConfig(data=config))
    contrast = Contrastive(PretrainConfig(backbone="test_resnet", data=config), 0)
    dataset = SimpleNamespace(unreadable=lambda: [SimpleNamespace(image="a.png"), SimpleNamespace(image="b.png")])
    loader = SimpleNamespace(dataset=dataset, batch_size=3)
    for module, batch in ((train, None), (contrast, None), (contrast, {"views": torch.zeros(1, 2, 3, 8, 8)})):
        module.trainer = SimpleNamespace(world_size=1, global_rank=0, train_dataloader=loader)
        assert module.training_step(batch, 0) is None
        module.trainer = SimpleNamespace(world_size=2, global_rank=1, train_dataloader=loader)
        with pytest.raises(DataError, match="rank 1 of 2 has too few readable .* unreadable are a.png, b.png;"):
            module.training_step(batch, 0)


@pytest.mark.slow
def test_a_run_on_two_devices_validates_every_picture_once(tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    prepare(PrepareConfig(patients=24, size=64, fractions=(0.5, 0.3, 0.2), out=str(data), progress=False))
    bad = Manifest.load(data).split("train")[0]
    bad.image.write_bytes(b"")
    options = {
        "data.root": data,
        "data.image_size": 64,
        "data.batch_size": 3,
        "data.workers": 0,
        "model.backbone": "mobilenetv3_small_050",
        "model.embed_dim": 8,
        "loss.ecr": 0,  # leaves the refinement without a gradient
        "loss.consistency": 0,
        "run.out": out,
        "run.epochs": 2,
        "run.accelerator": "cpu",
        "run.devices": 2,
    }
    command = [sys.executable, "-m", "ercn", "train", *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200)
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    info = json.loads((out / "export" / "model.json").read_text())
    result = json.loads((out / "evaluation" / "val.json").read_text())
    assert len(rows) == 2 and result["pictures"] > 0
    assert [one["id"] for one in info["unreadable"]] == [bad.id]  # whichever rank met it
    best = rows[info["epoch"] - 1]
    for name in ("accuracy", "kappa"):
        assert float(best[f"val_{name}"]) == pytest.approx(result["metrics"][name]["value"], abs=1e-6)
    assert all(torch.isfinite(value).all() for value in load_file(out / "export" / "model.safetensors").values())
