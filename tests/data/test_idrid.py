import numpy as np
import pytest
from _datasets import (
    IDRID_EYES,
    IDRID_FOLDERS,
    IDRID_PARTS,
    fault,
    photograph,
    touch,
    write_idrid_segmentation_tree,
    write_idrid_tree,
)
from _pictures import write_csv
from PIL import Image

from ercn.config import PrepareConfig
from ercn.data import Manifest, prepare
from ercn.data.sets.idrid import read_idrid, read_idrid_segmentation

PART = "B. Disease Grading"
HEADER = "Image name,Retinopathy grade,Risk of macular edema ,,"


def write(root, train, test=(("IDRiD_001", 0, 0, "", ""),), header=HEADER):
    folder = root / PART / "2. Groundtruths"
    folder.mkdir(parents=True)
    for (_, labels), rows in zip(IDRID_PARTS, (train, test)):
        write_csv(folder / labels, header, list(rows))
    return str(root)


def test_the_published_grading_tree(tmp_path):
    write_idrid_tree(tmp_path)
    found = read_idrid(str(tmp_path), "dr")
    assert [e.split for e in found.entries] == [None] * 10 + ["test"] * 5
    assert len({e.id for e in found.entries}) == 15 and all(e.patient == e.id for e in found.entries)
    first, later = found.entries[0], found.entries[10]
    assert (first.id, later.id) == ("train_IDRiD_001", "test_IDRiD_001")  # one name, two pictures
    assert first.source.read_bytes() != later.source.read_bytes()
    assert first.source == tmp_path / PART / "1. Original Images" / "a. Training Set" / "IDRiD_001.jpg"
    assert [e.grade for e in found.entries] == [0, 1, 2, 3, 4] * 3 and not found.notes
    edema = read_idrid(str(tmp_path), "dme")
    assert [e.grade for e in edema.entries[:4]] == [0, 1, 2, 0] and len(edema.class_names) == 3


def test_the_publishers_test_split_is_kept_and_the_rest_split(tmp_path):
    write_idrid_tree(tmp_path / "i", train=20)
    options = {"root": str(tmp_path / "i"), "size": 64, "workers": 1, "progress": False}
    config = PrepareConfig(dataset="idrid", out=str(tmp_path / "d"), fractions=(0.6, 0.2, 0.2), **options)
    manifest = Manifest.load(prepare(config))
    count = {split: len(manifest.split(split)) for split in ("train", "val", "test")}
    assert count == {"train": 15, "val": 5, "test": 5}
    assert {r.id.split("_")[0] for r in manifest.split("test")} == {"test"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("IDRiD_001", 5, 0, "", "")], "row 2: column 'Retinopathy grade': '5' is not one of 0, 1, 2, 3, 4"),
        ([("IDRiD_001", "", 0, "", "")], "row 2: column 'Retinopathy grade': '' is not one of"),
        ([("IDRiD_001", 1, 0), ("IDRiD_001", 1, 0)], "row 3: column 'Image name': 'IDRiD_001' again; first in row 2"),
        ([("IDRiD_001", 1, 0, "x", "")], "row 2: 5 values for 3 columns"),
    ],
)
def test_faults_of_the_grades(tmp_path, rows, words):
    message = fault(read_idrid, write(tmp_path, rows), "dr")
    assert "a. IDRiD_Disease Grading_Training Labels.csv" in message and words in message


def test_missing_grading_files(tmp_path):
    assert "a. IDRiD_Disease Grading_Training Labels.csv: no such file" in fault(read_idrid, str(tmp_path), "dr")
    root = write(tmp_path, [("IDRiD_001", 0, 0)], header="Image name,Grade,,")
    assert "needs one column 'Retinopathy grade'; found the columns 'Image name', 'Grade'" in fault(
        read_idrid, root, "dr"
    )
    assert "label must be 'dr' or 'dme'" in fault(read_idrid, root, "grade")


def test_grading_pictures_without_a_label_are_reported(tmp_path):
    root = write(tmp_path, [("IDRiD_001", 0, 0, "", "")])
    touch(tmp_path / PART / "1. Original Images" / "b. Testing Set" / "IDRiD_002.jpg")
    assert read_idrid(root, "dr").notes == {"no label, left out": ["b. Testing Set/IDRiD_002.jpg"]}


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    root = tmp_path_factory.mktemp("idrid")
    write_idrid_segmentation_tree(root)
    return root


