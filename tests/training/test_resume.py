"""A killed run resumes to the same bits; a run's folder is never overwritten or mixed with another run."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ercn.config import DataConfig, LossConfig, ModelConfig, PrepareConfig, PretrainConfig, RunConfig, TrainConfig
from ercn.data import DataError, Manifest, prepare
from ercn.training import pretrain, train
from ercn.training.module import ERCNModule
from ercn.training.pretraining import Contrastive

MODEL = ModelConfig(backbone="mobilenetv3_small_050", embed_dim=16, pool_dim=16, dropout=0.2, refinement=("affinity",))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "data"
    prepare(PrepareConfig(patients=20, size=64, out=str(out), fractions=(0.6, 0.2, 0.2), progress=False))
    return str(out)


def train_config(data, out, **run):
    return TrainConfig(
        data=DataConfig(root=data, image_size=64, batch_size=4, workers=1),
        model=MODEL,
        loss=LossConfig(transform="all", ecr=1.0, consistency=0.1, warmup_epochs=1),
        run=RunConfig(out=str(out), accelerator="cpu", **{"epochs": 4, "lr": 3e-3, "ema": 0.9, **run}),
    )


def command(config):
    data, model, run = config.data, config.model, config.run
    options = {
        "data.root": data.root,
        "data.image_size": data.image_size,
        "data.batch_size": data.batch_size,
        "data.workers": data.workers,
        "model.backbone": model.backbone,
        "model.embed_dim": model.embed_dim,
        "model.pool_dim": model.pool_dim,
        "model.dropout": model.dropout,
        "loss.transform": config.loss.transform,
        "loss.warmup_epochs": config.loss.warmup_epochs,
        "run.out": run.out,
        "run.epochs": run.epochs,
        "run.lr": run.lr,
        "run.ema": run.ema,
        "run.accelerator": run.accelerator,
        "run.resume": str(run.resume).lower(),
    }
    return [sys.executable, "-m", "ercn", "train", *(f"--{name}={value}" for name, value in options.items())]


def epochs(out):
    """The rows of metrics.csv without the clock."""
    if not (out / "metrics.csv").exists():
        return []
    with open(out / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(train_config(data, whole)), check=True, env=environment, capture_output=True)

    process = subprocess.Popen(
        command(train_config(data, killed)),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the loader's workers die with it
    )
    deadline = time.monotonic() + 120
    while len(epochs(killed)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)  # into the third epoch
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(epochs(killed)) in (2, 3) and not (killed / "export").exists()

    resumed = command(train_config(data, killed, resume=True))
    output = subprocess.run(resumed, check=True, env=environment, capture_output=True, text=True).stdout
    assert "resuming after epoch" in output
    assert epochs(killed) == epochs(whole) and len(epochs(whole)) == 4
    weights = [load_file(out / "export" / "model.safetensors") for out in (whole, killed)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    states = [torch.load(out / "checkpoints" / "last.ckpt", weights_only=True) for out in (whole, killed)]
    for part in ("state_dict", "current_model_state"):  # the average and the current weights
        assert all(torch.equal(a, states[1][part][key]) for key, a in states[0][part].items())
    results = [json.loads((out / "evaluation" / "val.json").read_text()) for out in (whole, killed)]
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["simclr", "moco_v2"])
def test_interrupted_pretraining_resumes_to_the_same_weights(method, data, tmp_path, monkeypatch):
    def config(out, resume=False):
        return PretrainConfig(
            data=DataConfig(root=data, image_size=32, batch_size=6, workers=0),
            run=RunConfig(out=str(tmp_path / out), epochs=3, accelerator="cpu", resume=resume),
            backbone="mobilenetv3_small_050",
            method=method,
            projection_dim=8,
            queue_size=7,
        )

    pretrain(config("whole"))
    step = Contrastive.training_step

    def stop(self, batch, index):
        if (self.current_epoch, index) == (2, 1):
            raise RuntimeError("power cut")
        return step(self, batch, index)

    monkeypatch.setattr(Contrastive, "training_step", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(config("cut"))
    monkeypatch.undo()
    pretrain(config("cut", resume=True))
    whole, cut = (load_file(tmp_path / out / "export" / "backbone.safetensors") for out in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert epochs(tmp_path / "whole") == epochs(tmp_path / "cut")


def test_a_run_out_of_memory_goes_on_with_less_to_the_same_bits(data, tmp_path, monkeypatch):
    train(train_config(data, tmp_path / "whole", epochs=2))
    step = ERCNModule.training_step

    def fill(self, batch, index):
        if self.current_epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, batch, index)

    monkeypatch.setattr(ERCNModule, "training_step", fill)
    with pytest.raises(MemoryError, match="out of memory in epoch 2: a training step needs about .* by prediction"):
        train(train_config(data, tmp_path / "less", epochs=2))
    monkeypatch.undo()
    train(train_config(data, tmp_path / "less", epochs=2, resume=True, grad_checkpointing=True))
    whole, less = (load_file(tmp_path / out / "export" / "model.safetensors") for out in ("whole", "less"))
    assert all(torch.equal(whole[key], less[key]) for key in whole)
    assert epochs(tmp_path / "whole") == epochs(tmp_path / "less")


def test_a_folder_in_use_is_left_alone(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty, and nothing is overwritten"):
        train(train_config(data, tmp_path))
    with pytest.raises(ValueError, match="holds no config.yaml"):
        train(train_config(data, tmp_path, resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file"):
        train(train_config(data, tmp_path / "notes.txt"))


def test_resume_refuses_another_configuration_and_lets_a_run_be_longer(data, tmp_path, capsys):
    config = train_config(data, tmp_path / "run", epochs=1, resume=True)
    train(config)
    assert "nothing to resume" in capsys.readouterr().out
    other = replace(config, model=replace(config.model, embed_dim=8), run=replace(config.run, lr=1.0))
    with pytest.raises(ValueError, match=r"model.embed_dim was 16, now 8, run.lr was 0.003, now 1.0"):
        train(other)
    longer = replace(config, run=replace(config.run, epochs=2), data=replace(config.data, workers=0))
    train(longer)
    assert [row["epoch"] for row in epochs(tmp_path / "run")] == ["1", "2"]


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    config = train_config(data, tmp_path / "run", epochs=1)
    train(config)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole, longer = last.read_bytes(), replace(config, run=replace(config.run, epochs=2, resume=True))
    last.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="last.ckpt is damaged or no checkpoint of ercn"):
        train(longer)
    torch.save({"weights": torch.zeros(1)}, last)
    with pytest.raises(ValueError, match="last.ckpt is no checkpoint of a training run"):
        train(longer)
    saved = tmp_path / "run" / "config.yaml"
    last.write_bytes(whole)
    saved.write_text(saved.read_text().replace("embed_dim: 16", "embed_dim: 8"))
    words = r"last.ckpt holds the weights of another model .*1 of another shape \(model\.refin"
    with pytest.raises(ValueError, match=words):
        train(replace(longer, model=replace(config.model, embed_dim=8)))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_pictures_stop_a_run_in_one_sentence(data, tmp_path, workers):
    shutil.copytree(data, tmp_path / "data")
    bad = Manifest.load(tmp_path / "data").split("train")[0].image
    bad.write_bytes(b"not a picture")
    config = train_config(str(tmp_path / "data"), tmp_path / "run", epochs=1)
    config = replace(config, data=replace(config.data, workers=workers, max_unreadable=0))
    with pytest.raises(DataError) as raised:
        train(config)
    assert str(raised.value) == f"1 unreadable pictures, max_unreadable is 0: {bad}"


def test_skipped_training_pictures_are_kept_in_the_run(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    bad = Manifest.load(tmp_path / "data").split("train")[0]
    bad.image.write_bytes(b"not a picture")
    out = train(train_config(str(tmp_path / "data"), tmp_path / "run", epochs=1))
    (record,) = json.loads((out / "export" / "model.json").read_text())["unreadable"]
    assert record["id"] == bad.id
    assert "not a picture" in record["reason"] and str(tmp_path) not in record["reason"]
    assert f"<li>{bad.id}: " in (out / "report.html").read_text()


def test_devices_that_are_not_there_leave_no_folder(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = train_config(data, tmp_path / "run")
    with pytest.raises(ValueError, match="run.accelerator 'gpu', run.devices 3, .*: accelerator 'gpu' was asked for"):
        train(replace(config, run=replace(config.run, accelerator="gpu", devices=3)))
    assert not (tmp_path / "run").exists()
