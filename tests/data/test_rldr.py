import json

import numpy as np
import pytest
from _datasets import RLDR_FILES, fault, photograph, touch, write_rldr_tree
from _pictures import write_csv, write_eyepacs_tree
from PIL import Image

from ercn.config import PrepareConfig
from ercn.data import DataError, Manifest, prepare
from ercn.data.sets.rldr import read_rldr

SMALL = {"size": 160, "workers": 1, "progress": False}


@pytest.fixture
def tree(tmp_path):
    write_rldr_tree(tmp_path / "r")
    return tmp_path / "r"


def test_the_published_tree(tree):
    found = read_rldr(str(tree), "ours")
    assert len(found.entries) == 15 and all(e.source.is_file() for e in found.entries)
    assert [(e.id, e.patient) for e in found.entries[:3]] == [("10_left", "10"), ("11_left", "11"), ("11_right", "11")]
    healthy = [e.id for e in found.entries if e.grade == 0]
    assert found.notes == {"no lesion mask, taken as without lesions": healthy} and healthy == [
        "10_left",
        "15_left",
        "15_right",
    ]
    for entry in found.entries:
        masks = photograph(5 * int(entry.patient), entry.grade)[1]
        assert set(entry.masks) == set(RLDR_FILES) & set(masks)
    kaggle = read_rldr(str(tree), "kaggle")
    assert [e.grade for e in kaggle.entries] == [(e.grade + 1) % 5 for e in found.entries]


def test_gray_127_is_no_lesion(tree, tmp_path):
    made = prepare(PrepareConfig(dataset="rldr", root=str(tree), out=str(tmp_path / "d"), **SMALL))
    seen = 0
    for record in Manifest.load(made).records:
        masks = photograph(5 * int(record.patient), record.grade)[1]
        scale = (record.geometry.side / 160) ** 2
        for kind, path in record.masks.items():
            area = (np.asarray(Image.open(path)) > 0).sum() * scale
            assert area == pytest.approx((np.asarray(masks[kind]) > 0).sum(), rel=0.3, abs=6)  # 127 would add 400
            seen += 1
    assert seen > 20


def test_its_patients_can_be_left_out_of_eyepacs(tree, tmp_path):
    write_eyepacs_tree(tmp_path / "e", patients=20)  # patients 10 … 29; those of the set are 10 … 19
    rldr = prepare(PrepareConfig(dataset="rldr", root=str(tree), out=str(tmp_path / "rldr"), **SMALL))
    options = {"dataset": "eyepacs", "root": str(tmp_path / "e"), "exclude": str(rldr), **SMALL}
    made = Manifest.load(prepare(PrepareConfig(out=str(tmp_path / "d"), **options)))
    assert {int(r.patient) for r in made.records} == set(range(20, 30))
    [(sentence, names)] = json.loads((tmp_path / "d" / "prepare.json").read_text())["notes"].items()
    assert "left out" in sentence and len(names) == 20 and "10_right" in names
    write_rldr_tree(tmp_path / "far", first=100)
    far = prepare(PrepareConfig(dataset="rldr", root=str(tmp_path / "far"), out=str(tmp_path / "far-d"), **SMALL))
    with pytest.raises(DataError, match=f"exclude: no patient of {far} is in"):
        prepare(PrepareConfig(out=str(tmp_path / "n"), **(options | {"exclude": str(far)})))


def test_what_the_folders_have_too_much_or_too_little(tree):
    (tree / "images_896x896" / "12_left.jpg").unlink()
    touch(tree / "images_896x896" / "99_left.jpg")
    found = read_rldr(str(tree), "ours")
    assert [e.id for e in found.entries if not e.source.exists()] == ["12_left"]
    assert found.notes["no label, left out"] == ["images_896x896/99_left.jpg"]
    assert found.notes["a mask without a picture, left out"] == ["lesion_segs_896x896/12_left"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("10_left", 0, 5), "row 2: column 'our label': '5' is not one of 0, 1, 2, 3, 4"),
        (("10", 0, 1), "row 2: column 'image id': '10' is not <patient>_left or <patient>_right"),
        (("", 0, 1), "row 2: column 'image id': '' is not a picture's name"),
        (("10_left", 0), "row 2: 2 values for 3 columns"),
    ],
)
def test_faults_of_the_grades(tree, row, words):
    write_csv(tree / "dr_grades.csv", "image id,kaggle label,our label", [row])
    message = fault(read_rldr, str(tree), "ours")
    assert "dr_grades.csv" in message and words in message


def test_missing_and_unknown_files(tree, tmp_path):
    assert "label must be 'ours' or 'kaggle' for the rldr data set; got ''" in fault(read_rldr, str(tree), "")
    touch(tree / "lesion_segs_896x896" / "10_left" / "microaneurysms.png")
    assert "10_left/microaneurysms.png: 'microaneurysms' is not one of microaneurysm, " in fault(
        read_rldr, str(tree), "ours"
    )
    (tree / "lesion_segs_896x896").rename(tree / "segs")
    assert "lesion_segs_896x896: no such folder" in fault(read_rldr, str(tree), "ours")
    assert "dr_grades.csv: no such file" in fault(read_rldr, str(tmp_path), "ours")
