"""k nearest neighbours and linear probe of frozen features, and the share of labels that training reads."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _unequal import GRADES, manifest
from sklearn.neighbors import KNeighborsClassifier

from ercn.checkpoint import load_weights
from ercn.config import DataConfig, PrepareConfig, PretrainConfig, RunConfig, TrainConfig
from ercn.data import Manifest, prepare
from ercn.data.loading import labelled
from ercn.models import create_backbone
from ercn.training import pretrain
from ercn.training.fit import class_weights
from ercn.training.loaders import GradedData, PictureData
from ercn.training.probing import TEMPERATURE, Probe, knn_predict, linear_predict

BACKBONE = "mobilenetv3_small_050"


def clusters(count, seed):
    """Features [count, 8] of four classes, and the classes; two of the classes overlap."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(0).normal(size=(4, 8)) * np.array([1, 1, 0.3, 0.3])[:, None]
    grade = rng.integers(0, 4, count)
    return (centers[grade] + 0.4 * rng.normal(size=(count, 8))).astype(np.float32), grade


@pytest.mark.parametrize("neighbours", [1, 7, 500])
def test_neighbours_vote_as_scikit_learns(neighbours):
    (train, grade), (test, _) = clusters(120, 1), clusters(1100, 2)  # more than one block of queries
    k = min(neighbours, len(train))
    judge = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp(-distance / TEMPERATURE))
    expected = judge.fit(train.astype(float), grade).predict(test.astype(float))
    agree = (knn_predict(train, grade, test, neighbours=neighbours) == expected).mean()
    assert agree > 0.998  # float32 votes that tie to the last bit may go either way


def test_the_linear_probe_finds_what_is_linear_and_ignores_scale():
    (train, grade), (test, truth) = clusters(400, 1), clusters(400, 2)
    scale = np.logspace(-3, 3, 8, dtype=np.float32)
    predicted = linear_predict(train, grade, test)
    assert (predicted == truth).mean() > 0.6 and (linear_predict(train * scale, grade, test * scale) == predicted).all()
    assert (linear_predict(train, np.full(400, 2), test) == 2).all()


def test_pretraining_says_how_good_its_features_are(tmp_path):
    data = DataConfig(root=str(tmp_path / "data"), image_size=64, batch_size=8, workers=0)
    prepare(PrepareConfig(patients=16, size=64, out=data.root, fractions=(0.6, 0.2, 0.2), progress=False))
    run = RunConfig(out=str(tmp_path / "run"), epochs=4, accelerator="cpu", resume=True, progress=False)
    config = PretrainConfig(data=data, run=run, backbone=BACKBONE, probe_every=3)
    pretrain(config)
    names = {"knn_accuracy", "knn_kappa", "linear_accuracy", "linear_kappa"}
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["knn_kappa"]) for row in rows] == [False, False, True, True]  # every third epoch, and the last
    state, info = load_weights(tmp_path / "run" / "export", "backbone", "", ())
    assert info["probe"].keys() == {"before", "after"} and info["probe"]["after"].keys() == names
    assert {name: float(rows[-1][name]) for name in names} == info["probe"]["after"]

    # measuring the export again, and resuming the finished run, give the same numbers
    backbone = create_backbone(BACKBONE, config.output_stride)
    backbone.load_state_dict(state)
    probe = Probe.of(Manifest.load(data.root), data, 1)
    assert probe.measure(backbone, torch.device("cpu")) == pytest.approx(info["probe"]["after"])
    assert backbone.training  # as it was
    pretrain(config)
    again = json.loads((tmp_path / "run" / "export" / "backbone.json").read_text())
    assert again["probe"]["before"] == info["probe"]["before"]
    assert again["probe"]["after"] == pytest.approx(info["probe"]["after"])


def test_without_grades_or_when_turned_off_nothing_is_probed():
    own = manifest()
    assert Probe.of(own, DataConfig(), 1) is not None
    assert Probe.of(own, DataConfig(), 0) is None
    assert Probe.of(replace(own, class_names=[]), DataConfig(), 1) is None
    assert Probe.of(replace(own, records=own.split("train")), DataConfig(), 1) is None


def test_a_share_of_the_labels_is_stratified_nested_and_by_patient():
    records = manifest().split("train")
    records = [replace(r, patient=f"{i // 2}") for i, r in enumerate(records)]  # two pictures each
    ids = {f: [r.id for r in labelled(records, f, seed=3)] for f in (0.01, 0.1, 0.5, 1.0)}
    assert ids[1.0] == [r.id for r in records]
    assert set(ids[0.01]) < set(ids[0.1]) < set(ids[0.5])
    worst = [max(GRADES[i], GRADES[i + 1]) for i in range(0, 100, 2)]  # of each patient
    for fraction, chosen in ids.items():
        patients = {int(i) // 2 for i in chosen}
        assert len(chosen) == 2 * len(patients)  # both pictures of each
        got = np.bincount([worst[p] for p in patients], minlength=5)
        expected = [max(1, round(fraction * n)) if n else 0 for n in np.bincount(worst, minlength=5)]
        assert got.tolist() == expected
    assert ids[0.1] == [r.id for r in labelled(records, 0.1, 3)]
    assert set(ids[0.1]) == {r.id for r in labelled(records[::-1], 0.1, 3)} != {r.id for r in labelled(records, 0.1, 4)}


def test_training_reads_the_share_and_pretraining_everything():
    own = manifest()
    config = DataConfig(label_fraction=0.2, balance="weights")
    data = GradedData(own, config, seed=1)
    assert data._records() == labelled(own.split("train"), 0.2, 1) and len(data._records()) == 20
    assert len(PictureData(own, config, seed=1)._records()) == 100
    counts = torch.bincount(torch.tensor([r.grade for r in data._records()]), minlength=5)
    weights = class_weights(TrainConfig(data=config, run=RunConfig(seed=1)), own)
    torch.testing.assert_close((weights * counts)[[0, 1, 2, 4]], torch.full((4,), 5.0))
    with pytest.raises(ValueError, match="label_fraction must be above 0"):
        DataConfig(label_fraction=0)
