"""`ercn ablate` and `ercn select`: the grid, its cells, each once, the table, and the choice on validation."""

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from ercn.ablation import runner as ablation
from ercn.ablation import selection
from ercn.ablation import table as ablation_table
from ercn.ablation.grid import Grid, Row, ceiling_config, cells, load_grid, prepare_config, with_options
from ercn.checkpoint import load_model
from ercn.cli import parse
from ercn.config import AblateConfig, EvaluateConfig, PretrainConfig, SelectConfig, TrainConfig, from_dict, preset
from ercn.data import Manifest, prepare
from ercn.evaluation import evaluating as evaluation
from ercn.training import ablate, evaluate, fit, pretraining, select

BACKBONE = "mobilenetv3_small_050"
GRID = {
    "seeds": [0, 1],
    "prepare": {"size": 64, "patients": 24, "fractions": [0.4, 0.3, 0.3], "progress": False, "workers": 0},
    "pretrain": {"SimCLR": {"backbone": BACKBONE, "data.image_size": 64, "data.workers": 0, "run.epochs": 1}},
    "options": {
        "data.image_size": 64,
        "data.workers": 0,
        "model.backbone": BACKBONE,
        "model.embed_dim": 8,
        "loss.transform": "flip",
        "run.epochs": 1,
        "run.accelerator": "cpu",
    },
    "choose": {"kappa": 1, "aupr_refined_cam": 2.5},
    "ceiling": {"width": 2, "run.epochs": 1, "data.batch_size": 4},
    "rows": [
        {
            "group": "parts",
            "name": "CAM",
            "options": {"model.pool": "none", "model.fusion": "cam", "model.refinement": []},
        },
        {
            "group": "parts",
            "name": "+ PAMR",
            "base": "CAM",
            "train": False,
            "options": {
                "model.refinement": ["pamr"],
                "model.pamr_steps": 2,
                "model.confidence": "relative",
                "model.mask": "hard",
            },
        },
        {"group": "other", "name": "no such backbone", "options": {"model.backbone": "resnot"}},
        {"group": "other", "name": "other shapes", "base": "CAM", "train": False, "options": {"model.embed_dim": 4}},
        {"group": "other", "name": "gated", "pretrain": "SimCLR"},
        {"group": "other", "name": "gated, once more", "base": "gated"},
    ],
}


FAILED = "4 of 10 cells failed; .*: no such backbone, seed 0; other shapes, seed 0; no such backbone, seed 1; other"


