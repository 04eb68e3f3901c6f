import numpy as np
import pytest
from _datasets import fault, photograph, touch, write_ddr_segmentation_tree, write_ddr_tree
from PIL import Image

from ercn.config import PrepareConfig
from ercn.data import Manifest, prepare
from ercn.data.sets.ddr import read_ddr, read_ddr_segmentation

FOLDERS = ("EX", "HE", "MA", "SE")


def write(root, train, valid="b.jpg 0\n", test="c.jpg 0\n"):
    (root / "DR_grading").mkdir()
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        (root / "DR_grading" / f"{name}.txt").write_text(text)
    return str(root)


def test_the_published_grading_tree(tmp_path):
    write_ddr_tree(tmp_path)
    found = read_ddr(str(tmp_path))
    assert [e.split for e in found.entries] == ["train"] * 5 + ["val"] * 5 + ["test"] * 5
    assert [e.grade for e in found.entries] == [0, 1, 2, 3, 4] * 3 and all(e.source.is_file() for e in found.entries)
    assert found.entries[5].source == tmp_path / "DR_grading" / "valid" / "007-0100-000.jpg"
    left_out = ["train/007-0005-500.jpg", "valid/007-0105-500.jpg", "test/007-0205-500.jpg"]
    assert found.notes == {"ungradable, left out": left_out}


@pytest.mark.parametrize("line", ["a.jpg 3", "a.jpg  3 ", "a.jpg 3\r"])
def test_blanks_between_name_and_grade(tmp_path, line):
    root = write(tmp_path, f"{line}\n\n")
    touch(tmp_path / "DR_grading" / "train" / "x.jpg")
    found = read_ddr(root)
    assert (found.entries[0].id, found.entries[0].grade) == ("a", 3)
    assert found.notes == {"no label, left out": ["train/x.jpg"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jpg 6\n", "train.txt: 1 fault(s): row 1: column 'grade': '6' is not one of 0, 1, 2, 3, 4"),
        ("a.jpg 0\na.jpg\n", "train.txt: 1 fault(s): row 2: 1 values for 2 columns"),
        ("a.jpg 0\na.jpg 1\n", "row 2: column 'picture': 'a' again; first in row 1"),
        ("b.jpg 0\n", "valid.txt: 1 fault(s): row 1: column 'picture': 'b' is in train.txt too"),
        ("a.jpg,0\n", "row 1: 1 values for 2 columns"),
        ("", "train.txt: no rows"),
    ],
)
def test_faults_of_the_grades(tmp_path, text, words):
    assert words in fault(read_ddr, write(tmp_path, text))


def test_missing_grading_files(tmp_path):
    assert "train.txt: no such file" in fault(read_ddr, str(tmp_path))


@pytest.fixture
def segmentation(tmp_path):
    write_ddr_segmentation_tree(tmp_path / "ddr")
    return tmp_path / "ddr"


def test_the_published_segmentation_tree(segmentation, tmp_path):
    found = read_ddr_segmentation(str(segmentation))
    assert [e.split for e in found.entries] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2 and not found.notes
    assert all(len(e.masks) == 4 and e.grade is None for e in found.entries)
    assert "segmentation label" in str(found.entries[2].masks["hemorrhages"])
    options = {"size": 160, "workers": 1, "progress": False}
    made = prepare(
        PrepareConfig(dataset="ddr_segmentation", root=str(segmentation), out=str(tmp_path / "d"), **options)
    )
    for record in Manifest.load(made).records:
        masks = photograph(int(record.id[4:8]), 3)[1]  # empty ones are written by the publishers, not by us
        assert set(record.masks) == set(masks) & {"hard_exudates", "hemorrhages", "microaneurysms", "soft_exudates"}
        assert all(np.asarray(Image.open(path)).any() for path in record.masks.values())


def test_what_the_segmentation_folders_have_too_much_or_too_little(segmentation):
    part = segmentation / "lesion_segmentation" / "valid"
    for folder in FOLDERS:
        (part / "segmentation label" / folder / "007-0010-200.tif").unlink()
    (part / "image" / "007-0011-200.jpg").unlink()
    assert read_ddr_segmentation(str(segmentation)).notes == {
        "a mask without a picture, left out": [f"{name}/007-0011-200.tif" for name in ("MA", "HE", "EX", "SE")],
        "no lesion mask, taken as without lesions": ["007-0010-200"],
    }


def test_faults_of_the_segmentation_folders(segmentation, tmp_path):
    part = segmentation / "lesion_segmentation"
    touch(part / "test" / "image" / "007-0000-200.jpg")
    assert "007-0000-200 is in 'train' and in 'test'; it can be in one only" in fault(
        read_ddr_segmentation, str(segmentation)
    )
    (part / "valid" / "segmentation label").rename(part / "valid" / "label")
    assert "valid/segmentation label/MA: no such folder" in fault(read_ddr_segmentation, str(segmentation))
    assert "train/image: no such folder" in fault(read_ddr_segmentation, str(tmp_path))
