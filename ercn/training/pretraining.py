"""Contrastive pre-training of the backbone on the training split's pictures, without their labels.

SimCLR (Chen et al. 2020): both views through backbone and projection head, NT-Xent over the batch. MoCo v2 (He et al.
2020, Chen et al. 2020): the second view through a momentum copy, NT-Xent against a queue of earlier keys. Losses,
heads and the momentum update are lightly's. With several devices the negatives are gathered over all of them.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import (
    batch_shuffle,
    batch_unshuffle,
    deactivate_requires_grad,
    update_momentum,
)
from torch import Tensor, nn

from ercn.config import PretrainConfig
from ercn.models import create_backbone, stages
from ercn.training import runs
from ercn.training.checkpoint import save_weights
from ercn.training.loaders import PictureData, need_whole_batches
from ercn.training.pictures import load_manifest, need_split
from ercn.training.report import write_report
from ercn.training.schedule import adamw
from ercn.training.seeding import derive


class Embedder(nn.Module):
    """Backbone, mean over the last feature map, projection head: [B, 3, S, S] -> [B, projection_dim]."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, image: Tensor) -> Tensor:
        return self.head(stages(self.backbone, image)[-1].mean((2, 3)))


class Contrastive(pl.LightningModule):
    """One optimizer step on two views a picture. queue: keys that MoCo v2 keeps; not read by SimCLR."""

    def __init__(self, config: PretrainConfig, queue: int) -> None:
        super().__init__()
        self.config = config
        backbone = create_backbone(config.backbone, config.output_stride)
        width = backbone.feature_info.channels()[-1]
        moco = config.method == "moco_v2"
        head = MoCoProjectionHead if moco else SimCLRProjectionHead
        self.online = Embedder(backbone, head(width, width, config.projection_dim))
        self.momentum = copy.deepcopy(self.online) if moco else None
        if moco:
            deactivate_requires_grad(self.momentum)
        self.loss = NTXentLoss(
            temperature=config.temperature,
            memory_bank_size=(queue, config.projection_dim) if moco else 0,
            gather_distributed=config.run.devices * config.run.num_nodes > 1,
        )
        if moco:  # lightly leaves the queue out of the state dict; an exact resume needs it
            bank = self.loss.memory_bank
            bank.register_buffer("bank", bank.bank)
            bank.register_buffer("bank_ptr", bank.bank_ptr)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self, self.config.run)

    def training_step(self, batch: dict[str, Tensor] | None, step: int) -> Tensor | None:
        read = 0 if batch is None else len(batch["views"])
        if read < self.trainer.train_dataloader.batch_size:  # the other pictures were unreadable
            need_whole_batches(self.trainer)
        if read < 2:  # nothing to contrast with
            return None
        torch.manual_seed(derive(self.config.run.seed, "step", self.current_epoch, step, self.global_rank))
        layout = torch.channels_last if self.config.run.channels_last else torch.contiguous_format
        first, second = (batch["views"][:, i].contiguous(memory_format=layout) for i in (0, 1))
        z0 = self.online(first)
        z1 = self.online(second) if self.momentum is None else self._keys(second)
        loss = self.loss(z0, z1)
        with torch.no_grad():
            nearest = (F.normalize(z0.float(), dim=1) @ F.normalize(z1.float(), dim=1).T).argmax(1)
            top1 = (nearest == torch.arange(len(z0), device=nearest.device)).float().mean()
        for name, value in (("loss", loss.detach()), ("top1", top1)):
            several = self.trainer.world_size > 1
            self.log(name, value, on_step=False, on_epoch=True, prog_bar=True, sync_dist=several, batch_size=len(z0))
        return loss

    @torch.no_grad()
    def _keys(self, image: Tensor) -> Tensor:
        """The momentum copy's embeddings; several devices shuffle the batch, so that BatchNorm leaks nothing."""
        update_momentum(self.online, self.momentum, self.config.momentum)
        if self.trainer.world_size == 1:
            return self.momentum(image)
        shuffled, order = batch_shuffle(image, distributed=True)
        return batch_unshuffle(self.momentum(shuffled), order, distributed=True)


def pretrain(config: PretrainConfig) -> Path:
    """Pre-trains the backbone and exports it to ``run.out/export/backbone.safetensors`` and ``.json``.

    metrics.csv has, per epoch, the contrastive loss and top1, the share of pictures whose nearest second view in the
    batch is their own. Deterministic on the CPU: killed and resumed (``run.resume``), it ends with the same weights.
    Returns the run folder. Raises ValueError or DataError with a sentence naming the argument or file.
    """
    manifest = load_manifest(config.data.root)
    pictures = len(need_split(manifest, "train", config.data.root))
    if min(pictures, config.data.batch_size) < 2:
        raise ValueError(
            f"contrastive pre-training needs at least 2 pictures a batch; data.batch_size is {config.data.batch_size} "
            f"and {config.data.root} has {pictures} in the train split"
        )
    torch.manual_seed(derive(config.run.seed, "init"))
    # A queue longer than an epoch would hold each picture several times, as negatives of itself.
    module = Contrastive(config, min(config.queue_size, pictures))
    runs.use_channels_last(module, config.run.channels_last)
    trainer = runs.make_trainer(config.run, monitor=None)
    checkpoint = runs.open_run(config)
    data = PictureData(manifest, config.data, seed=config.run.seed)
    out = Path(config.run.out)
    if not runs.fit(trainer, module, data, checkpoint):
        return out
    save_weights(
        out / "export",
        "backbone",
        module.online.backbone.state_dict(),
        {
            "backbone": config.backbone,
            "method": config.method,
            "config": asdict(config),
            "dataset": manifest.dataset,
            "manifest": manifest.hash,
            "mean": list(manifest.mean),
            "std": list(manifest.std),
            "unreadable": data.unreadable,
        },
    )
    write_report(out)
    return out