@pytest.fixture(scope="module", autouse=True)
def no_reports():
    """Turns off slow parts that are not tested here: reports, bootstrap draws of a run's validation, collections."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "BOOTSTRAP", 10)
        for module in (fit, pretraining, evaluation):
            patch.setattr(module, "write_report", lambda run: None)
        for module in (fit, evaluation):
            patch.setattr(module, "print_metrics", lambda result: None)
        patch.setattr(ablation, "gc", SimpleNamespace(collect=lambda: None))
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Results of ``select`` on the grid above, without test pictures, then of ``ablate``; two of its rows fail."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    out = folder / "out"
    manifest = Manifest.load(prepare(prepare_config(from_dict(Grid, GRID), out)))
    hidden = [path for r in manifest.split("test") for path in (r.image, r.optic_disc, *r.masks.values())]
    assert len(hidden) > 14
    for path in hidden:
        path.rename(f"{path}.hidden")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=FAILED):
        patch.setattr(selection, "LEAST_SEEDS", 2)
        select(choice(folder))
    for path in hidden:
        Path(f"{path}.hidden").rename(path)
    assert not list(out.glob("*/*/test.*"))
    trained = {path: path.stat().st_mtime_ns for path in out.glob("*/*/export/*.safetensors")}
    with pytest.raises(ValueError, match=FAILED):
        ablate(config(folder))
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*/export/*.safetensors")} == trained
    assert len(trained) == 2 + 4 + 1
    return out


def config(folder):
    return AblateConfig(grid=str(folder / "grid.yaml"), out=str(folder / "out"), bootstrap=100)


def choice(folder):
    return SelectConfig(grid=str(folder / "grid.yaml"), out=str(folder / "out"), bootstrap=100)


def planned(out):
    grid = from_dict(Grid, GRID)
    root = prepare_config(grid, out).out
    return cells(grid, out, root, Manifest.load(root).hash)


def table(out):
    return {row["name"]: row for row in json.loads((out / "ablation.json").read_text())["rows"]}


def test_a_failed_cell_is_told_and_the_others_have_results(out):
    rows, failed = table(out), ("no such backbone", "other shapes")
    assert all(rows[name]["values"] == {} and rows[name]["seeds"] == [] for name in failed)
    assert all(rows[name]["seeds"] == [0, 1] for name in rows if name not in failed)
    log = {name: Path(f"{planned(out)[name, 0].folder}.txt").read_text() for name in failed}
    assert "unknown backbone 'resnot'" in log["no such backbone"]
    assert "than the options of this row describe, which has train: false: " in log["other shapes"]
    assert "of another shape (refinement." in log["other shapes"]
    pooled = ("attention", "evidence")
    assert rows["CAM"]["values"].keys() == {c for c in ablation_table.COLUMNS if not c.endswith(pooled)}
    assert rows["gated"]["values"].keys() == ablation_table.COLUMNS.keys()


def test_values_are_those_of_evaluate(out):
    """A cell's folder is a run like any other; its own evaluation says the same, intervals included."""
    folder = planned(out)["gated", 1].folder
    result = evaluate(EvaluateConfig(run=str(folder), workers=0, bootstrap=100, seed=ablation_table.SEED))
    mine = ablation_table.draws_of(folder, 100, "test")
    local = result.localization
    gains = {f"gain_{entry['map']}": entry for entry in local.differences}
    assert mine.keys() == ablation_table.COLUMNS.keys() | {
        f"{key}_{name}" for key in ("aupr", "froc", "iou") for name in ("contrast", "stride_ceiling")
    }
    for name, entry in mine.items():
        key, _, map_name = name.partition("_")
        theirs = result.grading.metrics
        if key in ("aupr", "iou", "froc"):
            theirs = (local.maps | local.references)[map_name]
        elif key == "heat":
            theirs = result.healthy.maps[map_name]
        elif key == "gain":
            theirs, key = gains[name], "aupr"
        else:
            key = name
        assert entry[0] == pytest.approx(theirs[key].value, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(
            np.nanpercentile(entry[1:], [2.5, 97.5]), [theirs[key].low, theirs[key].high], rtol=0.15, atol=0.02
        )
    assert table(out)["gated"]["values"]["kappa"]["each"][1] == mine["kappa"][0]


def test_rows_of_one_configuration_share_cells_and_their_difference_is_zero(out):
    rows = table(out)
    assert rows["gated"]["cells"] == rows["gated, once more"]["cells"]
    for entry in rows["gated, once more"]["difference"].values():
        assert entry["value"] == entry["low"] == entry["high"] == 0
    assert rows["gated"]["difference"] == {}


def test_a_row_that_is_not_trained_has_the_weights_of_its_base(out):
    own, base = planned(out)["+ PAMR", 0], planned(out)["CAM", 0]
    assert own.weights == base.folder and not (own.folder / "export").exists()
    a, b = (np.load(cell.folder / "test.npz") for cell in (own, base))
    np.testing.assert_array_equal(a["probability"], b["probability"])
    np.testing.assert_array_equal(a["counts_cam"], b["counts_cam"])
    assert (a["counts_refined_cam"] != b["counts_refined_cam"]).any()


@pytest.mark.parametrize("field", ["flat_cam", "contrast"])
def test_a_cell_that_an_older_version_trained_is_named(out, tmp_path, field):
    cell = planned(out)["CAM", 0]
    shutil.copytree(cell.folder, tmp_path / "cell")
    path = tmp_path / "cell" / "export" / "model.json"
    about = json.loads(path.read_text())
    del about[field]
    path.write_text(json.dumps(about))
    own = replace(cell, config=replace(cell.config, run=replace(cell.config.run, out=str(tmp_path / "cell"))))
    with pytest.raises(ValueError, match="cell was trained by an older version of ercn; remove it"):
        ablation._run(own, Manifest.load(cell.config.data.root), "test")


def test_finished_cells_are_kept_and_failed_ones_tried_again(out, monkeypatch):
    ran = []
    monkeypatch.setattr(ablation, "_run", lambda cell, manifest, split: ran.append(cell.config.model))
    before = {path: path.read_bytes() for path in out.glob("cells/*/test.*")}
    assert len(before) == 2 * 6
    monkeypatch.setattr(ablation_table, "_figure", lambda rows: Figure())
    ablate(config(out.parent))
    assert len(ran) >= 4 and all(model.backbone == "resnot" or model.embed_dim == 4 for model in ran)
    assert {path: path.read_bytes() for path in out.glob("cells/*/test.*")} == before
    (out / "cells" / planned(out)["CAM", 1].folder.name / "test.json").rename(out / "hidden.json")
    try:
        ablate(config(out.parent))  # the table without that cell
        assert table(out)["CAM"]["seeds"] == [0] and "CAM (1 of 2 seeds)" in (out / "ablation.md").read_text()
    finally:
        (out / "hidden.json").rename(planned(out)["CAM", 1].folder / "test.json")
        ablate(config(out.parent))


def test_files_of_the_table_agree(out):
    rows = table(out)
    with open(out / "ablation.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["values"]) for row in rows.values())
    line = next(line for line in lines if (line["row"], line["column"]) == ("+ PAMR", "aupr_refined_cam"))
    value = rows["+ PAMR"]["values"]["aupr_refined_cam"]
    assert float(line["value"]) == pytest.approx(value["value"], abs=1e-4) and line["base"] == "CAM"
    assert value["value"] == pytest.approx(np.mean(value["each"])) and len(value["each"]) == 2
    assert [float(line[f"seed {seed}"]) for seed in (0, 1)] == pytest.approx(value["each"], abs=1e-4)
    text = (out / "ablation.md").read_text()
    assert f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})" in text
    assert "| SimCLR |" in text  # what its features were worth
    assert "phantom (size 64, seed 0, patients 24, difficulty standard)" in text and "14 test" in text
    gain = rows["+ PAMR"]["values"]["gain_refined_cam"]
    own = rows["+ PAMR"]["values"]
    assert gain["value"] == pytest.approx(own["aupr_refined_cam"]["value"] - own["aupr_cam"]["value"])
    assert f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" in text
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_of_seeds_is_drawn_with_the_same_patients():
    """Two seeds that err on opposite patients: their mean varies less than either of them."""
    draws = np.random.default_rng(0).normal(size=1000)
    seeds = [{"kappa": np.append(0.5, 0.5 + 0.1 * draws)}, {"kappa": np.append(0.7, 0.7 - 0.1 * draws)}]
    entry = ablation_table.summary(seeds)["kappa"]
    assert entry["value"] == pytest.approx(0.6) and entry["low"] == pytest.approx(entry["high"])
    assert entry["sd"] == pytest.approx(np.std([0.5, 0.7], ddof=1)) and entry["each"] == [0.5, 0.7]


