"""Quality of a frozen backbone's features for grading: k nearest neighbours and a linear probe, fitted to the training
split's grades and measured on the validation split.

The features are ``ercn.models.embed`` of pictures without augmentation. kNN: the k most similar training pictures by
cosine vote with weight exp(cosine / 0.07) (Wu et al. 2018). Linear probe: multinomial logistic regression with an L2
penalty (C = 1) on standardised features. Both are deterministic.
"""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from ercn.config import DataConfig
from ercn.data import Manifest, Record
from ercn.data.loading import make_loader, picture_dataset
from ercn.evaluation import metrics
from ercn.models import embed
from ercn.training.callbacks import EpochLog
from ercn.training.steps import gather_objects

NEIGHBOURS = 20
TEMPERATURE = 0.07


def knn_predict(train: np.ndarray, grade: np.ndarray, test: np.ndarray, *, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Classes [M] of features ``test`` [M, D] from ``train`` [N, D] with classes [N]; at most N neighbours vote."""
    a, b = (torch.nn.functional.normalize(torch.from_numpy(x).float(), dim=1) for x in (test, train))
    votes = torch.zeros(len(test), int(grade.max()) + 1)
    one_hot = torch.eye(votes.shape[1])[torch.from_numpy(grade)]
    for rows in torch.arange(len(test)).split(1024):
        near = (a[rows] @ b.T).topk(min(neighbours, len(train)), dim=1)
        weight = ((near.values - 1) / TEMPERATURE).exp()  # -1 cancels in the vote and keeps exp below 1
        votes[rows] = (weight[:, :, None] * one_hot[near.indices]).sum(1)
    return votes.argmax(1).numpy()


def linear_predict(train: np.ndarray, grade: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classes [M] by logistic regression, shapes as of ``knn_predict``; a single class is predicted as it is."""
    if len(np.unique(grade)) == 1:
        return np.full(len(test), grade[0])
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, grade).predict(test)


class Probe(pl.Callback):
    """knn_accuracy, knn_kappa, linear_accuracy and linear_kappa in metrics.csv after every ``every``-th epoch and the
    last one.

    latest: the last measurement, None before there is one. With several devices each reads its share of the pictures.
    """

    latest: dict[str, float] | None = None

    def __init__(self, manifest: Manifest, config: DataConfig, *, every: int) -> None:
        self.every, self.classes = every, len(manifest.class_names)
        self.splits = [manifest.split(name) for name in ("train", "val")]
        self.mean, self.std, self.config = manifest.mean, manifest.std, config

    @classmethod
    def of(cls, manifest: Manifest, config: DataConfig, every: int) -> Probe | None:
        """None where ``every`` is 0, or where the train or val split has no grades."""
        graded = manifest.class_names and manifest.split("train") and manifest.split("val")
        return cls(manifest, config, every=every) if every and graded else None

    def measure(self, backbone: nn.Module, device: torch.device, rank: int = 0, world: int = 1) -> dict[str, float]:
        """The four metrics; accuracy as a share, kappa quadratic weighted."""
        splits = [self._features(backbone.to(device), records, rank, world) for records in self.splits]
        (train, grade), (test, truth) = splits
        result = {}
        for name, predict in (("knn", knn_predict), ("linear", linear_predict)):
            predicted = predict(train, grade, test)
            matrix = metrics.confusion(truth, predicted, self.classes, np.ones((1, len(truth))))
            result[f"{name}_accuracy"] = float(metrics.accuracy(matrix)[0])
            result[f"{name}_kappa"] = float(metrics.quadratic_kappa(matrix)[0])
        return result

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every and trainer.current_epoch + 1 < trainer.max_epochs:
            return
        self.latest = self.measure(module.online.backbone, module.device, trainer.global_rank, trainer.world_size)
        for log in (callback for callback in trainer.callbacks if isinstance(callback, EpochLog)):
            log.extra |= self.latest

    @torch.no_grad()
    def _features(
        self, backbone: nn.Module, records: list[Record], rank: int, world: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and grades [N] of the records that can be read."""
        device = next(backbone.parameters()).device
        dataset = picture_dataset(records[rank::world], self.mean, self.std, self.config, seed=0, augment=False)
        training = backbone.training
        backbone.eval()
        parts = [
            (embed(backbone, batch["image"].to(device)).float().cpu().numpy(), batch["grade"].numpy())
            for batch in make_loader(dataset, self.config.batch_size, self.config.workers)
            if batch is not None
        ]
        backbone.train(training)
        parts = [part for own in gather_objects(parts) for part in own] if world > 1 else parts
        return tuple(np.concatenate(column) for column in zip(*parts))
