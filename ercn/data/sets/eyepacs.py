"""EyePACS, the Kaggle "Diabetic Retinopathy Detection" set of 2015, in its published layout.

    trainLabels.csv               image,level            10_left,0
    retinopathy_solution.csv      image,level,Usage      1_left,0,Private     (optional)
    train/10_left.jpeg  test/1_left.jpeg                 or all pictures beside the CSV files

Source: Kaggle; the labels of the test pictures were published after the competition.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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

_USAGE = {"Public": "val", "Private": "test"}
_NO_TEST = "of retinopathy_solution.csv, which is left out because not one of its pictures is there"


def patient_of(table: Table, row: int, column: str, id: str) -> str:
    """The part before ``_left`` or ``_right``, or a fault."""
    patient, _, eye = id.rpartition("_")
    if not patient or eye not in ("left", "right"):
        table.fault(row, f"column {column!r}: {id!r} is not <patient>_left or <patient>_right")
    return patient


def _read(path: Path, pictures: Pictures, usage: bool) -> list[Entry]:
    table = Table(path, ("image", "level", "Usage") if usage else ("image", "level"))
    seen: dict[str, int] = {}
    entries = []
    for row, values in table:
        id = stem(values["image"])
        if not table.unique(row, "image", id, seen):
            continue
        patient = patient_of(table, row, "image", id)
        grade = table.label(row, "level", values["level"], ICDR_GRADES)
        split = table.label(row, "Usage", values["Usage"], _USAGE) if usage else None
        entries.append(Entry(id, pictures.find(id, ".jpeg"), grade, patient, split))
    table.check()
    return entries


def read_eyepacs(root: str) -> Published:
    """All labeled pictures below ``root``.

    If ``retinopathy_solution.csv`` and at least one of its pictures are there, its Public part is the val split, its
    Private part the test split and trainLabels.csv the train split; otherwise ``ercn prepare`` splits trainLabels.csv.
    The patient is the part of the name before ``_left`` or ``_right``.
    Raises DataError for anything in the CSV files that is not as published.
    """
    folder = dataset_folder(root, "EyePACS")
    train_pictures, test_pictures = Pictures(folder / "train", folder), Pictures(folder / "test", folder)
    entries, test = _read(folder / "trainLabels.csv", train_pictures, usage=False), []
    if (folder / "retinopathy_solution.csv").exists():
        test = _read(folder / "retinopathy_solution.csv", test_pictures, usage=True)
    labeled = [entry.id for entry in entries + test]
    unused = train_pictures.unused(labeled) + test_pictures.unused(labeled)
    doubles = train_pictures.doubles + test_pictures.doubles
    no_test = []
    if any(entry.id in test_pictures for entry in test):
        entries = [replace(entry, split="train") for entry in entries] + test
    else:
        no_test = [entry.id for entry in test]
    found = notes(
        (NO_LABEL, sorted(set(unused))), (SAME_NAME, sorted(set(doubles))), (_NO_TEST, no_test)
    )  # pictures beside the CSV files are in both
    return Published(entries, ICDR, folder, notes=found)
