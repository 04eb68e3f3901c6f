"""The Jichi ("DAVIS") set, Takahashi et al. 2017, PLoS ONE 12(6):e0179790, in its published layout.

list.csv      Image,Davis_grading_of_concatenated_figures,Davis_grading_of_one_figure      12_1_L.jpg,sdr,ndr
12_1_L.jpg    <patient>_<n>_<L|R>.jpg, beside list.csv or in one folder below it
"""

from __future__ import annotations

import re

from ercn.data._csv import Table
from ercn.data.entries import (
    NO_LABEL,
    SAME_NAME,
    Entry,
    Pictures,
    Published,
    dataset_folder,
    label_column,
    notes,
    stem,
)
from ercn.data.scales import DAVIS

LABELS = {"one_figure": "Davis_grading_of_one_figure", "concatenated": "Davis_grading_of_concatenated_figures"}
_GRADES = {"ndr": 0, "sdr": 1, "ppdr": 2, "pdr": 3}
_NAME = re.compile(r"(.+)_[^_]+_[LR]")


def read_davis(root: str, label: str) -> Published:
    """All labeled pictures below ``root``: grades ndr, sdr, ppdr, pdr are 0 … 3.

    label: "one_figure" (the grade of this picture) or "concatenated" (the grade of the eye's four pictures together).
    The patient is the part of the name before ``_<n>_<L|R>``; a patient has several pictures.
    Raises DataError for anything in list.csv that is not as published.
    """
    column = label_column(label, LABELS, "davis")
    folder = dataset_folder(root, "Jichi (DAVIS)")
    pictures = Pictures(folder, *sorted(path for path in folder.iterdir() if path.is_dir()))
    table = Table(folder / "list.csv", ("Image", column))
    seen: dict[str, int] = {}
    entries = []
    for row, values in table:
        id = stem(values["Image"])
        if not table.unique(row, "Image", id, seen):
            continue
        name = _NAME.fullmatch(id)
        if not name:
            table.fault(row, f"column 'Image': {id!r} is not <patient>_<n>_<L or R>")
            continue
        grade = table.label(row, column, values[column], _GRADES)
        entries.append(Entry(id, pictures.find(id, ".jpg"), grade, name[1]))
    table.check()
    found = notes((NO_LABEL, pictures.unused(seen)), (SAME_NAME, pictures.doubles))
    return Published(entries, DAVIS, folder, notes=found)
