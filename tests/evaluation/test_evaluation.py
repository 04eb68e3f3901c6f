"""Evaluation on any data set: common grades, sets without grades, thresholds of validation only, several views."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _datasets import write_idrid_segmentation_tree
from _pictures import write_davis_tree
from _runs import SETTINGS, write_run

from ercn.checkpoint import load_model, save_weights
from ercn.config import EvaluateConfig, PrepareConfig
from ercn.data import Manifest, prepare
from ercn.data.loading import picture_dataset
from ercn.evaluation import collecting
from ercn.evaluation import evaluating as evaluation
from ercn.evaluation.calibration import temper
from ercn.evaluation.collecting import collect
from ercn.evaluation.filters import FILTERS, contrasts
from ercn.evaluation.localization import Localization
from ercn.evaluation.metrics import SPECIFICITIES, debiased_calibration_error
from ercn.evaluation.unet import UNet
from ercn.maps import NAMES, ceiling_of
from ercn.report.evaluation import Froc, IntervalAt, read_evaluations
from ercn.training import evaluate

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
    """Lists the runs whose reports would be written."""
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
    assert result.grading.threshold == info.thresholds["referable"] and result.temperature == info.temperature
    assert result.map_thresholds == "val of phantom"
    for name, values in result.localization.maps.items():
        assert values["iou"].threshold == info.thresholds["maps"][name]
    for kind, part in result.localization.lesions.items():
        for name, values in part.maps.items():
            known = info.thresholds["lesions"].get(kind)  # a lesion that validation has not seen has no threshold
            assert values["iou"].threshold == known[name] if known else "iou" not in values
    assert result.localization.optic_disc["excluded"] == result.localization.pictures > 0


def test_predictions_are_calibrated_and_the_error_before_is_told(root):
    result = evaluated(root)
    model, info = load_model(root / "run")
    manifest = Manifest.load(root / "phantom")
    raw = collect(model, info, manifest.split("test"), SETTINGS)
    saved = np.array([[float(row[f"p{k}"]) for k in range(5)] for row in predictions(root, "test")])
    np.testing.assert_allclose(saved, temper(raw.probability, info.temperature), atol=1e-6)
    truth = raw.grade

    def ece(probability):
        gaps = [
            abs((probability[own].max(1) - (probability[own].argmax(1) == truth[own])).sum())
            for b in range(15)
            if (own := np.clip(np.ceil(probability.max(1) * 15) - 1, 0, 14) == b).any()
        ]
        return sum(gaps) / len(truth)

    assert result.grading.metrics["ece_plugin"].value == pytest.approx(ece(saved), abs=1e-5)
    one, patients = np.ones((1, len(truth))), raw.patients
    assert result.pictures == len(patients) and result.patients == len(set(patients)) < len(patients)
    for name, probability in (("ece", saved), ("ece_uncalibrated", raw.probability)):
        value = debiased_calibration_error(probability, truth, patients, one)[0]
        assert result.grading.metrics[name].value == pytest.approx(value, abs=1e-4)


def test_the_filter_is_chosen_on_validation_and_measured_apart(root, monkeypatch):
    model, info = load_model(root / "run")
    validation = Manifest.load(root / "phantom").split("val")
    scores = {}
    for name in FILTERS:
        one = collect(model, replace(info, contrast=name), validation, SETTINGS).localization
        scores[name] = one.summary({}, draws=0, seed=0).references["contrast"]["aupr"].value
    assert info.contrast == max(scores, key=scores.get) and len(set(scores.values())) > 5
    tried = []

    def watched(picture, names):
        tried.append(tuple(names))
        return contrasts(picture, names)

    monkeypatch.setattr(collecting, "contrasts", watched)
    local = evaluated(root).localization
    assert set(tried) == {(info.contrast,)}
    assert set(local.references) == {"contrast", "stride_ceiling"} and not set(local.maps) - set(NAMES)
    assert local.references["contrast"]["iou"].threshold == info.thresholds["maps"]["contrast"]
    assert local.contrast == info.contrast


def test_an_export_that_knows_no_filter_gets_none_on_the_test_pictures(root, tmp_path):
    write_run(tmp_path / "run", root / "phantom")
    path = tmp_path / "run" / "export" / "model.json"
    exported = json.loads(path.read_text())
    del exported["contrast"], exported["thresholds"]["specificity"]
    path.write_text(json.dumps(exported))
    result = evaluated(tmp_path)
    assert list(result.localization.references) == ["stride_ceiling"]  # which needs no filter
    assert result.localization.contrast == ""
    assert result.grading.fixed_specificity["0.95"].keys() == {"threshold", "roc_sensitivity"}
    model, info = load_model(tmp_path / "run")
    collected = collect(model, info, Manifest.load(root / "phantom").split("test"), SETTINGS)
    assert info.contrast is None and collected.localization.references == {"stride_ceiling"}


def test_a_ceiling_is_measured_beside_the_maps_with_its_own_threshold(root, monkeypatch):
    """A stub of the U-Net: the green channel of pictures normalised as for its own training."""
    own = {"image_size": 64, "normalize": "none", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    seen = []

    class Green:
        info = own

        def __call__(self, image):
            seen.append(image * 0.5 + torch.tensor(own["mean"]).view(3, 1, 1))
            return seen[-1][:, 1].clamp(0, 1)

    monkeypatch.setattr(evaluation, "load_ceiling", lambda folder, device: Green())
    plain = evaluated(root).localization
    local = evaluated(root, ceiling="unet").localization
    assert set(local.references) == {"contrast", "stride_ceiling", "supervised"} and local.maps == plain.maps
    assert local.references["contrast"] == plain.references["contrast"]
    assert 0 < local.references["supervised"]["iou"].threshold < 1
    assert all(0 <= image.min() + 1e-5 and image.max() < 1 + 1e-5 for image in seen)  # normalised for the U-Net
    own["image_size"] = 96
    with pytest.raises(ValueError, match="ceiling unet was trained with image_size 96, the model with 64"):
        evaluated(root, ceiling="unet")


def test_a_trained_u_net_is_read_from_its_run(root):
    manifest = Manifest.load(root / "phantom")
    torch.manual_seed(0)
    network = UNet(2)
    about = {"width": 2, "image_size": 64, "mean": manifest.mean, "std": manifest.std, "normalize": "none"}
    about |= {"manifest": manifest.hash, "val_aupr": 0.0}
    save_weights(root / "unet" / "export", "ceiling", network.state_dict(), about)
    local = evaluated(root, ceiling=str(root / "unet")).localization
    _, info = load_model(root / "run")
    records, config = manifest.split("test"), info.config.data
    options = {"seed": 0, "augment": False, "with_masks": True}
    dataset = picture_dataset(records, manifest.mean, manifest.std, config, **options)
    own, stride = Localization(), Localization()
    with torch.inference_mode():
        for item in map(dataset.__getitem__, range(len(records))):
            heat = network.eval()(item["image"][None]).sigmoid()[0].numpy()
            *lesions, disc = item["masks"].numpy()
            patient = records[item["index"]].patient
            about = dict(zip(dataset.mask_kinds, lesions)), patient, disc
            own.add({"it": heat}, *about, healthy=item["grade"] == 0)
            best = ceiling_of(np.logical_or.reduce(lesions), (5, 5), True)  # 65 px at stride 16
            stride.add({"it": best}, *about, healthy=item["grade"] == 0)
    for name, counted in (("supervised", own), ("stride_ceiling", stride)):
        expected = counted.summary({}, draws=0, seed=0).maps["it"]
        for key in ("aupr", "froc", "pointing"):
            assert local.references[name][key].value == pytest.approx(expected[key].value)
    assert local.references["stride_ceiling"]["aupr"].value > 2 * local.maps["cam"]["aupr"].value


def test_what_is_read_is_what_was_written(root):
    """To the order of the keys: with and without grades, with several views, with and without masks."""
    write_idrid_segmentation_tree(root / "ungraded")
    data = prepared(root / "other", "idrid_segmentation", (0.5, 0.5, 0), root=str(root / "ungraded"))
    made = [evaluated(root), evaluated(root, flip=True), evaluated(root, data=str(root / "davis"), split="all")]
    made += [evaluated(root, data=str(data))]
    found, old = read_evaluations(root / "run")
    for result in made:
        text = (root / "run" / "evaluation" / f"{result.name}.json").read_text()
        assert json.dumps(found[result.name].as_dict(), indent=2) + "\n" == text
        assert found[result.name] == replace(result, views=found[result.name].views)  # a list for the tuple of scales
    cam = found["test"].localization.maps["cam"]
    assert isinstance(cam["iou"], IntervalAt) and isinstance(cam["froc"], Froc) and not old


INTERVAL = "value low high"
HEAT = {"": "threshold", "heat": INTERVAL, "area": INTERVAL, "alarm": INTERVAL}
MAP = {"iou": f"{INTERVAL} threshold", "recall": f"{INTERVAL} threshold", "froc": f"{INTERVAL} sensitivity"}
MAP |= {"aupr": INTERVAL, "aupr_picture": INTERVAL, "iou_best": INTERVAL, "pointing": INTERVAL}
OVER_LESIONS = {"lesion_aupr": INTERVAL, "lesion_iou": INTERVAL}
FLOOR = "aupr aupr_picture iou pointing"
KEYS = {
    "": "name notice dataset manifest temperature pictures patients class_names threshold confusion recall missing "
    "map_thresholds disclosure unreadable",
    "bootstrap": "draws seed unit interval",
    "views": "scales flip",
    "scale": "model data referable referable_from",
    "metrics": {
        "accuracy": INTERVAL,
        "kappa": INTERVAL,
        "f1": INTERVAL,
        "auc": INTERVAL,
        "referable_auc": INTERVAL,
        "referable_sensitivity": INTERVAL,
        "referable_specificity": INTERVAL,
        "ece": INTERVAL,
        "ece_uncalibrated": INTERVAL,
        "ece_plugin": INTERVAL,
        "brier": INTERVAL,
    },
    "fixed_specificity": {
        "*": {"": "threshold", "sensitivity": INTERVAL, "specificity": INTERVAL, "roc_sensitivity": INTERVAL}
    },
    "majority": "class accuracy kappa",
    "reliability": {"before": "pictures confidence accuracy", "after": "pictures confidence accuracy"},
    "roc": "fpr tpr",
    "localization": {
        "": "pictures patients count contrast",
        "maps": {"*": MAP | OVER_LESIONS},
        "references": {"*": MAP | OVER_LESIONS},
        "floor": FLOOR,
        "optic_disc": "excluded",
        "lesions": {
            "*": {"": "pictures patients count", "maps": {"*": MAP}, "references": {"*": MAP}, "floor": FLOOR}
        },
        "froc": "rates tolerance pictures healthy",
        "differences": {"": "map minus", "aupr": INTERVAL, "aupr_picture": INTERVAL, "iou": INTERVAL, "froc": INTERVAL},
    },
    "healthy": {"": "pictures patients", "maps": {"*": HEAT}, "references": {"*": HEAT}},
    "gallery": {
        "": "key truth predicted probability lesions",
        "panels": "picture cam refined_cam attention evidence mean lesions",
    },
}


def names(value):
    """Names in JSON, "" those of plain values and "*" any of equal parts; of a list, those of its first entry."""
    if isinstance(value, list):
        return names(value[0]) if value else None
    if not isinstance(value, dict):
        return None
    parts = {key: names(part) for key, part in value.items()}
    nested = {key: part for key, part in parts.items() if part is not None}
    plain = " ".join(key for key in parts if key not in nested)
    if not nested:
        return plain
    first = next(iter(nested.values()))
    if not plain and isinstance(first, dict) and all(part == first for part in nested.values()):
        return {"*": first}
    return ({"": plain} if plain else {}) | nested


def test_the_keys_of_an_evaluation_are_these(root):
    assert names(json.loads((root / "run" / "evaluation" / "val.json").read_text())) == KEYS


def test_healthy_eyes_are_those_of_grade_0_also_without_masks(root):
    result = evaluated(root)
    labels = [row["grade"] for row in predictions(root, "test")]
    assert result.healthy.pictures == labels.count("0") > 0
    _, info = load_model(root / "run")
    for name, values in result.healthy.maps.items():
        assert values["threshold"] == info.thresholds["maps"][name]
        assert values["heat"].low <= values["heat"].value <= values["heat"].high
        assert values["area"].value <= values["alarm"].value
    davis = evaluated(root, data=str(root / "davis"), split="all")
    labels = [row["grade"] for row in predictions(root, "davis-all")]
    assert davis.healthy.pictures == labels.count("0") > 0 and davis.healthy.references == {}
    assert davis.localization is None


def test_the_disclosure_says_which_masks_chose_the_thresholds(root):
    result = evaluated(root)
    assert "masks of val of phantom" in result.disclosure and "no lesion mask" in result.disclosure
    assert evaluated(root, data=str(root / "davis"), split="all").disclosure == result.disclosure


def test_specificities_are_fixed_on_validation(root):
    result = evaluated(root)
    model, info = load_model(root / "run")
    manifest = Manifest.load(root / "phantom")
    raw = collect(model, info, manifest.split("val"), SETTINGS)
    score = temper(raw.probability, info.temperature)[:, 2:].sum(1)
    for name in SPECIFICITIES:
        own = result.grading.fixed_specificity[name]
        assert (score[raw.grade < 2] < own["threshold"]).mean() >= float(name)
        assert own["threshold"] == info.thresholds["specificity"]["moderate"][name]
        assert {"sensitivity", "specificity", "roc_sensitivity"} < own.keys()


def test_a_model_of_icdr_grades_on_davis_data(root):
    result = evaluated(root, data=str(root / "davis"), split="all")
    assert result.name == "davis-all" and result.class_names == ["NDR", "SDR", "PPDR", "PDR"]
    assert result.scale["referable"] == ["PPDR", "PDR"] and result.scale["referable_from"] == "severe"
    _, info = load_model(root / "run")
    assert result.grading.threshold == info.thresholds["grades"]["severe"]
    rows = predictions(root, "davis-all")
    assert len(rows) == 18 and "p3" in rows[0] and "p4" not in rows[0]
    matrix = np.zeros((4, 4), int)
    for row in rows:
        assert row["class"] == row["grade"]
        matrix[int(row["class"]), int(row["predicted"])] += 1
    assert result.grading.confusion == matrix.tolist()
    assert result.localization is None


def test_a_model_of_davis_grades_on_icdr_data(root):
    write_run(root / "davis_run", root / "davis")
    result = evaluated(root, "davis_run", data=str(root / "phantom"))
    assert result.class_names == ["NDR", "SDR", "PPDR", "PDR"]
    assert {(row["grade"], row["class"]) for row in predictions(root, "phantom-test", "davis_run")} <= {
        *(("0", "0"), ("1", "1"), ("2", "1"), ("3", "2"), ("4", "3"))
    }
    assert result.map_thresholds == "val of phantom"  # Davis has no masks: thresholds of the tested set's own val
    assert all("iou" in values for values in result.localization.maps.values())


def test_referable_models_need_the_same_cut(root):
    write_run(root / "binary", root / "phantom", targets="referable")
    with pytest.raises(ValueError, match="not referable, referable .* davis has NDR, SDR, PPDR, PDR"):
        evaluated(root, "binary", data=str(root / "davis"))
    result = evaluated(root, "binary")
    assert result.class_names == ["not referable", "referable"] and result.scale["referable_from"] == "moderate"


def test_masks_without_grades_are_evaluated_for_localisation(root, reports):
    write_idrid_segmentation_tree(root / "idrid")
    data = prepared(root, "idrid_segmentation", (0.5, 0.5, 0), root=str(root / "idrid"))
    result = evaluated(root, data=str(data))
    assert result.grading is None and result.scale is None
    written = json.loads((root / "run" / "evaluation" / f"{result.name}.json").read_text())
    assert written["metrics"] is None and written["scale"] is None and "confusion" not in written
    assert set(result.localization.lesions) <= {"microaneurysms", "hemorrhages", "hard_exudates", "soft_exudates"}
    assert {row["class"] for row in predictions(root, result.name)} == {""} and reports == [root / "run"]
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
    assert several.name == "test-views" and several.views == {"scales": (1.0, 0.5), "flip": True}
    assert several.grading == plain.grading and several.map_thresholds == "val of phantom"
    cam = [result.localization.maps["cam"] for result in (plain, several)]
    assert cam[0]["aupr"] != cam[1]["aupr"]
    model, info = load_model(root / "run")
    records = Manifest.load(root / "phantom").split("val")
    val = collect(model, info, records, replace(SETTINGS, **several.views))
    chosen = val.localization.best_thresholds()
    local = several.localization
    assert {name: v["iou"].threshold for name, v in (local.maps | local.references).items()} == chosen
    assert {"test.json", "test-views.json"} <= {p.name for p in (root / "run" / "evaluation").iterdir()}


def test_thresholds_of_several_views_need_the_validation_pictures(root, tmp_path):
    """Without the training's data, the tested set's val split serves, and only for its test split."""
    write_run(tmp_path / "run", root / "phantom")
    path = tmp_path / "run" / "export" / "model.json"
    info = json.loads(path.read_text())
    info["config"]["data"]["root"] = str(tmp_path / "gone")
    path.write_text(json.dumps(info))
    options = {"data": str(root / "phantom"), "flip": True}
    assert evaluated(tmp_path, **options).map_thresholds == "val of phantom"
    result = evaluated(tmp_path, split="train", **options)
    assert result.map_thresholds is None and "iou" not in result.localization.maps["cam"]


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
