import pytest
from _datasets import fault, touch, write_aptos_tree
from _pictures import write_csv

from ercn.data.sets.aptos import read_aptos


def test_the_published_tree(tmp_path):
    write_aptos_tree(tmp_path)
    found = read_aptos(str(tmp_path))
    assert [e.grade for e in found.entries] == [0, 1, 2, 3, 4] * 2 and len(found.class_names) == 5
    assert all(e.source == tmp_path / "train_images" / f"{e.id}.png" and e.source.is_file() for e in found.entries)
    assert len({e.patient for e in found.entries}) == 10 and {e.split for e in found.entries} == {None}
    assert found.notes == {"no label, left out": ["test_images/ffff00001111.png"]}


def test_pictures_without_a_label_and_labels_without_a_picture(tmp_path):
    write_csv(tmp_path / "train.csv", "id_code,diagnosis", [("aa", 1), ("bb", 0)])
    for name in ("aa.png", "aa.jpg", "cc.PNG"):
        touch(tmp_path / "train_images" / name)
    found = read_aptos(str(tmp_path))
    assert [(e.id, e.source.exists()) for e in found.entries] == [("aa", True), ("bb", False)]
    assert found.notes == {
        "no label, left out": ["train_images/cc.PNG"],
        "another picture of the same name is read, left out": ["train_images/aa.png"],
    }


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("id_code", [("a",)], "needs one column 'diagnosis'; found the columns 'id_code'"),
        ("id,diagnosis", [("a", 0)], "needs one column 'id_code'"),
        ("id_code,diagnosis", [("a", 0), ("b", 5)], "row 3: column 'diagnosis': '5' is not one of 0, 1, 2, 3, 4"),
        ("id_code,diagnosis", [("a", "")], "row 2: column 'diagnosis': '' is not one of"),
        ("id_code,diagnosis", [("a", 0), ("A.png", 0)], "row 3: column 'id_code': 'A' again; first in row 2"),
        ("id_code,diagnosis", [("a",)], "row 2: 1 values for 2 columns"),
        ("id_code,diagnosis", [], "no rows"),
    ],
)
def test_faults_of_the_labels(tmp_path, header, rows, words):
    write_csv(tmp_path / "train.csv", header, rows)
    message = fault(read_aptos, str(tmp_path))
    assert str(tmp_path / "train.csv") in message and words in message


def test_missing_files(tmp_path):
    assert "train.csv: no such file" in fault(read_aptos, str(tmp_path))
    assert "root must be the folder of the APTOS 2019 data set" in fault(read_aptos, str(tmp_path / "nowhere"))
