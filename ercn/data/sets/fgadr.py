"""FGADR's Seg-set (Zhou et al. 2021), with grades and lesion masks, in its published layout.

    Seg-set/DR_Seg_Grading_Label.csv             no header:  0000_1.png,2
    Seg-set/Original_Images/0000_1.png
    Seg-set/Microaneurysms_Masks/0000_1.png      the same name in Hemohedge_Masks (so spelled), HardExudate_Masks,
                                                 SoftExudate_Masks, IRMA_Masks and Neovascularization_Masks

Masks have smoothed edges. A patient has one picture.
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
    Entry,
    Masks,
    Pictures,
    Published,
    dataset_folder,
    notes,
    stem,
)

_MASKS = {
    "microaneurysms": "Microaneurysms_Masks",
    "hemorrhages": "Hemohedge_Masks",
    "hard_exudates": "HardExudate_Masks",
    "soft_exudates": "SoftExudate_Masks",
    "irma": "IRMA_Masks",
    "neovascularization": "Neovascularization_Masks",
}
_HALF = 128  # of a smoothed edge


def read_fgadr(root: str) -> Published:
    """All labeled pictures below ``root``, to be split; mask pixels of 128 and more are lesion.

    Raises DataError if a folder is missing, or for anything in the label file that is not as published.
    """
    folder = dataset_folder(root, "FGADR")
    part = folder / "Seg-set"
    table = Table(part / "DR_Seg_Grading_Label.csv", ("picture", "grade"), header=False)
    pictures = Pictures(part / "Original_Images")
    masks = Masks({kind: part / name for kind, name in _MASKS.items()})
    seen: dict[str, int] = {}
    entries = []
    for row, values in table:
        id = stem(values["picture"])
        if table.unique(row, "picture", id, seen):
            grade = table.label(row, "grade", values["grade"], ICDR_GRADES)
            entries.append(Entry(id, pictures.find(id, ".png"), grade, id, masks=masks.find(id)))
    table.check()
    found = notes(
        (NO_LABEL, pictures.unused(seen)),
        (NO_PICTURE, masks.strays(list(pictures))),
        (NO_MASKS, [entry.id for entry in entries if not entry.masks]),
        (SAME_NAME, pictures.doubles + masks.doubles),
    )
    return Published(entries, ICDR, folder, _HALF, found)
