import pytest
from _datasets import fault, write_csv_list
from _pictures import write_csv

from ercn.config import PrepareConfig
from ercn.data import Manifest, prepare
from ercn.data.sets.csv_list import read_csv_list


def test_pictures_of_ones_own(tmp_path):
    path = write_csv_list(tmp_path)
    found = read_csv_list(str(path), "label")
    assert len(found.entries) == 12 and found.class_names == ["0", "1", "2"] and not found.notes
    first = found.entries[0]
    assert (first.id, first.patient, first.source) == ("clinic__0__l", "p0", tmp_path / "clinic" / "0" / "l.jpg")
    masked = [e for e in found.entries if e.masks]
    assert masked and all(set(e.masks) == {"hemorrhages"} and e.masks["hemorrhages"].is_file() for e in masked)
    smokers = read_csv_list(str(path), "smoker")
    assert [e.grade for e in smokers.entries] == [0, 0, 1, 1] * 3 and smokers.class_names == ["0", "1"]


def test_prepared_with_masks(tmp_path):
    path = write_csv_list(tmp_path / "c")
    options = {"size": 64, "workers": 1, "progress": False, "fractions": (0.5, 0.5, 0.0)}
    manifest = Manifest.load(prepare(PrepareConfig(dataset="csv", root=str(path), out=str(tmp_path / "d"), **options)))
    assert manifest.class_names == ["0", "1", "2"] and len(manifest.split("train")) == len(manifest.split("val")) == 6
    assert {r.source for r in manifest.records} == {f"clinic/{n}/{eye}.jpg" for n in range(6) for eye in "lr"}
    assert any(r.masks for r in manifest.records) and all(r.masks == {} for r in manifest.records if r.grade == 0)


def test_optional_masks_and_missing_labels(tmp_path):
    rows = [("a.jpg", 0, "p", "a_od.png"), ("b.jpg", 1, "q", ""), ("c.jpg", "", "r", "")]
    write_csv(tmp_path / "m.csv", "path,label,patient,mask_optic_disc", rows)
    found = read_csv_list(str(tmp_path / "m.csv"), "label")
    assert [dict(e.masks) for e in found.entries] == [{"optic_disc": tmp_path / "a_od.png"}, {}]
    assert found.notes == {"no label, left out": ["c.jpg"]}


HEADER = "path,label,patient,mask_he"


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        (HEADER, ("a.jpg", "mild", "p", ""), "row 2: column 'label': 'mild' is not one of 0, 1, … 99"),
        (HEADER, ("a.jpg", "-1", "p", ""), "'-1' is not one of"),
        (HEADER, ("a.jpg", "100", "p", ""), "'100' is not one of"),
        (HEADER, ("a.jpg", "1.0", "p", ""), "'1.0' is not one of"),
        (HEADER, ("a.jpg", 1, "", ""), "row 2: column 'patient': is empty; splits are by patient"),
        (HEADER, ("/a.jpg", 1, "p", ""), "row 2: column 'path': '/a.jpg' is not a path"),
        (HEADER, ("../a.jpg", 1, "p", ""), "'../a.jpg' is not a path, with slashes, inside the folder of the file"),
        (HEADER, ("x\\a.jpg", 1, "p", ""), "column 'path'"),
        (HEADER, ("", 1, "p", ""), "row 2: column 'path': '' is not a path"),
        (HEADER, ("a.jpg", 1, "p", "../m.png"), "row 2: column 'mask_he': '../m.png' is not a path"),
        (
            "path,grade,patient",
            ("a.jpg", 1, "p"),
            "needs one column 'label'; found the columns 'path', 'grade', 'patient'",
        ),
        ("path,label", ("a.jpg", 1), "needs one column 'patient'"),
        (
            "path,label,patient,mask_he,mask_he",
            ("a", 1, "p", "", ""),
            "column 'mask_he' must be mask_ and a lesion's name",
        ),
        ("path,label,patient,mask_a/b", ("a", 1, "p", ""), "column 'mask_a/b' must be mask_ and a lesion's name"),
    ],
)
def test_faults(tmp_path, header, row, words):
    write_csv(tmp_path / "m.csv", header, [row])
    message = fault(read_csv_list, str(tmp_path / "m.csv"), "label")
    assert str(tmp_path / "m.csv") in message and words in message


def test_pictures_that_would_be_prepared_under_one_name(tmp_path):
    rows = [("x/a.jpg", 0, "p"), ("x__a.png", 1, "q"), ("x/A.jpg", 1, "q")]
    write_csv(tmp_path / "m.csv", "path,label,patient", rows)
    message = fault(read_csv_list, str(tmp_path / "m.csv"), "label")
    assert "row 3: column 'path': 'x__a' again; first in row 2" in message and "row 4" in message


def test_no_file(tmp_path):
    assert "m.csv: no such file" in fault(read_csv_list, str(tmp_path / "m.csv"), "label")
    assert "root must be the CSV file that lists the pictures; got ''" in fault(read_csv_list, "", "label")
    assert "root must be the CSV file" in fault(read_csv_list, str(tmp_path), "label")
