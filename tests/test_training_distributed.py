"""Several processes: the same loss and gradients as one with all pictures, and whole runs that end as one would."""

import csv
import json
import os
import subprocess
import sys

import _ranks
import _steps
import pytest
import torch
from safetensors.torch import load_file

from ercn.config import PrepareConfig
from ercn.data import Manifest, prepare


@pytest.fixture(scope="module")
def whole():
    return {kind: _steps.gradient(kind) for kind in _steps.KINDS}



@pytest.mark.parametrize("counts", [(4, 2), (5, 0, 1)], ids=str)
def test_ranks_with_unequal_pictures_are_one_big_batch(counts, whole, tmp_path):
    assert _ranks.run(len(counts), _steps.save_gradients, counts, str(tmp_path)) == [0] * len(counts)
    for kind, expected in whole.items():
        ranks = [torch.load(tmp_path / f"{kind}-{rank}.pt") for rank in range(len(counts))]
        mean = 1 if kind == "train" else 1 / len(counts)  # every rank logs the contrastive loss of all pictures
        torch.testing.assert_close(sum(rank["logged"] for rank in ranks) * mean, expected["logged"])
        for rank in ranks:  # as DistributedDataParallel averages it
            torch.testing.assert_close(rank["grad"], expected["grad"], rtol=1e-9, atol=1e-12)
            if kind == "moco_v2":
                torch.testing.assert_close(rank["queue"], expected["queue"])


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
