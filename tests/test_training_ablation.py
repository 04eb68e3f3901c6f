"""`ercn ablate`: the grid, its cells, each once, and the table."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from ercn.config import AblateConfig, EvaluateConfig, PretrainConfig, TrainConfig, from_dict, preset
from ercn.data import Manifest
from ercn.training import ablate, ablation, ablation_table, evaluate
from ercn.training.grid import Grid, Row, cells, load_grid, prepare_config, with_options

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
    "rows": [
        {"group": "parts", "name": "CAM", "options": {"model.pool": "none", "model.fusion": "cam", "model.steps": 0}},
        {"group": "parts", "name": "+ affinity", "base": "CAM", "train": False, "options": {"model.steps": 1}},
        {"group": "other", "name": "no such backbone", "options": {"model.backbone": "resnot"}},
        {"group": "other", "name": "gated", "pretrain": "SimCLR"},
        {"group": "other", "name": "gated, once more", "base": "gated"},
    ],
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The grid above, run once; one of its rows cannot be trained."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    with pytest.raises(ValueError, match="2 of 8 cells failed; .*no such backbone, seed 0; no such backbone, seed 1"):
        ablate(config(folder))
    return folder / "out"


def config(folder):
    return AblateConfig(grid=str(folder / "grid.yaml"), out=str(folder / "out"), bootstrap=100)


def planned(out):
    grid = from_dict(Grid, GRID)
    root = prepare_config(grid, out).out
    return cells(grid, out, root, Manifest.load(root).hash)


def table(out):
    return {row["name"]: row for row in json.loads((out / "ablation.json").read_text())["rows"]}


def test_a_failed_cell_is_told_and_the_others_have_results(out):
    rows = table(out)
    assert rows["no such backbone"]["values"] == {} and rows["no such backbone"]["seeds"] == []
    assert all(rows[name]["seeds"] == [0, 1] for name in rows if name != "no such backbone")
    assert "unknown backbone 'resnot'" in Path(f"{planned(out)['no such backbone', 0].folder}.txt").read_text()
    assert rows["CAM"]["values"].keys() == {c for c in ablation_table.COLUMNS if "attention" not in c}
    assert rows["gated"]["values"].keys() == ablation_table.COLUMNS.keys()


def test_values_are_those_of_evaluate(out):
    """A cell's folder is a run like any other; its own evaluation says the same, intervals included."""
    folder = planned(out)["gated", 1].folder
    result = evaluate(EvaluateConfig(run=str(folder), workers=0, bootstrap=100, seed=ablation_table.SEED))
    mine = ablation_table.draws_of(folder, 100)
    for name, entry in mine.items():
        key, _, map_name = name.partition("_") if name.startswith(("aupr", "iou")) else (name, "", "")
        theirs = result["localization"]["maps"][map_name] if map_name else result["metrics"]
        assert entry[0] == pytest.approx(theirs[key]["value"], rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(
            np.nanpercentile(entry[1:], [2.5, 97.5]), [theirs[key]["low"], theirs[key]["high"]], rtol=0.15, atol=0.02
        )
    assert table(out)["gated"]["values"]["kappa"]["each"][1] == mine["kappa"][0]


def test_rows_of_one_configuration_share_cells_and_their_difference_is_zero(out):
    rows = table(out)
    assert rows["gated"]["cells"] == rows["gated, once more"]["cells"]
    for entry in rows["gated, once more"]["difference"].values():
        assert entry["value"] == entry["low"] == entry["high"] == 0
    assert rows["gated"]["difference"] == {}


def test_a_row_that_is_not_trained_has_the_weights_of_its_base(out):
    own, base = planned(out)["+ affinity", 0], planned(out)["CAM", 0]
    assert own.weights == base.folder and not (own.folder / "export").exists()
    a, b = (np.load(cell.folder / "cell.npz") for cell in (own, base))
    np.testing.assert_array_equal(a["probability"], b["probability"])
    np.testing.assert_array_equal(a["counts_cam"], b["counts_cam"])
    assert (a["counts_refined_cam"] != b["counts_refined_cam"]).any()


def test_finished_cells_are_kept_and_failed_ones_tried_again(out, monkeypatch):
    ran = []
    monkeypatch.setattr(ablation, "_run", lambda cell, manifest: ran.append(cell.config.model.backbone))
    before = {path: path.read_bytes() for path in out.glob("cells/*/cell.*")}
    assert len(before) == 2 * 6
    ablate(config(out.parent))
    assert ran == ["resnot"] * len(ran) and len(ran) >= 2
    assert {path: path.read_bytes() for path in out.glob("cells/*/cell.*")} == before
    (out / "cells" / planned(out)["CAM", 1].folder.name / "cell.json").rename(out / "hidden.json")
    try:
        ablate(config(out.parent))  # the table without that cell
        assert table(out)["CAM"]["seeds"] == [0] and "CAM (1 of 2 seeds)" in (out / "ablation.md").read_text()
    finally:
        (out / "hidden.json").rename(planned(out)["CAM", 1].folder / "cell.json")
        ablate(config(out.parent))


def test_files_of_the_table_agree(out):
    rows = table(out)
    with open(out / "ablation.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(row["values"]) for row in rows.values())
    line = next(line for line in lines if (line["row"], line["column"]) == ("+ affinity", "aupr_refined_cam"))
    value = rows["+ affinity"]["values"]["aupr_refined_cam"]
    assert float(line["value"]) == pytest.approx(value["value"], abs=1e-4) and line["base"] == "CAM"
    assert value["value"] == pytest.approx(np.mean(value["each"])) and len(value["each"]) == 2
    text = (out / "ablation.md").read_text()
    assert f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})" in text
    assert "| SimCLR |" in text  # what its features were worth
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_of_seeds_is_drawn_with_the_same_patients():
    """Two seeds that err on opposite patients: their mean varies less than either of them."""
    draws = np.random.default_rng(0).normal(size=1000)
    seeds = [{"kappa": np.append(0.5, 0.5 + 0.1 * draws)}, {"kappa": np.append(0.7, 0.7 - 0.1 * draws)}]
    entry = ablation_table._summary(seeds)["kappa"]
    assert entry["value"] == pytest.approx(0.6) and entry["low"] == pytest.approx(entry["high"])
    assert entry["sd"] == pytest.approx(np.std([0.5, 0.7], ddof=1)) and entry["each"] == [0.5, 0.7]


def test_a_claimed_folder_is_left_to_its_owner(tmp_path):
    with ablation._claimed(tmp_path / "cell", wait=True) as mine, ablation._claimed(tmp_path / "cell", False) as again:
        assert mine and not again
    with ablation._claimed(tmp_path / "cell", wait=False) as mine:
        assert mine


def test_the_packaged_grid_is_what_it_names(tmp_path):
    grid = load_grid("phantom")
    plan = cells(grid, tmp_path, "data", "hash")
    configs = {name: cell.config for (name, seed), cell in plan.items() if seed == grid.seeds[0]}
    for name in ("ercn", "seam", "chikontwe"):
        recipe = preset(name)
        kept = {"backbone": "", "output_stride": 8, "embed_dim": 64}
        assert replace(configs[name].model, **kept) == replace(recipe.model, **kept)
        assert replace(configs[name].loss, warmup_epochs=0) == recipe.loss
    folders = {name: plan[name, 0].folder for name in configs}
    assert folders["ercn"] == folders["SimCLR"] == folders["gated attention"]
    assert folders["+ consistency"] == folders["mean (GAP)"]
    assert len({cell.config.run.seed for cell in plan.values()}) == len(grid.seeds) >= 3


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
