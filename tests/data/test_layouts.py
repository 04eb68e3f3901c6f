"""Every data set end to end, from its published layout to a prepared folder; and the readers' common helpers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from _datasets import (
    fault,
    photograph,
    touch,
    write_aptos_tree,
    write_csv_list,
    write_ddr_segmentation_tree,
    write_ddr_tree,
    write_fgadr_tree,
    write_idrid_segmentation_tree,
    write_idrid_tree,
    write_messidor2_tree,
    write_rldr_tree,
)
from _pictures import write_csv, write_davis_tree, write_eyepacs_tree
from PIL import Image

import ercn
from ercn.config import DataConfig, Dataset, ModelConfig, PrepareConfig, PretrainConfig, RunConfig, TrainConfig
from ercn.data import DataError, Geometry, Manifest, PictureDataset, collate, prepare
from ercn.data.entries import Masks, Pictures
from ercn.data.masks import pixels_outside, prepared_mask, read_mask
from ercn.data.sets import READERS
from ercn.training import pretrain, train

SMALL = {"size": 64, "workers": 1, "progress": False}
TREES = {
    "eyepacs": (write_eyepacs_tree, 24),
    "davis": (write_davis_tree, 30),
    "aptos": (write_aptos_tree, 10),
    "messidor2": (write_messidor2_tree, 11),
    "idrid": (write_idrid_tree, 15),
    "idrid_segmentation": (write_idrid_segmentation_tree, 6),
    "ddr": (write_ddr_tree, 15),
    "ddr_segmentation": (write_ddr_segmentation_tree, 6),
    "fgadr": (write_fgadr_tree, 10),
    "rldr": (write_rldr_tree, 15),
    "csv": (write_csv_list, 12),
}
WITH_MASKS = {"idrid_segmentation", "ddr_segmentation", "fgadr", "rldr", "csv"}
WITHOUT_GRADES = {"idrid_segmentation", "ddr_segmentation"}


def test_all_data_sets_are_tested_and_offered():
    assert set(TREES) == set(READERS) and {*READERS, "phantom"} == set(get_args(Dataset))


@pytest.mark.parametrize("dataset", TREES)
def test_from_the_published_layout_to_tensors(dataset, tmp_path):
    write, count = TREES[dataset]
    root = write(tmp_path / "published") or tmp_path / "published"
    made = prepare(PrepareConfig(dataset=dataset, root=str(root), out=str(tmp_path / "d"), max_unreadable=0, **SMALL))
    manifest = Manifest.load(made)
    assert manifest.dataset == dataset and len(manifest.records) == count and manifest.split("train")
    assert bool(manifest.class_names) == (dataset not in WITHOUT_GRADES)
    splits = {}
    for record in manifest.records:
        assert splits.setdefault(record.patient, record.split) == record.split
        assert (record.grade is None) == (dataset in WITHOUT_GRADES)
    assert any(record.masks for record in manifest.records) == (dataset in WITH_MASKS)
    pictures = PictureDataset(
        manifest.records, 64, mean=manifest.mean, std=manifest.std, augment=False, with_masks=True
    )
    batch = collate([pictures[i] for i in range(len(pictures))])
    assert batch["image"].shape == (count, 3, 64, 64)
    assert batch["grade"].tolist() == [-1 if r.grade is None else r.grade for r in manifest.records]
    assert batch["masks"][:, :-1].flatten(1).any(1).tolist() == [bool(r.masks) for r in manifest.records]
    about = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    again = prepare(PrepareConfig(dataset=dataset, root=str(root), out=str(tmp_path / "d"), max_unreadable=0, **SMALL))
    assert {path: path.read_bytes() for path in again.rglob("*") if path.is_file()} == about


def test_the_command_line(tmp_path):
    write_messidor2_tree(tmp_path / "messidor")
    options = ["--dataset", "messidor2", "--root", "messidor", "--label", "dme", "--normalize", "graham"]
    options += ["--size", "64", "--workers", "1", "--out", "data"]
    command = [sys.executable, "-m", "ercn", "prepare", *options]
    environment = os.environ | {"PYTHONPATH": str(Path(ercn.__file__).parents[1])}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=True, **how)
    assert done.stdout.endswith("\ndata\n") and "referable DME" in done.stdout
    assert "ungradable, left out: 1: 20050005_43815_0100_PP.png" in done.stderr
    manifest = Manifest.load(tmp_path / "data")
    assert manifest.class_names == ["no DME", "referable DME"] and manifest.normalize == "graham"
    wrong = subprocess.run([*command, "--dataset", "messidor"], check=False, **how)
    assert wrong.returncode == 2 and "messidor2" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_set_without_grades_serves_pretraining_and_not_training(tmp_path):
    write_idrid_segmentation_tree(tmp_path / "i")
    options = {"root": str(tmp_path / "i"), "out": str(tmp_path / "d"), **SMALL}
    prepare(PrepareConfig(dataset="idrid_segmentation", **options))
    data = DataConfig(root=str(tmp_path / "d"), image_size=64, batch_size=2, workers=0)
    run = RunConfig(out=str(tmp_path / "run"), epochs=1, accelerator="cpu", progress=False)
    out = pretrain(PretrainConfig(data=data, run=run, backbone="mobilenetv3_small_050"))
    assert (out / "export" / "backbone.safetensors").is_file()
    with pytest.raises(ValueError, match="data set idrid_segmentation has no grades; training needs them"):
        train(TrainConfig(data=data, run=run, model=ModelConfig(backbone="mobilenetv3_small_050")))


@pytest.mark.parametrize("dataset", ["aptos", "fgadr", "phantom"])
def test_a_label_where_there_is_only_one_is_refused(dataset, tmp_path):
    write_fgadr_tree(tmp_path / "fgadr")
    write_aptos_tree(tmp_path / "aptos")
    options = {"root": str(tmp_path / dataset), "out": str(tmp_path / "d"), **SMALL}
    with pytest.raises(DataError, match=f"the {dataset} data set has one label column; label must be empty, not 'dr'"):
        prepare(PrepareConfig(dataset=dataset, label="dr", **options))


def test_notes_are_reported_in_short_and_kept_whole(tmp_path, capsys):
    write_aptos_tree(tmp_path / "a")
    for number in range(30):
        touch(tmp_path / "a" / "test_images" / f"{number:02}.png")
    made = prepare(PrepareConfig(dataset="aptos", root=str(tmp_path / "a"), out=str(tmp_path / "d"), **SMALL))
    err = capsys.readouterr().err
    assert "no label, left out: 31: test_images/00.png, " in err and err.endswith("test_images/19.png, and 11 more\n")
    kept = json.loads((made / "prepare.json").read_text())["notes"]["no label, left out"]
    assert len(kept) == 31 and "test_images/29.png" in kept


def test_lesions_that_preparing_loses_are_reported_also_when_it_goes_on(tmp_path, capsys):
    picture = Image.new("RGB", (400, 300))
    picture.paste((120, 70, 40), (100, 50, 300, 250))
    point, beside = Image.new("L", (400, 300)), Image.new("L", (400, 300))
    point.putpixel((200, 150), 255)
    beside.paste(255, (80, 100, 140, 160))
    for name, image in (("a.png", picture), ("b.png", picture), ("point.png", point), ("beside.png", beside)):
        image.save(tmp_path / name)
    rows = [("a.png", 0, "p", "point.png"), ("b.png", 1, "q", "beside.png")]
    write_csv(tmp_path / "m.csv", "path,label,patient,mask_he", rows)
    config = PrepareConfig(dataset="csv", root=str(tmp_path / "m.csv"), out=str(tmp_path / "d"), **SMALL)
    for _ in range(2):
        records = {r.id: r for r in Manifest.load(prepare(config)).records}
        assert records["a"].masks == {} and set(records["b"].masks) == {"he"}
        err = capsys.readouterr().err
        assert "mask is empty at this size: 1: a he" in err and "mask reaches outside of the crop: 1: b he" in err


def test_other_masks_of_the_same_photographs_are_refused(tmp_path):
    path = write_csv_list(tmp_path / "c")
    options = {"root": str(path), "out": str(tmp_path / "d"), **SMALL}
    prepare(PrepareConfig(dataset="csv", **options))
    mask = next((tmp_path / "c" / "masks").iterdir())
    size = mask.stat().st_size
    mask.write_bytes(mask.read_bytes() + b"0")
    with pytest.raises(DataError, match=f"prepared from other photographs: images/.* from {size} bytes, .*{mask.name}"):
        prepare(PrepareConfig(dataset="csv", **options))
    text = path.read_text().replace(f"masks/{mask.name}", "")
    path.write_text(text)
    with pytest.raises(DataError, match="the labels or the list of pictures were others"):
        prepare(PrepareConfig(dataset="csv", **options))


def test_a_mask_made_again_without_a_lesion_is_no_mask(tmp_path):
    path = write_csv_list(tmp_path / "c")
    config = PrepareConfig(dataset="csv", root=str(path), out=str(tmp_path / "d"), **SMALL)
    record = next(r for r in Manifest.load(prepare(config)).records if r.masks)
    mask = tmp_path / "c" / "masks" / record.id.replace("clinic__", "").replace("__", "")
    size = Image.open(mask.with_suffix(".png")).size
    Image.new("L", size).save(mask.with_suffix(".png"))
    record.image.unlink()
    again = {r.id: r for r in Manifest.load(prepare(config)).records}
    assert again[record.id].masks == {} and not record.masks["hemorrhages"].exists()


def test_a_mask_that_is_gone_is_named_and_its_picture_skipped(tmp_path):
    path = write_csv_list(tmp_path / "c")
    for mask in (tmp_path / "c" / "masks").iterdir():
        mask.unlink()
    with pytest.raises(DataError, match=r"cannot be read, max_unreadable is 0: .*l.jpg: masks/2l.png: no such file"):
        prepare(PrepareConfig(dataset="csv", root=str(path), out=str(tmp_path / "d"), max_unreadable=0, **SMALL))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_masks_of_any_mode(tmp_path, mode):
    gray = Image.new("L", (9, 7))
    gray.paste(76, (2, 1, 5, 4))
    mask = gray.convert(mode) if mode != "1" else gray.point(lambda value: 255 * (value > 0)).convert("1")
    mask.save(tmp_path / "m.tif")
    expected = np.zeros((7, 9), bool)
    expected[1:4, 2:5] = True
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif", (9, 7), 1, max_pixels=1000), expected)
    assert read_mask(tmp_path / "m.tif", (9, 7), 76, max_pixels=1000).any()
    assert not read_mask(tmp_path / "m.tif", (9, 7), 77, max_pixels=1000).any() or mode == "1"
    assert read_mask(tmp_path / "m.tif", (9, 7), 128, max_pixels=1000).any() == (mode == "1")
    assert "a mask of 9 x 7 for a photograph of 7 x 9" in fault(
        lambda: read_mask(tmp_path / "m.tif", (7, 9), 1, max_pixels=1000)
    )


def test_a_prepared_mask_is_the_area_of_at_least_a_half():
    mask = np.zeros((8, 12), bool)
    mask[0:4, 4:7] = True  # a whole pixel of 2 x 2 and half of one, beside the left border of the crop
    geometry = Geometry(12, 8, 4, 0, 8, 4)
    small = np.asarray(prepared_mask(mask, geometry))
    np.testing.assert_array_equal(small[:2], [[255, 255, 0, 0]] * 2)
    assert not small[2:].any() and pixels_outside(mask, geometry) == 0
    assert pixels_outside(mask, Geometry(12, 8, 5, 1, 6, 4)) == 12 - 6
    assert pixels_outside(mask, Geometry(12, 8, -2, -2, 14, 4)) == 0


def test_masks_and_pictures_by_name(tmp_path):
    for name in ("he/A_HE.TIF", "he/b_HE.tif", "he/b_HE.png", "ma/A_MA.tif"):
        touch(tmp_path / name)
    masks = Masks({"hemorrhages": tmp_path / "he", "dots": tmp_path / "ma"}, {"hemorrhages": "_HE", "dots": "_MA"})
    assert masks.find("a") == {"hemorrhages": tmp_path / "he" / "A_HE.TIF", "dots": tmp_path / "ma" / "A_MA.tif"}
    assert masks.find("c") == {} and masks.strays(["a"]) == ["he/b_HE.png"] and masks.doubles == ["he/b_HE.tif"]
    assert list(Pictures(tmp_path / "nowhere", tmp_path / "ma")) == ["A_MA"]


def test_prepared_pictures_show_the_photograph(tmp_path):
    write_aptos_tree(tmp_path / "a")
    made = prepare(PrepareConfig(dataset="aptos", root=str(tmp_path / "a"), out=str(tmp_path / "d"), **SMALL))
    for number, record in enumerate(Manifest.load(made).records):
        crop = record.geometry.crop(photograph(number, number % 5)[0])
        near = np.asarray(Image.open(record.image), int) - np.asarray(crop, int)
        assert np.abs(near).mean() < 3  # JPEG
