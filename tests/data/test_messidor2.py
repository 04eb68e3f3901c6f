import pytest
from _datasets import fault, touch, write_messidor2_tree
from _pictures import read_rows, write_csv

from ercn.data.sets.messidor2 import read_messidor2

HEADER = "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"


def write(root, rows, pairs=("a.png;b.JPG",), header=HEADER, pair_header="left;right"):
    write_csv(root / "messidor_data.csv", header, rows)
    write_csv(root / "messidor-2.csv", pair_header, [(pair,) for pair in pairs])
    return str(root)


def test_the_published_tree(tmp_path):
    write_messidor2_tree(tmp_path)
    found = read_messidor2(str(tmp_path), "dr")
    assert len(found.entries) == 11 and all(e.source.is_file() for e in found.entries)
    assert {e.source.suffix for e in found.entries} == {".png", ".JPG"}
    rows = read_rows(tmp_path / "messidor_data.csv")
    assert [str(e.grade) for e in found.entries] == [row["adjudicated_dr_grade"] for row in rows[:-1]]
    assert found.notes == {"ungradable, left out": [rows[-1]["image_id"]]}
    assert [e.patient for e in found.entries[:4]] == ["im000000", "im000000"] + ["20050001_43808_0100_pp"] * 2
    assert {e.split for e in found.entries} == {None}


def test_macular_edema_is_another_label(tmp_path):
    write_messidor2_tree(tmp_path)
    found = read_messidor2(str(tmp_path), "dme")
    assert found.class_names == ("no DME", "referable DME") and {e.grade for e in found.entries} == {0, 1}
    assert "label must be 'dr' or 'dme' for the messidor2 data set; got 'level'" in fault(
        read_messidor2, str(tmp_path), "level"
    )


def test_names_are_matched_whatever_their_case_and_extension(tmp_path):
    root = write(tmp_path, [("A.jpg", 1, 0, 1), ("b.png", 0, 0, 1)])
    touch(tmp_path / "IMAGES" / "a.PNG")
    touch(tmp_path / "IMAGES" / "c.JPG")
    found = read_messidor2(root, "dr")
    assert [(e.id, e.patient, e.source.name) for e in found.entries] == [("A", "a", "a.PNG"), ("b", "a", "b.png")]
    assert found.notes == {"no label, left out": ["IMAGES/c.JPG"]}


def test_ungradable_pictures_are_reported(tmp_path):
    root = write(tmp_path, [("a.png", "", "", 0), ("b.png", 3, 1, 0)])
    touch(tmp_path / "IMAGES" / "a.png")
    found = read_messidor2(root, "dr")
    assert not found.entries and found.notes == {"ungradable, left out": ["a.png", "b.png"]}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("a.png", 5, 0, 1)], "row 2: column 'adjudicated_dr_grade': '5' is not one of 0, 1, 2, 3, 4"),
        ([("a.png", 1.0, 0, 1)], "'1.0' is not one of"),
        ([("a.png", 1, 0, 2)], "row 2: column 'adjudicated_gradable': '2' is not one of 0, 1"),
        ([("a.png", 1, 0, 1), ("a.JPG", 1, 0, 1)], "row 3: column 'image_id': 'a' again; first in row 2"),
        ([("c.png", 1, 0, 1)], "row 2: column 'image_id': 'c' is in no pair of messidor-2.csv"),
    ],
)
def test_faults_of_the_grades(tmp_path, rows, words):
    message = fault(read_messidor2, write(tmp_path, rows), "dr")
    assert "messidor_data.csv" in message and words in message


@pytest.mark.parametrize(
    ("pairs", "header", "words"),
    [
        (["a;b", "b;c"], "left;right", "row 3: column 'left': 'b' again; first in row 2"),
        (["a;"], "left;right", "row 2: column 'right': '' is not a picture's name"),
        (["a,b"], "left,right", "needs one column 'left'; found the columns 'left,right'"),
    ],
)
def test_faults_of_the_pairs(tmp_path, pairs, header, words):
    message = fault(read_messidor2, write(tmp_path, [("a.png", 1, 0, 1)], pairs, pair_header=header), "dr")
    assert "messidor-2.csv" in message and words in message


def test_missing_files(tmp_path):
    assert "messidor-2.csv: no such file" in fault(read_messidor2, str(tmp_path), "dr")
    write_csv(tmp_path / "messidor-2.csv", "left;right", [("a;b",)])
    assert "messidor_data.csv: no such file" in fault(read_messidor2, str(tmp_path), "dr")
    write_csv(tmp_path / "messidor_data.csv", "image_id,grade", [("a", 1)])
    assert "needs one column 'adjudicated_dr_grade'" in fault(read_messidor2, str(tmp_path), "dr")