def test_references_are_told_once_with_the_rows_that_they_are_beside(out):
    found = json.loads((out / "ablation.json").read_text())["references"]
    assert [entry["name"] for entry in found] == ["contrast", "stride_ceiling", "supervised"]
    rows = ["CAM", "+ PAMR", "gated", "gated, once more"]
    assert found[0]["rows"] == found[1]["rows"] == rows and found[1]["detail"] == "an element for 16 px of 64"
    for cell in (planned(out)["CAM", 0], planned(out)["gated", 1]):
        draws = ablation_table.draws_of(cell.folder, 100, "test")
        assert [found[i]["aupr"]["value"] for i in (0, 1)] == [
            draws["aupr_contrast"][0],
            draws["aupr_stride_ceiling"][0],
        ]
        assert found[0]["detail"] == load_model(cell.folder)[1].contrast


def test_the_supervised_ceiling_is_that_of_evaluate(out):
    grid = from_dict(Grid, GRID)
    root = prepare_config(grid, out).out
    ceiling = ceiling_config(grid, out, root, Manifest.load(root).hash)
    assert ceiling.width == 2 and ceiling.data.image_size == 64 and ceiling.data.batch_size == 4
    run = planned(out)["CAM", 0].folder
    result = evaluate(EvaluateConfig(run=str(run), workers=0, bootstrap=1, ceiling=ceiling.run.out))
    theirs = result.localization.references["supervised"]
    mine = json.loads((out / "ablation.json").read_text())["references"][2]
    for key in ("aupr", "froc"):
        assert mine[key]["value"] == pytest.approx(theirs[key].value, rel=1e-6)
    given = ablation._ceiling_of(replace(grid, ceiling=ceiling.run.out), out, Manifest.load(root))
    assert given.config is None and given.folder != given.run == Path(ceiling.run.out)
    with pytest.raises(FileNotFoundError, match="ceiling.safetensors is missing; ercn ceiling writes it"):
        ablation._ceiling_of(replace(grid, ceiling=str(out)), out, Manifest.load(root))


def test_a_claimed_folder_is_left_to_its_owner(tmp_path):
    with ablation._claimed(tmp_path / "cell", wait=True) as mine, ablation._claimed(tmp_path / "cell", False) as again:
        assert mine and not again
    with ablation._claimed(tmp_path / "cell", wait=False) as mine:
        assert mine


