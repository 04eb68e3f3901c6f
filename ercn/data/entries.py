"""What readers of ``ercn.data.sets`` return, entries of pictures and notes on what is left out; and their helpers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ercn.data.images import DataError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".tif", ".tiff")
ICDR = ("no DR", "mild", "moderate", "severe", "proliferative")
ICDR_GRADES = {str(grade): grade for grade in range(len(ICDR))}
OPTIC_DISC = "optic_disc"
NO_LABEL = "no label, left out"
NO_MASKS = "no lesion mask, taken as without lesions"
NO_PICTURE = "a mask without a picture, left out"
SAME_NAME = "another picture of the same name is read, left out"
UNGRADABLE = "ungradable, left out"


@dataclass(frozen=True)
class Entry:
    """One picture of a published data set.

    id: name of the prepared picture. source: the photograph, which may be missing. grade: class index, 0 is healthy;
    None in a data set without grades. split: the publishers' split, or None where ``ercn prepare`` splits. masks:
    lesion, or ``OPTIC_DISC``, to mask file.
    """

    id: str
    source: Path
    grade: int | None
    patient: str
    split: str | None = None
    masks: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A data set as it was found.

    class_names: of the grades; none in a data set without grades. folder: messages name sources relative to it.
    mask_level: pixels of a mask at or above it are lesion. notes: a sentence to the files that it is about.
    """

    entries: list[Entry]
    class_names: Sequence[str]
    folder: Path
    mask_level: int = 1
    notes: Mapping[str, list[str]] = field(default_factory=dict)


def stem(name: str) -> str:
    """A picture's name without a known extension."""
    base, dot, extension = name.rpartition(".")
    return base if dot and f".{extension.lower()}" in EXTENSIONS else name


class Pictures:
    """The picture files of one or more folders by lower-case name without extension; earlier folders come first.

    doubles: files that are not read because an earlier one has their name.
    """

    def __init__(self, *folders: Path):
        self.folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        self.doubles: list[str] = []
        self._files: dict[str, Path] = {}
        for folder in folders:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.suffix.lower() in EXTENSIONS and self._files.setdefault(path.stem.lower(), path) != path:
                    self.doubles.append(_short(path))

    def __contains__(self, id: str) -> bool:
        return id.lower() in self._files

    def __iter__(self) -> Iterator[str]:
        """Names without extension, as written, in order of the folders and names."""
        return (path.stem for path in self._files.values())

    def find(self, id: str, extension: str) -> Path:
        """The file, or where it should be."""
        return self._files.get(id.lower(), self.folder / (id + extension))

    def unused(self, ids: Collection[str]) -> list[str]:
        """Files whose names are not among ``ids``."""
        used = {id.lower() for id in ids}
        return [_short(path) for name, path in self._files.items() if name not in used]


class Masks:
    """Masks in one folder for each lesion, named after the picture, with or without a suffix of the lesion.

    folders: lesion to folder; a missing one raises DataError. suffixes: lesion to the suffix of the picture's name.
    """

    def __init__(self, folders: Mapping[str, Path], suffixes: Mapping[str, str] | None = None):
        self._pictures = {kind: Pictures(existing(folder)) for kind, folder in folders.items()}
        self._suffixes = suffixes or dict.fromkeys(folders, "")

    def find(self, id: str) -> dict[str, Path]:
        """The masks that this picture has."""
        names = {kind: id + suffix for kind, suffix in self._suffixes.items()}
        return {
            kind: self._pictures[kind].find(name, "") for kind, name in names.items() if name in self._pictures[kind]
        }

    def strays(self, ids: Collection[str]) -> list[str]:
        """Masks whose pictures are not among ``ids``."""
        return [
            name
            for kind, suffix in self._suffixes.items()
            for name in self._pictures[kind].unused([id + suffix for id in ids])
        ]

    @property
    def doubles(self) -> list[str]:
        return [name for pictures in self._pictures.values() for name in pictures.doubles]


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def notes(*found: tuple[str, list[str]]) -> dict[str, list[str]]:
    """Sentences to the names that they are about, without sentences about none."""
    result: dict[str, list[str]] = {}
    for sentence, names in found:
        if names:
            result[sentence] = result.get(sentence, []) + names
    return result


def dataset_folder(root: str, what: str) -> Path:
    if not root:
        raise DataError(f"root must be the folder of the {what} data set; got nothing")
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; root must be the folder of the {what} data set")
    return Path(root)


def existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return folder


def label_column(label: str, columns: Mapping[str, str], dataset: str) -> str:
    if label not in columns:
        raise DataError(f"label must be {' or '.join(map(repr, columns))} for the {dataset} data set; got {label!r}")
    return columns[label]
