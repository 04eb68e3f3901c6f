"""Messidor-2 with the adjudicated grades of Krause et al. 2018, in the layout of the two publications together.

    messidor_data.csv   image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable   IM000012.jpg,0,0,1
    messidor-2.csv      left;right                                   the two pictures of each patient
    IMAGES/20051020_43808_0100_PP.png, IMAGES/IM000012.JPG

The grades have no value where a picture is ungradable. Names in the CSV files and on disk differ in case and extension.
Source: the pictures and pairs are ADCIS', the grades are on Kaggle (google-brain/messidor2-dr-grades).
"""

from __future__ import annotations

from pathlib import Path

from ercn.data._csv import Table
from ercn.data.entries import (
    ICDR,
    ICDR_GRADES,
    NO_LABEL,
    SAME_NAME,
    UNGRADABLE,
    Entry,
    Pictures,
    Published,
    dataset_folder,
    label_column,
    notes,
    stem,
)

LABELS = {"dr": "adjudicated_dr_grade", "dme": "adjudicated_dme"}
_CLASSES = {"dr": (ICDR, ICDR_GRADES), "dme": (("no DME", "referable DME"), {"0": 0, "1": 1})}


def _patients(path: Path) -> dict[str, str]:
    """Lower-case name of a picture to its patient, named after the left picture."""
    table = Table(path, ("left", "right"), delimiter=";")
    seen: dict[str, int] = {}
    patients = {}
    for row, values in table:
        patient = stem(values["left"]).lower()
        for column in ("left", "right"):
            id = stem(values[column])
            if table.unique(row, column, id, seen):
                patients[id.lower()] = patient
    table.check()
    return patients


def read_messidor2(root: str, label: str) -> Published:
    """All gradable pictures below ``root``.

    label: "dr" (grade 0 … 4) or "dme" (referable macular edema, 0 or 1). The pictures of a pair are one patient's.
    Raises DataError for anything in the CSV files that is not as published, and for a picture without a pair.
    """
    column = label_column(label, LABELS, "messidor2")
    class_names, grades = _CLASSES[label]
    folder = dataset_folder(root, "Messidor-2")
    pictures = Pictures(folder / "IMAGES")
    patients = _patients(folder / "messidor-2.csv")
    table = Table(folder / "messidor_data.csv", ("image_id", column, "adjudicated_gradable"))
    seen: dict[str, int] = {}
    entries, ungradable = [], []
    for row, values in table:
        id = stem(values["image_id"])
        if not table.unique(row, "image_id", id, seen):
            continue
        gradable = table.label(row, "adjudicated_gradable", values["adjudicated_gradable"], {"0": 0, "1": 1})
        if gradable == 0 or not values[column]:
            ungradable.append(values["image_id"])
            continue
        if id.lower() not in patients:
            table.fault(row, f"column 'image_id': {id!r} is in no pair of messidor-2.csv, so its patient is not known")
        grade = table.label(row, column, values[column], grades)
        entries.append(Entry(id, pictures.find(id, ".png"), grade, patients.get(id.lower(), "")))
    table.check()
    found = notes((UNGRADABLE, ungradable), (NO_LABEL, pictures.unused(seen)), (SAME_NAME, pictures.doubles))
    return Published(entries, class_names, folder, notes=found)
