"""Prepared pictures as data sets and loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ercn._seeding import generator
from ercn.config import DataConfig
from ercn.data import DataError, Manifest, PictureDataset, Record, collate


def load_manifest(root: str) -> Manifest:
    if not root:
        raise ValueError("data.root is missing: give the folder that ercn prepare wrote, --data.root FOLDER")
    return Manifest.load(root)


def need_split(manifest: Manifest, name: str, root: str) -> list[Record]:
    """The split's records; ValueError where there is none."""
    records = manifest.records if name == "all" else manifest.split(name)
    if not records:
        raise ValueError(f"{root} has no picture in the {name} split; prepare it with other fractions or more patients")
    return records


def picture_dataset(
    records: Sequence[Record],
    mean: Sequence[float],
    std: Sequence[float],
    config: DataConfig,
    *,
    seed: int,
    augment: bool,
    **options,
) -> PictureDataset:
    """Pictures normalised with ``mean`` and ``std`` of the data set that the model was trained on."""
    return PictureDataset(
        list(records),
        config.image_size,
        mean=mean,
        std=std,
        augment=augment,
        seed=seed,
        max_unreadable=config.max_unreadable,
        **options,
    )


class PictureLoader(DataLoader):
    """Raises a worker's DataError as one sentence; torch alone wraps it in the worker's traceback."""

    def __iter__(self) -> Iterator[Any]:
        return self._with_plain_errors(super().__iter__())

    def _with_plain_errors(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except DataError:
            self.dataset.check_unreadable()
            raise


def make_loader(dataset: PictureDataset, batch_size: int, workers: int, **options) -> PictureLoader:
    return PictureLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def labelled(records: Sequence[Record], fraction: float, seed: int) -> list[Record]:
    """The records of a share of the patients, stratified by their worst grade, at least one patient of each.

    Every stratum is shuffled by ``seed`` and its first patients are taken, so that a smaller share is a part of a
    larger one. The choice of patients does not depend on the order of ``records``.
    """
    worst: dict[str, int] = {}
    for record in records:
        worst[record.patient] = max(record.grade, worst.get(record.patient, 0))
    draw = generator(seed, "labels")
    kept: set[str] = set()
    for grade in sorted(set(worst.values())):
        patients = sorted(patient for patient, own in worst.items() if own == grade)
        order = torch.randperm(len(patients), generator=draw).tolist()
        kept.update(patients[i] for i in order[: max(1, round(fraction * len(patients)))])
    return [record for record in records if record.patient in kept]


def class_counts(records: Sequence[Record], classes: int) -> np.ndarray:
    return np.bincount([r.grade for r in records], minlength=classes)


def sampling_weights(records: Sequence[Record]) -> np.ndarray:
    """Per picture 1 / (pictures of its grade), so that every grade present is drawn equally often."""
    grades = np.array([r.grade for r in records])
    return 1.0 / np.bincount(grades)[grades]
