"""Splits by patient: making them, checking them, and their hashes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ercn.data.images import DataError

SPLITS = ("train", "val", "test")
# (id, patient, grade or None, split) of one picture
Assignment = tuple[str, str, int | None, str]


def check_fractions(fractions: Sequence[float]) -> None:
    fractions = np.asarray(fractions, float)
    if fractions.shape != (3,) or (fractions < 0).any() or fractions[0] == 0 or abs(fractions.sum() - 1) > 1e-6:
        raise DataError(
            f"fractions must be three numbers >= 0 for train (> 0), val and test that sum to 1; got {fractions}"
        )


def split_patients(grades: Mapping[str, Sequence[int]], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Puts each patient in one split, stratified by the worst grade of the patient's pictures.

    Every stratum is shuffled and dealt out by ``fractions``, the largest first; rounding errors are carried to the next
    stratum, so that the sizes of the splits are right to within a few patients. The first patient of each stratum goes
    to train, which so has every worst grade. (scikit-learn's StratifiedGroupKFold has equal folds only.)

    grades: patient to the grades of that patient's pictures. fractions: of train, val and test, summing to 1.
    Deterministic in (grades, fractions, seed); the order of ``grades`` does not matter.
    """
    check_fractions(fractions)
    fractions = np.asarray(fractions, float)
    strata = defaultdict(list)
    for patient in sorted(grades):
        strata[max(grades[patient])].append(patient)
    rng = np.random.default_rng([seed, 0x73706C74])
    split, owed = {}, np.zeros(3)
    for grade in sorted(strata, key=lambda grade: (-len(strata[grade]), grade)):
        patients = [strata[grade][i] for i in rng.permutation(len(strata[grade]))]
        owed += fractions * len(patients)
        given = np.zeros(3, int)
        for _ in patients:
            due = np.where(fractions > 0, owed - given, -np.inf)
            given[0 if not given.any() else int(due.argmax())] += 1
        owed -= given
        split.update(zip(patients, np.repeat(SPLITS, given).tolist()))
    return split


def check_splits(pictures: Iterable[Assignment], class_names: Sequence[str], source: str) -> list[str]:
    """Raises DataError naming ``source``, a file or folder, if a patient is in two splits, a class has no picture or
    none in train, or the train split is empty.

    Returns a sentence for each of val and test that has pictures, but not of every class.
    """
    home: dict[str, str] = {}
    count = {split: np.zeros(len(class_names), int) for split in SPLITS}
    for id, patient, grade, split in pictures:
        if home.setdefault(patient, split) != split:
            raise DataError(
                f"{source}: patient {patient!r} is in the splits {home[patient]!r} and {split!r} (picture {id!r}); "
                "a patient belongs to one split"
            )
        if grade is not None:
            count[split][grade] += 1
    for grade, name in enumerate(class_names):
        if not any(count[split][grade] for split in SPLITS):
            raise DataError(f"{source}: no picture of grade {grade} ({name}); every grade needs some")
        if count["train"][grade] == 0:
            raise DataError(
                f"{source}: no picture of grade {grade} ({name}) in the train split; add patients or change fractions "
                "or seed"
            )
    if "train" not in home.values():
        raise DataError(f"{source}: no picture in the train split; add patients or change fractions")
    missing = []
    for split in ("val", "test"):
        names = [f"{grade} ({class_names[grade]})" for grade in np.flatnonzero(count[split] == 0)]
        if names and count[split].any():
            missing.append(f"no picture of grade {', '.join(names)} in the {split} split")
    return missing


def split_hashes(pictures: Iterable[Assignment]) -> dict[str, dict]:
    """Pictures, patients and SHA-256 of each split; the hash is of its sorted lines ``id<TAB>patient<TAB>grade``, where
    a missing grade is empty."""
    chosen = defaultdict(list)
    for id, patient, grade, split in pictures:
        chosen[split].append((id, patient, "" if grade is None else grade))
    result = {}
    for split in SPLITS:
        lines = "".join(f"{id}\t{patient}\t{grade}\n" for id, patient, grade in sorted(chosen[split]))
        result[split] = {
            "pictures": len(chosen[split]),
            "patients": len({patient for _, patient, _ in chosen[split]}),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        }
    return result
