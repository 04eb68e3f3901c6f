"""APTOS 2019 Blindness Detection, the Kaggle competition of 2019, in its published layout.

    train.csv                        id_code,diagnosis            000c1434d8d7,2
    train_images/000c1434d8d7.png
    test_images/*.png                without published labels: noted, not read

Patients are not published: every picture counts as a patient, so two eyes of a patient may be in two splits.
"""

from __future__ import annotations

from ercn.data._csv import Table
from ercn.data.entries import (
    ICDR,
    ICDR_GRADES,
    NO_LABEL,
    SAME_NAME,
    Entry,
    Pictures,
    Published,
    dataset_folder,
    notes,
    stem,
)


def read_aptos(root: str) -> Published:
    """All labeled pictures below ``root``. Raises DataError for anything in train.csv that is not as published."""
    folder = dataset_folder(root, "APTOS 2019")
    pictures = Pictures(folder / "train_images")
    table = Table(folder / "train.csv", ("id_code", "diagnosis"))
    seen: dict[str, int] = {}
    entries = []
    for row, values in table:
        id = stem(values["id_code"])
        if table.unique(row, "id_code", id, seen):
            grade = table.label(row, "diagnosis", values["diagnosis"], ICDR_GRADES)
            entries.append(Entry(id, pictures.find(id, ".png"), grade, id))
    table.check()
    unlabeled = pictures.unused(seen) + Pictures(folder / "test_images").unused(())
    found = notes((NO_LABEL, unlabeled), (SAME_NAME, pictures.doubles))
    return Published(entries, ICDR, folder, notes=found)
