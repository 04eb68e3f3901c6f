"""IDRiD, the Indian Diabetic Retinopathy Image Dataset (Porwal et al. 2018), parts A and B in their published layout.

    B. Disease Grading/
      1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_001.jpg          the same names in both
      2. Groundtruths/a. IDRiD_Disease Grading_Training Labels.csv               b. IDRiD_Disease Grading_Testing …
        Image name,Retinopathy grade,Risk of macular edema ,,,                   IDRiD_001,3,2,,,
    A. Segmentation/
      1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_01.jpg
      2. All Segmentation Groundtruths/{a. Training Set,b. Testing Set}/1. Microaneurysms/IDRiD_01_MA.tif

Patients are not published: every picture counts as a patient. Part A may show the eyes of part B under other names, so
a model trained on one part should not be tested on the other.
"""

from __future__ import annotations

from ercn.data._csv import Table
from ercn.data.entries import (
    ICDR,
    ICDR_GRADES,
    NO_LABEL,
    NO_MASKS,
    NO_PICTURE,
    OPTIC_DISC,
    SAME_NAME,
    Entry,
    Masks,
    Pictures,
    Published,
    dataset_folder,
    existing,
    label_column,
    notes,
    stem,
)
from ercn.data.images import DataError

LABELS = {"dr": "Retinopathy grade", "dme": "Risk of macular edema"}
_RISKS = ("no exudates", "exudates far from the macula", "exudates within a disc diameter of the macula")
_CLASSES = {"dr": (ICDR, ICDR_GRADES), "dme": (_RISKS, {"0": 0, "1": 1, "2": 2})}
_PARTS = {"train": "a. Training Set", "test": "b. Testing Set"}
_MASKS = {
    "microaneurysms": "1. Microaneurysms",
    "hemorrhages": "2. Haemorrhages",
    "hard_exudates": "3. Hard Exudates",
    "soft_exudates": "4. Soft Exudates",
    OPTIC_DISC: "5. Optic Disc",
}
_SUFFIXES = dict(zip(_MASKS, ("_MA", "_HE", "_EX", "_SE", "_OD")))


def read_idrid(root: str, label: str) -> Published:
    """Part B below ``root``: 413 pictures to be split in train and val, and the publishers' 103 of the test split.

    label: "dr" (grade 0 … 4) or "dme" (risk 0 … 2). The id is the split and the name, since both splits have the names.
    Raises DataError for anything in the CSV files that is not as published.
    """
    column = label_column(label, LABELS, "idrid")
    class_names, grades = _CLASSES[label]
    folder = dataset_folder(root, "IDRiD")
    part = folder / "B. Disease Grading"
    entries, unlabeled, doubles = [], [], []
    for split, name in _PARTS.items():
        pictures = Pictures(part / "1. Original Images" / name)
        which = {"train": "a. IDRiD_Disease Grading_Training", "test": "b. IDRiD_Disease Grading_Testing"}[split]
        table = Table(part / "2. Groundtruths" / f"{which} Labels.csv", ("Image name", column))
        seen: dict[str, int] = {}
        for row, values in table:
            id = stem(values["Image name"])
            if table.unique(row, "Image name", id, seen):
                grade = table.label(row, column, values[column], grades)
                made = "test" if split == "test" else None
                entries.append(Entry(f"{split}_{id}", pictures.find(id, ".jpg"), grade, f"{split}_{id}", made))
        table.check()
        unlabeled += pictures.unused(seen)
        doubles += pictures.doubles
    return Published(entries, class_names, folder, notes=notes((NO_LABEL, unlabeled), (SAME_NAME, doubles)))


def read_idrid_segmentation(root: str) -> Published:
    """Part A below ``root``: 54 pictures to be split in train and val, and the publishers' 27 of the test split.

    Without grades. Any pixel of a mask that is not black is lesion; a missing mask means that the picture has no such
    lesion. Raises DataError if a folder is missing or a name comes twice.
    """
    folder = dataset_folder(root, "IDRiD")
    part = folder / "A. Segmentation"
    entries: list[Entry] = []
    doubles, strays, bare = [], [], []
    home: dict[str, str] = {}
    for split, name in _PARTS.items():
        pictures = Pictures(existing(part / "1. Original Images" / name))
        truths = part / "2. All Segmentation Groundtruths" / name
        masks = Masks({kind: truths / where for kind, where in _MASKS.items()}, _SUFFIXES)
        for id in pictures:
            if home.setdefault(id.lower(), name) != name:
                raise DataError(f"{part}: {id} is in {home[id.lower()]!r} and in {name!r}; it can be in one only")
            made = "test" if split == "test" else None
            entries.append(Entry(id, pictures.find(id, ".jpg"), None, id, made, masks.find(id)))
            bare += [] if masks.find(id).keys() - {OPTIC_DISC} else [id]
        strays += masks.strays(list(pictures))
        doubles += pictures.doubles + masks.doubles
    if not entries:
        raise DataError(f"{part / '1. Original Images'}: no pictures")
    found = notes((NO_PICTURE, strays), (NO_MASKS, bare), (SAME_NAME, doubles))
    return Published(entries, (), folder, notes=found)
