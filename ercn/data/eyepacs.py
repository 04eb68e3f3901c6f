"""EyePACS, the Kaggle "Diabetic Retinopathy Detection" set of 2015, in its published layout.

    trainLabels.csv               image,level            10_left,0
    retinopathy_solution.csv      image,level,Usage      1_left,0,Private     (optional)
    train/10_left.jpeg  test/1_left.jpeg                 or all pictures beside the CSV files

Source: Kaggle; the labels of the test pictures were published after the competition.
"""

from __future__ import annotations

from pathlib import Path

from ercn.data._csv import Table
from ercn.data.entries import Entry, Pictures, dataset_folder, stem

CLASS_NAMES = ["no DR", "mild", "moderate", "severe", "proliferative"]
_LEVELS = {str(level): level for level in range(5)}
_USAGE = {"Public": "val", "Private": "test"}


def _patient(table: Table, row: int, id: str) -> str:
    patient, _, eye = id.rpartition("_")
    if not patient or eye not in ("left", "right"):
        table.fault(row, f"column 'image': {id!r} is not <patient>_left or <patient>_right")
    return patient


def _read(path: Path, pictures: Pictures, usage: bool) -> list[Entry]:
    table = Table(path, ("image", "level", "Usage") if usage else ("image", "level"))
    seen: dict[str, int] = {}
    entries = []
    for row, values in table:
        id = stem(values["image"])
        if not table.unique(row, "image", id, seen):
            continue
        patient = _patient(table, row, id)
        grade = table.label(row, "level", values["level"], _LEVELS)
        split = table.label(row, "Usage", values["Usage"], _USAGE) if usage else None
        entries.append(Entry(id, pictures.find(id, ".jpeg"), grade, patient, split))
    table.check()
    return entries


def read_eyepacs(root: str) -> list[Entry]:
    """All labeled pictures below ``root``.

    If ``retinopathy_solution.csv`` is there and at least one of its pictures too, its Public part is the val split, its
    Private part the test split and trainLabels.csv the train split; otherwise trainLabels.csv is left to be split.
    The patient is the part of the name before ``_left`` or ``_right``.
    Raises DataError for anything in the CSV files that is not as published.
    """
    folder = dataset_folder(root, "EyePACS")
    train = _read(folder / "trainLabels.csv", Pictures(folder / "train", folder), usage=False)
    solution = folder / "retinopathy_solution.csv"
    if solution.exists():
        pictures = Pictures(folder / "test", folder)
        test = _read(solution, pictures, usage=True)
        if any(entry.id in pictures for entry in test):
            return [Entry(e.id, e.source, e.grade, e.patient, "train") for e in train] + test
    return train
