"""Retinal-Lesions, "RLDR" (Wei et al. 2020): pictures of EyePACS with new grades and lesion masks, as published.

    dr_grades.csv                                          image id,kaggle label,our label       10003_left,0,2
    images_896x896/10003_left.jpg
    lesion_segs_896x896/10003_left/microaneurysm.png       255 lesion, 127 not by the AAO's guideline

Eyes and patients are named as in EyePACS. A model that is tested on this set must be trained without its patients:
prepare EyePACS with ``exclude`` set to the prepared folder of this set.
"""

from __future__ import annotations

from pathlib import Path

from ercn.data._csv import Table
from ercn.data.entries import (
    ICDR,
    ICDR_GRADES,
    NO_LABEL,
    NO_MASKS,
    NO_PICTURE,
    SAME_NAME,
    Entry,
    Pictures,
    Published,
    dataset_folder,
    existing,
    label_column,
    notes,
    stem,
)
from ercn.data.images import DataError
from ercn.data.sets.eyepacs import patient_of

LABELS = {"ours": "our label", "kaggle": "kaggle label"}
_MASKS = {
    "microaneurysm": "microaneurysms",
    "retinal_hemorrhage": "hemorrhages",
    "hard_exudate": "hard_exudates",
    "cotton_wool_spots": "soft_exudates",
    "vitreous_hemorrhage": "vitreous_hemorrhage",
    "preretinal_hemorrhage": "preretinal_hemorrhage",
    "neovascularization": "neovascularization",
    "fibrous_proliferation": "fibrous_proliferation",
}
_BY_GUIDELINE = 128  # lesions that do not follow the guideline have 127


def _masks(folder: Path) -> dict[str, Path]:
    """Lesion to mask of one picture's folder; DataError for a file that names no lesion."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        if path.stem not in _MASKS:
            raise DataError(f"{path}: {path.stem!r} is not one of {', '.join(_MASKS)}")
        found[_MASKS[path.stem]] = path
    return found


def read_rldr(root: str, label: str) -> Published:
    """All labeled pictures below ``root``, to be split.

    label: "ours" (of the publishers' panel) or "kaggle" (as in EyePACS). Mask pixels of 127 are not lesion: the
    publishers leave them out of their experiments. Raises DataError for a folder that is missing, a mask of no known
    lesion, or anything in dr_grades.csv that is not as published.
    """
    column = label_column(label, LABELS, "rldr")
    folder = dataset_folder(root, "Retinal-Lesions")
    table = Table(folder / "dr_grades.csv", ("image id", column))
    pictures = Pictures(folder / "images_896x896")
    folders = sorted(path for path in existing(folder / "lesion_segs_896x896").iterdir() if path.is_dir())
    masks = {path.name.lower(): _masks(path) for path in folders}
    seen: dict[str, int] = {}
    entries = []
    for row, values in table:
        id = stem(values["image id"])
        if not table.unique(row, "image id", id, seen):
            continue
        patient = patient_of(table, row, "image id", id)
        grade = table.label(row, column, values[column], ICDR_GRADES)
        entries.append(Entry(id, pictures.find(id, ".jpg"), grade, patient, masks=masks.get(id.lower(), {})))
    table.check()
    found = notes(
        (NO_LABEL, pictures.unused(seen)),
        (NO_PICTURE, [f"lesion_segs_896x896/{path.name}" for path in folders if path.name not in pictures]),
        (NO_MASKS, [entry.id for entry in entries if not entry.masks]),
        (SAME_NAME, pictures.doubles),
    )
    return Published(entries, ICDR, folder, _BY_GUIDELINE, found)
