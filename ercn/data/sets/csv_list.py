"""The user's own pictures, listed in a CSV file.

    path,label,patient,mask_hemorrhages,mask_optic_disc
    clinic/a1.jpg,2,anna,masks/a1_he.png,

Paths are relative to the file's folder. Labels are 0, 1, 2 …, from healthy to worst. ``mask_<lesion>`` columns are
optional, and so is a mask in them; ``mask_optic_disc`` is no lesion. Further columns may hold other labels.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from ercn.data._csv import Table
from ercn.data.entries import NO_LABEL, Entry, Published, notes, stem
from ercn.data.images import DataError

LABELS = ("label",)
_MASK = "mask_"


def _inside(table: Table, row: int, column: str, value: str) -> str | None:
    """A path inside the folder, or None and a fault."""
    path = PurePosixPath(value)
    if not value or path.is_absolute() or ".." in path.parts or "\\" in value or ":" in value:
        table.fault(row, f"column {column!r}: {value!r} is not a path, with slashes, inside the folder of the file")
        return None
    return path.as_posix()


def read_csv_list(root: str, label: str) -> Published:
    """The pictures that the file ``root`` lists, to be split.

    label: the column of the labels. The id is the path without extension, slashes as two underscores. Any pixel of a
    mask that is not black is lesion. Raises DataError naming file, row, column and value.
    """
    if not root or Path(root).is_dir():
        raise DataError(f"root must be the CSV file that lists the pictures; got {root!r}")
    path = Path(root)
    table = Table(path, ("path", label, "patient"))
    kinds = {name: name.removeprefix(_MASK) for name in table.columns if name.startswith(_MASK)}
    for name, kind in kinds.items():
        if not kind.isidentifier() or table.columns.count(name) > 1:
            raise DataError(
                f"{path}: column {name!r} must be {_MASK} and a lesion's name in letters, digits and _, once"
            )
    seen: dict[str, int] = {}
    entries, highest, unlabeled = [], 0, []
    for row, values in table:
        source = _inside(table, row, "path", values["path"])
        id = stem(source or "").replace("/", "__")
        if source is None or not table.unique(row, "path", id, seen):
            continue
        if not values[label]:
            unlabeled.append(source)
            continue
        if not re.fullmatch("[0-9]{1,2}", values[label]):
            table.fault(row, f"column {label!r}: {values[label]!r} is not one of 0, 1, … 99")
            continue
        if not values["patient"]:
            table.fault(row, "column 'patient': is empty; splits are by patient")
        masks = {
            kind: path.parent / mask
            for name, kind in kinds.items()
            if values[name] and (mask := _inside(table, row, name, values[name]))
        }
        grade = int(values[label])
        highest = max(highest, grade)
        entries.append(Entry(id, path.parent / source, grade, values["patient"], masks=masks))
    table.check()
    names = [str(grade) for grade in range(highest + 1)]
    return Published(entries, names, path.parent, notes=notes((NO_LABEL, unlabeled)))