def test_the_packaged_grids_are_what_they_name(tmp_path):
    grid = load_grid("phantom")
    plan = cells(grid, tmp_path, "data", "hash")
    configs = {name: cell.config for (name, seed), cell in plan.items() if seed == grid.seeds[0]}
    for name in ("demo", "seam", "chikontwe"):
        recipe = preset(name)
        kept = {"backbone": "", "output_stride": 8, "embed_dim": 64}
        assert replace(configs[name].model, **kept) == replace(recipe.model, **kept)
        assert configs[name].loss == recipe.loss
    folders = {name: plan[name, 0].folder for name in configs}
    assert folders["demo"] == folders["affinity and PAMR"] == folders["ER"] == folders["untrained"]
    assert len({cell.config.run.seed for cell in plan.values()}) == len(grid.seeds) >= 5
    chosen_by = load_grid("select")
    assert chosen_by.choose and len(chosen_by.seeds) >= 5
    assert chosen_by.prepare["seed"] != grid.prepare["seed"]  # of which the test pictures are


def test_a_cell_is_known_by_what_matters(tmp_path):
    grid = from_dict(Grid, GRID)
    names = {key: cell.folder.name for key, cell in cells(grid, tmp_path, "data", "hash").items()}
    elsewhere = cells(replace(grid, options=grid.options | {"data.workers": 3}), Path("x"), "y", "hash")
    assert {key: cell.folder.name for key, cell in elsewhere.items()} == names
    for changed in (
        cells(replace(grid, options=grid.options | {"run.lr": 0.1}), tmp_path, "data", "hash"),
        cells(grid, tmp_path, "data", "other pictures"),
    ):
        assert not set(names.values()) & {cell.folder.name for cell in changed.values()}
    other = replace(grid, pretrain={"SimCLR": grid.pretrain["SimCLR"] | {"temperature": 0.1}})
    for key, cell in cells(other, tmp_path, "data", "hash").items():
        assert (cell.folder.name != names[key]) == key[0].startswith("gated")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "rows and seeds must have at least one entry"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "'a' is given twice"),
        ({"rows": [{"name": "a", "base": "b"}]}, "'a' builds on 'b', which is no earlier row"),
        ({"rows": [{"name": "a", "train": False}]}, "'a' is not trained, so it needs a base"),
        ({"rows": [{"name": "a", "pretrain": "BYOL"}]}, "the pre-training 'BYOL'; there is SimCLR"),
        ({"rows": [{"name": "a", "options": {"model.pol": 1}}]}, "row 'a': model.pol is no option of TrainConfig"),
        ({"rows": [{"name": "a", "options": {"model.mask": False}}]}, "row 'a': model.mask must be one of .*got False"),
        ({"rows": [{"name": "a", "options": {"run.lr.x": 1}}]}, "row 'a': run.lr.x is no option"),
        ({"colour": 1}, "unknown key colour; Grid has rows, seeds"),
        ({"ceiling": 3}, "ceiling must be a folder, or options of ercn ceiling; got 3"),
    ],
)
def test_a_grid_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cells(from_dict(Grid, GRID | change), Path("x"), "data", "hash")


def test_grids_are_files_or_packaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no packaged grid: phantom"):
        load_grid("fantom")
    (tmp_path / "bad.yaml").write_text("rows: [")
    with pytest.raises(ValueError, match="bad.yaml"):
        load_grid(str(tmp_path / "bad.yaml"))


def test_options_change_what_they_name_and_nothing_else():
    config = with_options(TrainConfig(), {"model.mask_thresholds": [0.5], "run.lr": 1, "init": "x"}, "here")
    assert config.model.mask_thresholds == (0.5,) and config.run.lr == 1.0 and config.init == "x"
    assert asdict(with_options(PretrainConfig(), {}, "here")) == asdict(PretrainConfig())
    assert Row("a").train


