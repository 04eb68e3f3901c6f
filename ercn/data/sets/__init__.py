"""The table of data sets that ``ercn prepare`` reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ercn.config import PrepareConfig
from ercn.data.entries import ICDR, Entry, Published, notes
from ercn.data.images import DataError
from ercn.data.manifest import Manifest
from ercn.data.phantom import phantom_grades
from ercn.data.sets import aptos, csv_manifest, davis, ddr, eyepacs, fgadr, idrid, messidor2, rldr
from ercn.data.splits import SPLITS, check_fractions, split_patients


class Reader(NamedTuple):
    """labels: what ``PrepareConfig.label`` may be, the default first; ``read`` takes it after the root if there are."""

    read: Callable[..., Published]
    labels: Iterable[str] = ()


READERS = {
    "eyepacs": Reader(eyepacs.read_eyepacs),
    "davis": Reader(davis.read_davis, davis.LABELS),
    "aptos": Reader(aptos.read_aptos),
    "messidor2": Reader(messidor2.read_messidor2, messidor2.LABELS),
    "idrid": Reader(idrid.read_idrid, idrid.LABELS),
    "idrid_segmentation": Reader(idrid.read_idrid_segmentation),
    "ddr": Reader(ddr.read_ddr),
    "ddr_segmentation": Reader(ddr.read_ddr_segmentation),
    "fgadr": Reader(fgadr.read_fgadr),
    "rldr": Reader(rldr.read_rldr, rldr.LABELS),
    "csv": Reader(csv_manifest.read_csv_manifest, csv_manifest.LABELS),
}


def read_published(config: PrepareConfig) -> Published:
    """All pictures of ``config.dataset``, each with its split."""
    if config.dataset == "phantom":
        published = Published(_phantom_entries(config), ICDR, Path())
    elif config.dataset in READERS:
        reader = READERS[config.dataset]
        published = reader.read(config.root, label_of(config)) if reader.labels else reader.read(config.root)
    else:
        known = ", ".join(map(repr, READERS))
        raise DataError(f"dataset must be 'phantom' or one of {known}; got {config.dataset!r}")
    if config.label and not label_of(config):
        raise DataError(
            f"the {config.dataset} data set has one label column; label must be empty, not {config.label!r}"
        )
    if config.exclude:
        published = _without(published, config.exclude)
    return replace(published, entries=_with_splits(published.entries, config.fractions, config.seed))


def label_of(config: PrepareConfig) -> str:
    """The label column's name, empty where there is only one."""
    labels = tuple(READERS[config.dataset].labels) if config.dataset in READERS else ()
    return (config.label or labels[0]) if labels else ""


def _phantom_entries(config: PrepareConfig) -> list[Entry]:
    digits = max(4, len(str(config.patients)))
    return [
        Entry(f"p{number:0{digits}}_{eye}", Path(), grade, f"p{number:0{digits}}")
        for number, grades in enumerate(phantom_grades(config.patients, config.seed), 1)
        for eye, grade in zip(("left", "right"), grades)
    ]


def _without(published: Published, folder: str) -> Published:
    """Leaves out the patients of a prepared folder; DataError if there is none, for then the ids are not the same."""
    patients = {record.patient for record in Manifest.load(folder).records}
    out = [entry.id for entry in published.entries if entry.patient in patients]
    if not out:
        raise DataError(f"exclude: no patient of {folder} is in {published.folder}; leave it empty")
    kept = [entry for entry in published.entries if entry.patient not in patients]
    return replace(published, entries=kept, notes=published.notes | notes((f"patient of {folder}, left out", out)))


def _with_splits(entries: Sequence[Entry], fractions: Sequence[float], seed: int) -> list[Entry]:
    """Splits those that the publishers did not, among the splits that these left open."""
    check_fractions(fractions)
    made = {entry.split for entry in entries} - {"train"}
    free = [0 if split in made else fraction for split, fraction in zip(SPLITS, fractions)]
    grades = defaultdict(list)
    for entry in entries:
        if entry.split is None:
            grades[entry.patient].append(-1 if entry.grade is None else entry.grade)
    split = split_patients(grades, [fraction / sum(free) for fraction in free], seed)
    return [entry if entry.split else replace(entry, split=split[entry.patient]) for entry in entries]
