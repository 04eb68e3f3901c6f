"""Several processes have the loss and gradients of one process with all pictures, and resume to the same bits."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import _ranks
import _steps
import pytest
import torch
from safetensors.torch import load_file

from ercn.config import DataConfig, LossConfig, ModelConfig, PrepareConfig, RunConfig, TrainConfig
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
        for rank in ranks:  # sums of thousands of terms in another order, each within float64's 2.2e-16
            torch.testing.assert_close(rank["grad"], expected["grad"], rtol=1e-9, atol=1e-12)
            if kind == "moco_v2":
                torch.testing.assert_close(rank["queue"], expected["queue"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 24 patients, one of them unreadable."""
    out = tmp_path_factory.mktemp("distributed") / "data"
    prepare(PrepareConfig(patients=24, size=64, fractions=(0.5, 0.3, 0.2), out=str(out), progress=False))
    Manifest.load(out).split("train")[0].image.write_bytes(b"")
    return str(out)


def config_of(data, out, **run):
    return TrainConfig(
        data=DataConfig(root=data, image_size=64, batch_size=2, workers=0),
        model=ModelConfig(backbone="test_resnet", embed_dim=8, pool_dim=8, dropout=0.2),
        loss=LossConfig(transform="all", ecr=0, consistency=0),  # leaves the refinement without a gradient
        run=RunConfig(out=str(out), epochs=3, accelerator="cpu", accumulate=2, ema=0.8, progress=False, **run),
    )


def rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_two_ranks_killed_at_a_random_step_resume_to_the_same_bits(data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _ranks.run(2, _steps.train_until, config_of(data, whole), None) == [0, 0]

    death = random.randrange(2), random.randrange(1, 3), random.randrange(6)
    codes = _ranks.run(2, _steps.train_until, config_of(data, killed), death)
    assert codes[death[0]] == -signal.SIGKILL and codes[1 - death[0]] > 0, death
    assert torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == death[1] - 1
    assert len(rows(killed)) == death[1] and not (killed / "export").exists()

    assert _ranks.run(2, _steps.train_until, config_of(data, killed, resume=True), None) == [0, 0]
    assert rows(killed) == rows(whole) and len(rows(whole)) == 3, death
    states = [torch.load(out / "checkpoints" / "last.ckpt", weights_only=True) for out in (whole, killed)]
    for part in ("state_dict", "current_model_state"):  # the average and the current weights
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items()), death
    weights = [load_file(out / "export" / "model.safetensors") for out in (whole, killed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()), death

    info = json.loads((whole / "export" / "model.json").read_text())
    result = json.loads((whole / "evaluation" / "val.json").read_text())
    assert [one["id"] for one in info["unreadable"]] == [Manifest.load(data).split("train")[0].id]  # by any rank
    best = rows(whole)[info["epoch"] - 1]
    for name in ("accuracy", "kappa"):  # each picture counts once, for the ranks and for one process
        assert float(best[f"val_{name}"]) == pytest.approx(result["metrics"][name]["value"], abs=1e-6)


def test_more_ranks_than_validation_pictures(tmp_path):
    """The others do not wait for a rank without pictures."""
    data, out = tmp_path / "data", tmp_path / "run"
    prepare(PrepareConfig(patients=10, size=64, fractions=(0.8, 0.1, 0.1), out=str(data), progress=False))
    pictures = len(Manifest.load(data).split("val"))
    assert pictures == 2
    config = config_of(str(data), out)
    assert _ranks.run(3, _steps.train_until, replace(config, run=replace(config.run, epochs=1)), None) == [0, 0, 0]
    result = json.loads((out / "evaluation" / "val.json").read_text())
    assert result["pictures"] == pictures
    assert float(rows(out)[0]["val_accuracy"]) == pytest.approx(result["metrics"]["accuracy"]["value"])


def test_a_rank_that_fails_ends_the_job_with_its_error(data, tmp_path):
    """Started on the command line with ``--run.devices 2``; one of the ranks reads the unreadable picture."""
    options = {
        "data.root": data,
        "data.image_size": 64,
        "data.batch_size": 3,
        "data.workers": 0,
        "data.max_unreadable": 0,
        "model.backbone": "test_resnet",
        "run.out": tmp_path / "run",
        "run.accelerator": "cpu",
        "run.devices": 2,
    }
    command = [sys.executable, "-m", "ercn", "train", *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, env=environment, text=True, timeout=200, check=False)
    assert result.returncode != 0
    assert "error: 1 unreadable pictures, max_unreadable is 0: " in result.stderr