def test_the_choice_is_the_highest_weighted_sum_of_means_on_validation(out):
    result = json.loads((out / "selection.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert result["data"]["split"] == "val" and "test" not in result["data"]["pictures"]
    for name in ("CAM", "+ PAMR", "gated", "gated, once more"):
        values, score = rows[name]["values"], rows[name]["score"]
        each = [k + 2.5 * a for k, a in zip(values["kappa"]["each"], values["aupr_refined_cam"]["each"])]
        assert score["each"] == pytest.approx(each) and score["value"] == pytest.approx(np.mean(each))
        val = json.loads(
            (planned(out)[name, 1].weights or planned(out)[name, 1].folder).joinpath("evaluation/val.json").read_text()
        )
        assert values["kappa"]["each"][1] == pytest.approx(val["metrics"]["kappa"]["value"])
    assert rows["no such backbone"]["place"] == "2 seeds are missing" and rows["no such backbone"]["score"] is None
    scores = {name: rows[name]["score"]["value"] for name in rows if rows[name]["score"]}
    alive = {name: score for name, score in scores.items() if not ablation_table.lost(rows[name])} or scores
    best = max(alive, key=alive.get)
    assert result["chosen"]["row"] == best and rows[best]["place"].startswith("chosen")
    assert {entry["group"] for entry in result["groups"]} == {"parts", "other"}
    second = result["chosen"]["second"]
    assert rows[second]["cells"] != rows[best]["cells"]
    assert result["chosen"]["margin"]["value"] == pytest.approx(scores[best] - scores[second])


def test_the_choice_is_written_for_people_and_for_train(out):
    result = json.loads((out / "selection.json").read_text())
    best, text = result["chosen"]["row"], (out / "selection.md").read_text()
    assert f"Chosen: **{best}**" in text and "the test split was not read" in text
    assert "these very pictures, so it is the best there is here" in text and "figures are of the val split" in text
    with open(out / "selection.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["column"] == "score"]
    assert [line["row"] for line in lines] == ["CAM", "+ PAMR", "gated", "gated, once more"]
    assert next(line["place"] for line in lines if line["row"] == best).startswith("chosen")
    config = parse("train", TrainConfig, ["--config", str(out / "chosen.yaml")])
    run = planned(out)[best, 0].config
    assert config == replace(run, run=replace(run.run, out="runs/ercn", resume=False, progress=True))


def row(name, scores, flat=(0, 0), **other):
    return {
        "name": name,
        "score": {"value": np.mean(scores)},
        "cells": [name],
        "seeds": [0, 1],
        "flat_cam": flat,
    } | other


def test_a_row_that_loses_its_cam_wins_only_over_its_like():
    scores = {"a": (0.9, 0.9), "b": (0.5, 0.7), "c": (0.4, 0.6)}
    drawn = {name: np.tile(np.array(each)[:, None], (1, 11)) for name, each in scores.items()}
    a, b, c = row("a", scores["a"], (0, 0.6)), row("b", scores["b"], (0.5, 0)), row("c", scores["c"])
    best = selection._best([c, a, b], drawn)
    assert (best["row"], best["second"], best["beyond"], best["ahead"]) == ("b", "c", True, 2)
    assert best["margin"]["value"] == pytest.approx(0.1)
    assert selection._best([row("b", scores["b"], (1, 1)), a], drawn)["row"] == "a"
    alone = selection._best([b, row("b again", scores["b"], cells=["b"])], drawn)
    assert alone["row"] == "b" and alone["second"] is None


def test_the_margin_is_paired_over_patients():
    """Each row varies a lot, both in the same draws; the difference does not."""
    draws = np.random.default_rng(0).normal(size=(1, 500))
    drawn = {"a": np.append([[0.6]], 0.6 + draws, 1), "b": np.append([[0.5]], 0.5 + draws, 1)}
    best = selection._best([row("a", [0.6]), row("b", [0.5])], drawn)
    assert best["beyond"] and best["margin"]["low"] == pytest.approx(0.1)
    other = selection._best([row("a", [0.6]), row("b", [0.5])], drawn | {"b": np.append([[0.5]], 0.5 - draws, 1)})
    assert other["row"] == "a" and not other["beyond"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "to choose takes at least 5 seeds; the grid has 2"),
        ({"seeds": [0, 1, 2, 3, 3]}, "at least 5 seeds; the grid has 4"),
        ({"seeds": [0, 1, 2, 3, 4], "choose": {}}, "choose is missing"),
        ({"seeds": [0, 1, 2, 3, 4], "choose": {"kapa": 1}}, "'kapa' is no column; there are kappa, referable_auc"),
        ({"seeds": [0, 1, 2, 3, 4], "choose": {"kappa": "much"}}, "weight of kappa must be a number; got 'much'"),
    ],
)
def test_a_grid_that_cannot_be_chosen_from_is_refused(tmp_path, change, message):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID | change))
    with pytest.raises(ValueError, match=message):
        select(choice(tmp_path))
    assert not (tmp_path / "out").exists()
