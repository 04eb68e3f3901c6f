"""DDR (Li et al. 2019), grading and lesion segmentation, in the published layout.

    DR_grading/{train,valid,test}.txt       one picture a line: 007-0004-000.jpg 0         5 is ungradable
    DR_grading/{train,valid,test}/007-0004-000.jpg
    lesion_segmentation/{train,valid,test}/image/007-1789-100.jpg
    lesion_segmentation/{train,test}/label/{EX,HE,MA,SE}/007-1789-100.tif    valid: "segmentation label" for label

Patients are not published: every picture counts as a patient.
"""

from __future__ import annotations

from ercn.data._csv import Table
from ercn.data.entries import (
    ICDR,
    ICDR_GRADES,
    NO_LABEL,
    NO_MASKS,
    NO_PICTURE,
    SAME_NAME,
    UNGRADABLE,
    Entry,
    Masks,
    Pictures,
    Published,
    dataset_folder,
    existing,
    notes,
    stem,
)
from ercn.data.images import DataError

_PARTS = {"train": "train", "val": "valid", "test": "test"}
_LABELS = {"train": "label", "valid": "segmentation label", "test": "label"}
_MASKS = {"microaneurysms": "MA", "hemorrhages": "HE", "hard_exudates": "EX", "soft_exudates": "SE"}
_UNGRADABLE = "5"


def read_ddr(root: str) -> Published:
    """All gradable pictures of ``DR_grading`` below ``root``, in the publishers' splits.

    Raises DataError for anything in the label files that is not as published, and for a name in two of them.
    """
    folder = dataset_folder(root, "DDR")
    part = folder / "DR_grading"
    entries: list[Entry] = []
    ungradable, unlabeled, doubles = [], [], []
    home: dict[str, str] = {}
    for split, name in _PARTS.items():
        pictures = Pictures(part / name)
        table = Table(part / f"{name}.txt", ("picture", "grade"), delimiter=" ", header=False)
        seen: dict[str, int] = {}
        for row, values in table:
            id = stem(values["picture"])
            if not table.unique(row, "picture", id, seen):
                continue
            if home.setdefault(id.lower(), name) != name:
                table.fault(row, f"column 'picture': {id!r} is in {home[id.lower()]}.txt too")
            if values["grade"] == _UNGRADABLE:
                ungradable.append(f"{name}/{values['picture']}")
                continue
            grade = table.label(row, "grade", values["grade"], ICDR_GRADES)
            entries.append(Entry(id, pictures.find(id, ".jpg"), grade, id, split))
        table.check()
        unlabeled += pictures.unused(seen)
        doubles += pictures.doubles
    found = notes((UNGRADABLE, ungradable), (NO_LABEL, unlabeled), (SAME_NAME, doubles))
    return Published(entries, ICDR, folder, notes=found)


def read_ddr_segmentation(root: str) -> Published:
    """The pictures of ``lesion_segmentation`` below ``root``, in the publishers' splits; without grades.

    Any pixel of a mask that is not black is lesion. Raises DataError if a folder is missing or a name comes twice.
    """
    folder = dataset_folder(root, "DDR")
    part = folder / "lesion_segmentation"
    entries: list[Entry] = []
    doubles, strays, bare = [], [], []
    home: dict[str, str] = {}
    for split, name in _PARTS.items():
        pictures = Pictures(existing(part / name / "image"))
        masks = Masks({kind: part / name / _LABELS[name] / where for kind, where in _MASKS.items()})
        for id in pictures:
            if home.setdefault(id.lower(), name) != name:
                raise DataError(f"{part}: {id} is in {home[id.lower()]!r} and in {name!r}; it can be in one only")
            entries.append(Entry(id, pictures.find(id, ".jpg"), None, id, split, masks.find(id)))
            bare += [] if masks.find(id) else [id]
        strays += masks.strays(list(pictures))
        doubles += pictures.doubles + masks.doubles
    if not entries:
        raise DataError(f"{part}: no pictures in train/image, valid/image or test/image")
    found = notes((NO_PICTURE, strays), (NO_MASKS, bare), (SAME_NAME, doubles))
    return Published(entries, (), folder, notes=found)
