"""Evaluation on any data set: common grades, sets without grades, thresholds of validation only, several views."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from _datasets import write_idrid_segmentation_tree
from _pictures import write_davis_tree
from _runs import OPTIONS, write_run

from ercn.config import EvaluateConfig, PrepareConfig
from ercn.data import Manifest, prepare
from ercn.training import evaluate, evaluation
from ercn.training.calibration import temper
from ercn.training.checkpoint import load_model
from ercn.training.evaluation import collect
from ercn.training.infer import Views

SMALL = {"size": 64, "workers": 1, "progress": False}


def prepared(folder, dataset, fractions=(0.4, 0.3, 0.3), **options):
    return prepare(PrepareConfig(dataset=dataset, out=str(folder / dataset), fractions=fractions, **SMALL, **options))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    prepared(root, "phantom", patients=16)
    write_davis_tree(root / "published", patients=6)
    prepared(root, "davis", root=str(root / "published"))
    write_run(root / "run", root / "phantom")
    return root


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """Counts the reports instead of drawing them, each of all evaluations so far."""
    written = []
    monkeypatch.setattr(evaluation, "write_report", written.append)
    return written


def evaluated(root, run="run", **options):
    fixed = {"batch_size": 16, "workers": 0, "bootstrap": 20, "progress": False}
    return evaluate(EvaluateConfig(run=str(root / run), **fixed, **options))


def predictions(root, name, run="run"):
    with open(root / run / "evaluation" / f"{name}_predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_is_chosen_on_the_split_that_is_evaluated(root):
    result = evaluated(root)
    _, info = load_model(root / "run")
    assert result["threshold"] == info["thresholds"]["referable"] and result["temperature"] == info["temperature"]
    assert result["map_thresholds"] == "val of phantom"
    for name, values in result["localization"]["maps"].items():
        assert values["iou"]["threshold"] == info["thresholds"]["maps"][name]
    for kind, part in result["localization"]["lesions"].items():
        for name, values in part["maps"].items():
            known = info["thresholds"]["lesions"].get(kind)  # a lesion that validation has not seen has no threshold
            assert values.get("iou", {}).get("threshold") == (known[name] if known else None)
    assert result["localization"]["optic_disc"]["excluded"] == result["localization"]["pictures"] > 0


def test_predictions_are_calibrated_and_the_error_before_is_told(root):
    result = evaluated(root)
    model, info = load_model(root / "run")
    manifest = Manifest.load(root / "phantom")
    raw = collect(model, info, manifest.split("test"), **OPTIONS)
    saved = np.array([[float(row[f"p{k}"]) for k in range(5)] for row in predictions(root, "test")])
    np.testing.assert_allclose(saved, temper(raw.probability, info["temperature"]), atol=1e-6)
    truth = raw.grade

    def ece(probability):
        gaps = [
            abs((probability[own].max(1) - (probability[own].argmax(1) == truth[own])).sum())
            for b in range(15)
            if (own := np.clip(np.ceil(probability.max(1) * 15) - 1, 0, 14) == b).any()
        ]
        return sum(gaps) / len(truth)

    assert result["metrics"]["ece_uncalibrated"]["value"] == pytest.approx(ece(raw.probability))
    assert result["metrics"]["ece"]["value"] == pytest.approx(ece(saved), abs=1e-5)


def test_a_model_of_icdr_grades_on_davis_data(root):
    result = evaluated(root, data=str(root / "davis"), split="all")
    assert result["name"] == "davis-all" and result["class_names"] == ["NDR", "SDR", "PPDR", "PDR"]
    assert result["scale"]["referable"] == ["PPDR", "PDR"] and result["scale"]["referable_from"] == "severe"
    _, info = load_model(root / "run")
    assert result["threshold"] == info["thresholds"]["grades"]["severe"]
    rows = predictions(root, "davis-all")
    assert len(rows) == 18 and "p3" in rows[0] and "p4" not in rows[0]
    matrix = np.zeros((4, 4), int)
    for row in rows:
        assert row["class"] == row["grade"]
        matrix[int(row["class"]), int(row["predicted"])] += 1
    assert result["confusion"] == matrix.tolist()
    assert result["localization"] is None


def test_a_model_of_davis_grades_on_icdr_data(root):
    write_run(root / "davis_run", root / "davis")
    result = evaluated(root, "davis_run", data=str(root / "phantom"))
    assert result["class_names"] == ["NDR", "SDR", "PPDR", "PDR"]
    assert {(row["grade"], row["class"]) for row in predictions(root, "phantom-test", "davis_run")} <= {
        *(("0", "0"), ("1", "1"), ("2", "1"), ("3", "2"), ("4", "3"))
    }
    assert result["map_thresholds"] == "val of phantom"  # Davis has no masks: thresholds of the tested set's own val
    assert all("iou" in values for values in result["localization"]["maps"].values())


def test_referable_models_need_the_same_cut(root):
    write_run(root / "binary", root / "phantom", targets="referable")
    with pytest.raises(ValueError, match="not referable, referable .* davis has NDR, SDR, PPDR, PDR"):
        evaluated(root, "binary", data=str(root / "davis"))
    result = evaluated(root, "binary")
    assert result["class_names"] == ["not referable", "referable"] and result["scale"]["referable_from"] == "moderate"


def test_masks_without_grades_are_evaluated_for_localisation(root, reports):
    write_idrid_segmentation_tree(root / "idrid")
    data = prepared(root, "idrid_segmentation", (0.5, 0.5, 0), root=str(root / "idrid"))
    result = evaluated(root, data=str(data))
    assert result["metrics"] is None and result["scale"] is None and "confusion" not in result
    assert set(result["localization"]["lesions"]) <= {"microaneurysms", "hemorrhages", "hard_exudates", "soft_exudates"}
    assert {row["class"] for row in predictions(root, result["name"])} == {""} and reports == [root / "run"]
    assert "localisation only" in (root / "run" / "export" / "model_card.md").read_text()


def test_neither_grades_nor_masks_is_an_error(root, tmp_path):
    write_idrid_segmentation_tree(root / "bare")
    for mask in (root / "bare").rglob("*.tif"):
        mask.unlink()
    data = prepared(tmp_path, "idrid_segmentation", root=str(root / "bare"))
    with pytest.raises(ValueError, match="neither grades nor lesion masks in the test split"):
        evaluated(root, data=str(data))


def test_several_views_have_their_own_name_and_thresholds(root):
    plain, several = evaluated(root), evaluated(root, scales=(1.0, 0.5), flip=True)
    assert several["name"] == "test-views" and several["views"] == {"scales": (1.0, 0.5), "flip": True}
    assert several["metrics"] == plain["metrics"] and several["map_thresholds"] == "val of phantom"
    cam = [result["localization"]["maps"]["cam"] for result in (plain, several)]
    assert cam[0]["aupr"] != cam[1]["aupr"]
    model, info = load_model(root / "run")
    records = Manifest.load(root / "phantom").split("val")
    val = collect(model, info, records, views=Views(**several["views"]), **OPTIONS)
    chosen = val.localization.best_thresholds()
    assert {name: v["iou"]["threshold"] for name, v in several["localization"]["maps"].items()} == chosen
    assert {"test.json", "test-views.json"} <= {p.name for p in (root / "run" / "evaluation").iterdir()}


def test_thresholds_of_several_views_need_the_validation_pictures(root, tmp_path):
    """Where the training's data are gone, the tested set's own validation serves, and on other splits none."""
    write_run(tmp_path / "run", root / "phantom")
    path = tmp_path / "run" / "export" / "model.json"
    info = json.loads(path.read_text())
    info["config"]["data"]["root"] = str(tmp_path / "gone")
    path.write_text(json.dumps(info))
    options = {"data": str(root / "phantom"), "flip": True}
    assert evaluated(tmp_path, **options)["map_thresholds"] == "val of phantom"
    result = evaluated(tmp_path, split="train", **options)
    assert result["map_thresholds"] is None and "iou" not in result["localization"]["maps"]["cam"]


def test_patients_of_the_training_are_an_error(root):
    again = prepare(
        PrepareConfig(dataset="davis", root=str(root / "published"), out=str(root / "again"), seed=1, **SMALL)
    )
    write_run(root / "davis_run", root / "davis")
    seen = {r.patient for r in Manifest.load(root / "davis").records if r.split != "test"}
    both = sorted(seen & {r.patient for r in Manifest.load(again).records})
    with pytest.raises(ValueError, match=f"{len(both)} patients of this davis split were in the training: {both[0]}"):
        evaluated(root, "davis_run", data=str(again), split="all")


def test_edema_grades_are_no_retinopathy_grades(root):
    manifest = replace(Manifest.load(root / "davis"), class_names=["no DME", "referable DME"])
    _, info = load_model(root / "run")
    with pytest.raises(ValueError, match="no common grades: .*proliferative.*davis has no DME, referable DME"):
        evaluation.ground_of(info, manifest)