def test_the_published_segmentation_tree(segmentation):
    found = read_idrid_segmentation(str(segmentation))
    assert [(e.id, e.split) for e in found.entries] == [
        (f"IDRiD_{n:02}", "test" if n > 4 else None) for n in range(1, 7)
    ]
    assert found.class_names == () and {e.grade for e in found.entries} == {None} and not found.notes
    for number, entry in enumerate(found.entries, 1):
        assert set(entry.masks) == set(photograph(IDRID_EYES[number - 1], 3)[1]) & set(IDRID_FOLDERS)
        assert all(path.is_file() and entry.id in path.name for path in entry.masks.values())


def test_prepared_masks_cover_what_the_published_ones_do(segmentation, tmp_path):
    options = {"size": 160, "workers": 1, "progress": False, "fractions": (0.5, 0.5, 0)}
    made = prepare(
        PrepareConfig(dataset="idrid_segmentation", root=str(segmentation), out=str(tmp_path / "d"), **options)
    )
    manifest = Manifest.load(made)
    assert manifest.class_names == [] and [len(manifest.split(s)) for s in ("train", "val", "test")] == [2, 2, 2]
    for record in manifest.records:
        assert record.grade is None
        masks = photograph(IDRID_EYES[int(record.id[-2:]) - 1], 3)[1]
        scale = (record.geometry.side / 160) ** 2
        assert set(record.masks) == set(masks) & set(IDRID_FOLDERS) - {"optic_disc"}
        for kind, path in record.masks.items() | {("optic_disc", record.optic_disc)}:
            small = np.asarray(Image.open(path))
            assert set(np.unique(small)) <= {0, 255}
            wide = record.geometry.to_original(small / 255) > 0.5
            whole = np.asarray(masks[kind]) > 0
            assert (wide & whole).sum() / (wide | whole).sum() > 0.7, (record.id, kind)
            assert (small > 0).sum() * scale == pytest.approx(whole.sum(), rel=0.2, abs=4)


def link(source, target):
    for path in source.rglob("*.*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).hardlink_to(path)
    return target


def test_what_the_segmentation_folders_have_too_much_or_too_little(segmentation, tmp_path):
    root = link(segmentation, tmp_path / "i")
    images = root / "A. Segmentation" / "1. Original Images" / "a. Training Set"
    masks = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / "a. Training Set"
    (images / "IDRiD_03.jpg").unlink()
    for path in masks.rglob("IDRiD_04_*.tif"):
        if "Disc" not in path.parent.name:
            path.unlink()
    notes = read_idrid_segmentation(str(root)).notes
    assert notes["no lesion mask, taken as without lesions"] == ["IDRiD_04"]
    strays = notes["a mask without a picture, left out"]
    assert strays and all("IDRiD_03" in name for name in strays) and "1. Microaneurysms/IDRiD_03_MA.tif" in strays


def test_missing_segmentation_folders(segmentation, tmp_path):
    root = link(segmentation, tmp_path / "i")
    folder = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / "b. Testing Set" / "4. Soft Exudates"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert f"{folder}: no such folder" in fault(read_idrid_segmentation, str(root))
    assert "1. Original Images/a. Training Set: no such folder" in fault(read_idrid_segmentation, str(tmp_path))


def test_a_segmentation_name_that_comes_twice(segmentation, tmp_path):
    root = link(segmentation, tmp_path / "i")
    touch(root / "A. Segmentation" / "1. Original Images" / "b. Testing Set" / "IDRiD_01.jpg")
    assert "IDRiD_01 is in 'a. Training Set' and in 'b. Testing Set'" in fault(read_idrid_segmentation, str(root))


def test_masks_that_cannot_be_used_are_named(segmentation, tmp_path, capsys):
    root = link(segmentation, tmp_path / "i")
    masks = root / "A. Segmentation" / "2. All Segmentation Groundtruths" / "a. Training Set"
    bad = [masks / "1. Microaneurysms" / "IDRiD_01_MA.tif", masks / "2. Haemorrhages" / "IDRiD_02_HE.tif"]
    for path in bad:
        path.unlink()
    bad[0].write_bytes(b"no picture")
    Image.new("L", (20, 30)).save(bad[1])
    options = {"size": 64, "workers": 1, "progress": False}
    made = prepare(PrepareConfig(dataset="idrid_segmentation", root=str(root), out=str(tmp_path / "d"), **options))
    assert {r.id for r in Manifest.load(made).records} == {"IDRiD_03", "IDRiD_04", "IDRiD_05", "IDRiD_06"}
    printed = capsys.readouterr().err
    assert "1. Microaneurysms/IDRiD_01_MA.tif: not a picture" in printed
    assert "IDRiD_02_HE.tif: a mask of 20 x 30 for a photograph of" in printed and str(tmp_path) not in printed
