"""All pictures of a data set, or of the phantom, each with its split, before ``ercn prepare`` reads any of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ercn.config import PrepareConfig
from ercn.data.entries import ICDR, Entry, Published, notes
from ercn.data.images import DataError
from ercn.data.manifest import Manifest
from ercn.data.phantom import phantom_grades
from ercn.data.sets import READERS
from ercn.data.splits import SPLITS, check_fractions, split_patients


def read_published(config: PrepareConfig) -> Published:
    """All pictures of ``config.dataset``, each with its split; DataError where the options do not fit the data set."""
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
    """Leaves out the patients of a prepared folder; DataError where it has none of them: their ids then differ."""
    patients = {record.patient for record in Manifest.load(folder).records}
    out = [entry.id for entry in published.entries if entry.patient in patients]
    if not out:
        raise DataError(f"exclude: no patient of {folder} is in {published.folder}; leave it empty")
    kept = [entry for entry in published.entries if entry.patient not in patients]
    return replace(published, entries=kept, notes=published.notes | notes((f"patient of {folder}, left out", out)))


def _with_splits(entries: Sequence[Entry], fractions: Sequence[float], seed: int) -> list[Entry]:
    """Splits the entries without a split, among train and the splits that the publishers did not make."""
    check_fractions(fractions)
    made = {entry.split for entry in entries} - {"train"}
    free = [0 if split in made else fraction for split, fraction in zip(SPLITS, fractions)]
    grades = defaultdict(list)
    for entry in entries:
        if entry.split is None:
            grades[entry.patient].append(-1 if entry.grade is None else entry.grade)
    split = split_patients(grades, [fraction / sum(free) for fraction in free], seed)
    return [entry if entry.split else replace(entry, split=split[entry.patient]) for entry in entries]
