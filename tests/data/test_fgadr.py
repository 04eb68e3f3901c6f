import numpy as np
import pytest
from _datasets import FGADR_FOLDERS, fault, photograph, write_fgadr_tree
from PIL import Image

from ercn.config import PrepareConfig
from ercn.data import Manifest, prepare
from ercn.data.sets.fgadr import read_fgadr


@pytest.fixture
def tree(tmp_path):
    write_fgadr_tree(tmp_path / "f")
    return tmp_path / "f"


def test_the_published_tree(tree):
    found = read_fgadr(str(tree))
    assert [e.grade for e in found.entries] == [0, 1, 2, 3, 4] * 2  # the first line is no header
    assert found.entries[0].source == tree / "Seg-set" / "Original_Images" / "0000_1.png"
    assert len({e.patient for e in found.entries}) == 10 and {e.split for e in found.entries} == {None}
    for number, entry in enumerate(found.entries):
        assert set(entry.masks) >= set(FGADR_FOLDERS) - {"irma", "neovascularization"}
        rare = {"irma", "neovascularization"} & set(photograph(number, entry.grade)[1])
        assert set(entry.masks) & {"irma", "neovascularization"} == rare
        assert all(path.is_file() for path in entry.masks.values())
    assert any("neovascularization" in e.masks for e in found.entries) and not found.notes


def test_smoothed_edges_are_cut_in_the_middle(tree, tmp_path):
    options = {"size": 160, "workers": 1, "progress": False, "fractions": (1, 0, 0)}
    made = prepare(PrepareConfig(dataset="fgadr", root=str(tree), out=str(tmp_path / "d"), **options))
    areas = np.zeros(3)
    for number, record in enumerate(Manifest.load(made).records):
        for kind, path in record.masks.items():
            published = np.asarray(Image.open(tree / "Seg-set" / FGADR_FOLDERS[kind] / path.name).convert("L"))
            scale = (record.geometry.side / 160) ** 2
            areas += [(np.asarray(Image.open(path)) > 0).sum() * scale, (published >= 128).sum(), (published > 0).sum()]
    assert areas[0] == pytest.approx(areas[1], rel=0.1) and areas[0] < 0.8 * areas[2]


def test_what_the_folders_have_too_much_or_too_little(tree):
    part = tree / "Seg-set"
    (part / "Original_Images" / "0001_2.png").unlink()
    for folder in FGADR_FOLDERS.values():
        (part / folder / "0002_3.png").unlink(missing_ok=True)
    labels = part / "DR_Seg_Grading_Label.csv"
    labels.write_text("".join(line for line in labels.open() if not line.startswith("0003_1")))
    found = read_fgadr(str(tree))
    assert [e.source.exists() for e in found.entries] == [True, False] + [True] * 7
    assert found.notes["no label, left out"] == ["Original_Images/0003_1.png"]
    assert found.notes["no lesion mask, taken as without lesions"] == ["0002_3"]
    assert "Hemohedge_Masks/0001_2.png" in found.notes["a mask without a picture, left out"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,grade\n0000_1.png,1\n", "row 1: column 'grade': 'grade' is not one of 0, 1, 2, 3, 4"),
        ("0000_1.png,5\n", "row 1: column 'grade': '5' is not one of"),
        ("0000_1.png,0\n0000_1.png,0\n", "row 2: column 'picture': '0000_1' again; first in row 1"),
        ("0000_1.png\n", "row 1: 1 values for 2 columns"),
        ("", "no rows"),
    ],
)
def test_faults_of_the_grades(tree, text, words):
    (tree / "Seg-set" / "DR_Seg_Grading_Label.csv").write_text(text)
    message = fault(read_fgadr, str(tree))
    assert "DR_Seg_Grading_Label.csv" in message and words in message


def test_a_missing_folder(tree, tmp_path):
    (tree / "Seg-set" / "Hemohedge_Masks").rename(tree / "Seg-set" / "Hemorrhage_Masks")
    assert "Hemohedge_Masks: no such folder" in fault(read_fgadr, str(tree))
    assert "DR_Seg_Grading_Label.csv: no such file" in fault(read_fgadr, str(tmp_path))
