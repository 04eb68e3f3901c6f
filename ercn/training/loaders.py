"""Loaders: the training order is a function of (seed, epoch); evaluation sees every picture once, unpadded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ercn._seeding import generator
from ercn.config import DataConfig
from ercn.data import Manifest, PictureDataset, Record
from ercn.data.loading import labelled, make_loader, picture_dataset, sampling_weights
from ercn.data.normalization import surround
from ercn.training.steps import gather_objects


class EpochSampler(Sampler[int]):
    """This rank's share of one epoch's order.

    weights: None visits every picture once, in a random order; [N] draws N pictures with these probabilities, with
    replacement (balanced sampling). Up to world - 1 pictures are left out, so that all ranks have the same number of
    pictures and, with ``drop_last``, of batches of one size.
    Lightning calls ``set_epoch``, which passes the epoch on to the data set, before the workers start.
    """

    def __init__(
        self, dataset: PictureDataset, *, seed: int, rank: int, world: int, weights: np.ndarray | None = None
    ) -> None:
        self.dataset, self.seed, self.rank, self.world, self.weights = dataset, seed, rank, world, weights
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset) // self.world

    def __iter__(self) -> Iterator[int]:
        draw = generator(self.seed, "order", self.epoch)
        count = len(self.dataset)
        if self.weights is None:
            order = torch.randperm(count, generator=draw)
        else:
            order = torch.multinomial(torch.as_tensor(self.weights), count, replacement=True, generator=draw)
        return iter(order[self.rank :: self.world][: len(self)].tolist())


class PictureData(pl.LightningDataModule):
    """The training pictures of a prepared folder in two views each, for contrastive learning.

    unreadable: after the fit, ``{"id", "reason"}`` of the training pictures that were skipped, on all ranks.
    first_epoch: where a resumed run begins; Lightning starts that epoch's workers before it calls ``set_epoch``.
    """

    first_epoch = 0

    def __init__(self, manifest: Manifest, config: DataConfig, *, seed: int) -> None:
        super().__init__()
        self.manifest, self.config, self.seed = manifest, config, seed
        self.unreadable: list[dict[str, str]] = []

    def train_dataloader(self) -> DataLoader:
        records = self._records()
        if len(records) < (world := self.trainer.world_size):
            raise ValueError(f"{world} devices need a training picture each, but {self.config.root} has {len(records)}")
        dataset = self._pictures(records, **self._training())
        sampler = EpochSampler(
            dataset,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            weights=self._weights(records),
        )
        sampler.set_epoch(self.first_epoch)
        return make_loader(
            dataset,
            min(self.config.batch_size, len(sampler)),
            self.config.workers,
            sampler=sampler,
            drop_last=True,
            persistent_workers=self.config.workers > 0,  # they keep decoded pictures
        )

    def teardown(self, stage: str) -> None:
        loader = self.trainer.train_dataloader  # None where no epoch was left
        faults = gather_objects({} if loader is None else loader.dataset.faults())
        named = {id: reason for rank in faults for id, reason in rank.items()}
        self.unreadable = [{"id": id, "reason": reason} for id, reason in sorted(named.items())]

    def _records(self) -> list[Record]:
        return self.manifest.split("train")

    def _training(self) -> dict[str, Any]:
        return {"augment": True, "views": 2, "contrastive": True}

    def _weights(self, records: list[Record]) -> np.ndarray | None:
        return None

    def _pictures(self, records: list[Record], **options) -> PictureDataset:
        manifest = self.manifest
        options |= {"seed": self.seed, "surround": surround(manifest.normalize)}
        return picture_dataset(records, manifest.mean, manifest.std, self.config, **options)


class GradedData(PictureData):
    """Training and validation pictures with grades. ``config.balance`` "sampler" draws every grade equally often."""

    def _records(self) -> list[Record]:
        return labelled(self.manifest.split("train"), self.config.label_fraction, self.seed)

    def _training(self) -> dict[str, Any]:
        return {"augment": self.config.augment}

    def _weights(self, records: list[Record]) -> np.ndarray | None:
        return sampling_weights(records) if self.config.balance == "sampler" else None

    def val_dataloader(self) -> DataLoader:
        records = self.manifest.split("val")[self.trainer.global_rank :: self.trainer.world_size]
        if not records:
            return DataLoader([None], batch_size=None)  # without a batch on this rank, the others would wait for ever
        return make_loader(self._pictures(records, augment=False), self.config.batch_size, self.config.workers)
