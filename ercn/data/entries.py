"""What a reader returns: one entry for each labeled picture of a published data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ercn.data.images import DataError

EXTENSIONS = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class Entry:
    """id: file name without extension. source: the picture, which may be missing. grade: class index, 0 is healthy.

    split: where the data set's publishers put it, or None where ``ercn prepare`` splits.
    """

    id: str
    source: Path
    grade: int
    patient: str
    split: str | None = None


def stem(name: str) -> str:
    """A picture's name without a known extension."""
    base, dot, extension = name.rpartition(".")
    return base if dot and f".{extension.lower()}" in EXTENSIONS else name


class Pictures:
    """The picture files of one or more folders by lower-case name without extension; earlier folders come first."""

    def __init__(self, *folders: Path):
        self.folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        self._files: dict[str, Path] = {}
        for folder in folders:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.suffix.lower() in EXTENSIONS:
                    self._files.setdefault(path.stem.lower(), path)

    def __contains__(self, id: str) -> bool:
        return id.lower() in self._files

    def find(self, id: str, extension: str) -> Path:
        """The file, or where it should be."""
        return self._files.get(id.lower(), self.folder / (id + extension))


def dataset_folder(root: str, what: str) -> Path:
    if not root:
        raise DataError(f"root must be the folder of the {what} data set; got nothing")
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; root must be the folder of the {what} data set")
    return Path(root)
