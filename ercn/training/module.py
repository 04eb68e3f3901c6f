"""The training step of ERCN as a Lightning module."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from ercn._seeding import derive, generator
from ercn.config import TrainConfig
from ercn.evaluation import metrics
from ercn.losses import classification_loss
from ercn.maps import extent, flat
from ercn.models import ERCN, grade_probabilities, targets_from_grades
from ercn.objective import ercn_loss
from ercn.training import steps
from ercn.transforms import sample_transform

MONITOR = "val_kappa"


class ERCNModule(pl.LightningModule):
    """``ercn_loss`` under AdamW.

    Each validation logs accuracy, quadratic weighted kappa and loss, and for pictures with disease (0 without any) the
    share whose CAM is flat and how much of its map a CAM covers (``maps.flat``, ``maps.extent``).

    The map A of a step is drawn from (seed, epoch, step) and is the same on all ranks; dropout depends on the rank too.
    Loss and gradients of several ranks are those of all their pictures as one batch, however many each could read.
    class_weight: [num_grades] or None.
    """

    def __init__(self, model: ERCN, config: TrainConfig, class_weight: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.validated: list[tuple[Tensor, ...]] = []

    def configure_optimizers(self) -> dict[str, Any]:
        return steps.adamw(self, self.config.run)

    def train(self, mode: bool = True) -> ERCNModule:
        super().train(mode)
        if self.config.run.freeze_batchnorm:
            for layer in self.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval().requires_grad_(False)
        return self

    def training_step(self, batch: dict[str, Tensor] | None, step: int) -> Tensor | None:
        config = self.config
        read = 0 if batch is None else len(batch["grade"])
        if not read:  # every picture of the batch was unreadable
            if self.trainer.world_size == 1:
                return None
            batch = self._blank()
        torch.manual_seed(derive(config.run.seed, "step", self.current_epoch, step, self.global_rank))
        transform = sample_transform(
            config.loss.transform,
            generator(config.run.seed, "transform", self.current_epoch, step, 0),  # the same on all ranks
            rescale=config.loss.rescale,
            size=config.data.image_size,
            align_corners=self.model.align_corners,
        )
        total, terms = ercn_loss(
            self.model,
            steps.laid_out(batch["image"], config.run),
            batch["grade"],
            config.model,
            config.loss,
            transform,
            weight_scale=min(1.0, (self.current_epoch + 1) / (config.loss.warmup_epochs + 1)),
            class_weight=self.class_weight,
        )
        terms = {"loss": total.detach(), **{f"loss_{name}": term for name, term in terms.items()}}
        self._log(terms, read)
        return steps.mean_share(total, read)

    def validation_step(self, batch: dict[str, Tensor] | None, step: int) -> None:
        if batch is None:
            return
        output = self.model(steps.laid_out(batch["image"], self.config.run), refine=False)
        logits = output.logits.float()
        target = targets_from_grades(batch["grade"], self.config.model)
        loss = torch.stack([classification_loss(a[None], b[None]) for a, b in zip(logits, target)])
        probability = grade_probabilities(logits, self.config.model)
        dead, covered = flat(output.cam, self.config.model), extent(output.cam, self.config.model)
        self.validated.append(tuple(x.cpu() for x in (probability, batch["grade"], loss, dead, covered)))

    def on_validation_epoch_end(self) -> None:
        parts, self.validated = [part for rank in steps.gather_objects(self.validated) for part in rank], []
        if not parts:
            raise ValueError("no picture of the val split could be read, so the best epoch cannot be chosen")
        probability, grade, loss, dead, covered = (torch.cat(columns).double().numpy() for columns in zip(*parts))
        classes = probability.shape[1]
        truth = metrics.classes_of(grade.astype(int), self.config.model.targets)
        matrix = metrics.confusion(truth, probability.argmax(1), classes, np.ones((1, len(truth))))
        values = {
            "val_accuracy": metrics.accuracy(matrix)[0],
            MONITOR: metrics.quadratic_kappa(matrix)[0],
            "val_loss": loss.mean(),
            "val_flat_cam": dead[grade > 0].mean() if (grade > 0).any() else 0.0,
            "val_cam_extent": covered[grade > 0].mean() if (grade > 0).any() else 0.0,
        }
        self.log_dict({name: float(v) for name, v in values.items()}, prog_bar=True)

    def _blank(self) -> dict[str, Tensor]:
        """A picture for a rank without any: the others wait for its gradients, which get weight 0."""
        size = self.config.data.image_size
        image = torch.zeros(1, 3, size, size, dtype=self.dtype, device=self.device)
        return {"image": image, "grade": torch.zeros(1, dtype=torch.int64, device=self.device)}

    def _log(self, values: dict[str, Tensor], count: int) -> None:
        for name, value in values.items():
            self.log(
                name,
                value,
                on_step=False,
                on_epoch=True,
                prog_bar=name == "loss",
                sync_dist=self.trainer.world_size > 1,
                batch_size=count,
            )
