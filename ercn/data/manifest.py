"""The folder that ``ercn prepare`` writes: reading and writing its manifest.

prepare.json                 settings, counts, channel statistics, skipped pictures, hash
manifest.csv                 one row a picture; all paths follow from the ids
splits.json                  SHA-256 of each split
images/<id>.jpg | .png       prepared pictures, size x size
masks/<lesion>/<id>.png      0 or 255, where the data set has lesion masks; masks/optic_disc/ is no lesion
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ercn._files import write_text
from ercn.data._csv import Table
from ercn.data.geometry import Geometry
from ercn.data.images import DataError
from ercn.data.splits import SPLITS, check_splits, split_hashes

_SQUARE = ("width", "height", "left", "top", "side")
COLUMNS = ("id", "image", "grade", "patient", "split", *_SQUARE, "masks", "optic_disc", "source")


@dataclass(frozen=True)
class Record:
    """One prepared picture.

    grade: class index, or None in a data set without grades. split: "train", "val" or "test". masks: lesion name to
    mask file; empty if the picture has no lesion or the data set no masks. optic_disc: its mask, where known.
    source: the photograph's path inside the published data set.
    """

    id: str
    image: Path
    grade: int | None
    patient: str
    split: str
    masks: dict[str, Path]
    geometry: Geometry
    optic_disc: Path | None = None
    source: str = ""


def mask_path(kind: str, id: str) -> str:
    return f"masks/{kind}/{id}.png"


@dataclass(frozen=True)
class Manifest:
    """A prepared data set.

    class_names: one for each grade; none in a data set without grades. size: side of the prepared pictures.
    hash: SHA-256 of manifest.csv, which fixes ids, grades, patients, splits and geometry.
    mean, std: RGB statistics of the train split's pictures, in 0 … 1.
    normalize, label: as in ``PrepareConfig``; label is empty where the data set has one column only.
    """

    root: Path
    dataset: str
    class_names: list[str]
    size: int
    hash: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    records: list[Record]
    normalize: str = "none"
    label: str = ""

    def split(self, name: str) -> list[Record]:
        return [record for record in self.records if record.split == name]

    @classmethod
    def load(cls, root: str | Path) -> Manifest:
        """Reads a folder written by ``ercn prepare``.

        Raises DataError if ``ercn prepare`` did not write or finish it, or if it was changed since: rows that cannot be
        read, a patient in two splits, splits or rows that do not match their hashes. Pictures are not read here.
        """
        root = Path(root)
        about = _read_json(root / "prepare.json", f"{root} is not a folder that `ercn prepare` wrote")
        if not about.get("finished"):
            raise DataError(
                f"{root}: `ercn prepare` was interrupted here; run it again with the same settings, it goes on"
            )
        settings, class_names = about["settings"], about["class_names"]
        records = _read_records(root, settings["size"], len(class_names))
        assigned = [(r.id, r.patient, r.grade, r.split) for r in records]
        check_splits(assigned, class_names, str(root / "manifest.csv"))
        saved, found = _read_json(root / "splits.json", "the splits are lost")["splits"], split_hashes(assigned)
        for split in SPLITS:
            if saved.get(split) != found[split]:
                raise DataError(
                    f"{root / 'manifest.csv'}: the {split} split is not the one saved in splits.json; the file was "
                    "changed, prepare the data set again in a new folder"
                )
        digest = hashlib.sha256((root / "manifest.csv").read_bytes()).hexdigest()
        if digest != about["hash"]:
            raise DataError(
                f"{root / 'manifest.csv'}: not the file that `ercn prepare` wrote (SHA-256 differs); prepare again"
            )
        return cls(
            root,
            settings["dataset"],
            class_names,
            settings["size"],
            digest,
            tuple(about["mean"]),
            tuple(about["std"]),
            records,
            settings.get("normalize", "none"),
            settings.get("label", ""),
        )


def _read_json(path: Path, otherwise: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {otherwise}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {otherwise}") from None


def _read_records(root: Path, size: int, grades: int) -> list[Record]:
    table = Table(root / "manifest.csv", COLUMNS)
    levels = {str(grade): grade for grade in range(grades)} if grades else {"": None}
    names = dict.fromkeys(SPLITS, True)
    seen: dict[str, int] = {}
    records = []
    for row, values in table:
        table.unique(row, "id", values["id"], seen)
        table.label(row, "split", values["split"], names)
        grade = table.label(row, "grade", values["grade"], levels)
        box = [table.integer(row, name, values[name]) for name in _SQUARE]
        masks = {kind: root / mask_path(kind, values["id"]) for kind in values["masks"].split(";") if kind}
        disc = root / values["optic_disc"] if values["optic_disc"] else None
        image, geometry = root / values["image"], Geometry(*box, size)
        records.append(
            Record(
                values["id"], image, grade, values["patient"], values["split"], masks, geometry, disc, values["source"]
            )
        )
    table.check()
    return records


def write_manifest(root: Path, records: Sequence[Record]) -> str:
    """Writes manifest.csv and splits.json, and returns the SHA-256 of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in records:
        row = asdict(record.geometry) | asdict(record)
        row["image"] = record.image.relative_to(root).as_posix()
        row["masks"] = ";".join(record.masks)
        row["optic_disc"] = record.optic_disc.relative_to(root).as_posix() if record.optic_disc else ""
        writer.writerow(row)
    splits = split_hashes((r.id, r.patient, r.grade, r.split) for r in records)
    write_text(root / "splits.json", json.dumps({"by": "patient", "splits": splits}, indent=2) + "\n")
    write_text(root / "manifest.csv", text.getvalue())
    return hashlib.sha256(text.getvalue().encode()).hexdigest()
