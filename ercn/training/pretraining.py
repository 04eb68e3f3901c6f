"""Contrastive pre-training of the backbone on the training split's pictures, without their labels.

SimCLR (Chen et al. 2020): both views through backbone and projection head, NT-Xent over the batch. MoCo v2 (He et al.
2020, Chen et al. 2020): the second view through a momentum copy, InfoNCE against the keys of the batch and a queue of
earlier ones (``KeyQueue``). NT-Xent, heads and the momentum update are lightly's. Several devices act as one with all
their pictures, except for BatchNorm, which ``run.sync_batchnorm`` joins.
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
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ercn._seeding import derive, generator
from ercn.checkpoint import save_weights
from ercn.config import PretrainConfig
from ercn.data.loading import load_manifest, need_split
from ercn.evaluation.infer import pick_device
from ercn.models import check_side, create_backbone, embed
from ercn.report.page import write_report
from ercn.training import run_folder, steps
from ercn.training.loaders import PictureData
from ercn.training.probing import Probe

LESS_MEMORY = (
    "less is needed with --run.grad_checkpointing true, then --run.precision bf16-mixed, then a smaller "
    "--data.batch_size or --data.image_size"
)


class Embedder(nn.Module):
    """Backbone, mean over its last map, head: [B, 3, S, S] -> [B, projection_dim], float32 or wider."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, image: Tensor) -> Tensor:
        embedding = self.head(embed(self.backbone, image))
        return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


class KeyQueue(nn.Module):
    """InfoNCE against the keys of the batch and of a queue of earlier ones, without keys of the query's own picture.

        L = mean_i -log exp(q_i·k_i / T) / (exp(q_i·k_i / T) + Σ_j exp(q_i·k_j / T))

    with q and k normalised to length 1 and j over the keys, of batch and queue, of other pictures than that of q_i.
    MoCo does not know the pictures: on a small set its queue holds a key of the query's own picture from the last
    epoch, and takes it for a negative. MoCo's negatives are those of the queue alone; here the batch adds its own, so
    that there are negatives from the first step on, and BatchNorm cannot tell the positive from all negatives.

    size: number of keys kept, the latest; 0 for none. dim: their width. temperature: T.
    keys [size, dim] and pictures [size], -1 where there is no key yet, are in the state dict.
    """

    def __init__(self, size: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("pictures", torch.full((size,), -1))

    def forward(self, query: Tensor, key: Tensor, picture: Tensor) -> Tensor:
        """The loss of ``query`` and ``key`` [B, dim], views of pictures number ``picture`` [B]; then keeps the keys."""
        with torch.autocast(query.device.type, enabled=False):
            query, key = F.normalize(query, dim=1), F.normalize(key.detach(), dim=1)
            keys, pictures = torch.cat([self.keys, key]), torch.cat([self.pictures, picture])
            own = (pictures == picture[:, None]) | (pictures < 0)
            negative = (query @ keys.T).masked_fill(own, -torch.inf)
            logits = torch.cat([(query * key).sum(1, keepdim=True), negative], 1) / self.temperature
            loss = F.cross_entropy(logits, torch.zeros_like(picture))
        self.keys.copy_(keys[len(key) :])
        self.pictures.copy_(pictures[len(key) :])
        return loss


def momentum_of(steps: int) -> float:
    """Momentum at which the momentum encoder follows within a tenth of a run of ``steps`` steps."""
    return min(0.999, max(0.0, 1 - 10 / steps))


class Contrastive(pl.LightningModule):
    """One optimizer step on two views a picture. queue: keys that MoCo v2 keeps; not read by SimCLR."""

    def __init__(self, config: PretrainConfig, queue: int) -> None:
        super().__init__()
        self.config = config
        backbone = create_backbone(config.backbone, config.output_stride, kwargs=config.backbone_kwargs)
        width = backbone.feature_info.channels()[-1]
        moco = config.method == "moco_v2"
        head = MoCoProjectionHead if moco else SimCLRProjectionHead
        self.online = Embedder(backbone, head(width, width, config.projection_dim))
        self.momentum = copy.deepcopy(self.online) if moco else None
        if moco:
            deactivate_requires_grad(self.momentum)
            self.loss = KeyQueue(queue, config.projection_dim, config.temperature)
        else:
            self.loss = NTXentLoss(config.temperature)

    def configure_optimizers(self) -> dict[str, Any]:
        return steps.adamw(self, self.config.run)

    def training_step(self, batch: dict[str, Tensor] | None, step: int) -> Tensor | None:
        read, world = 0 if batch is None else len(batch["views"]), self.trainer.world_size
        if world == 1 and read < 2:  # the others are unreadable: nothing to contrast with
            return None
        torch.manual_seed(derive(self.config.run.seed, "step", self.current_epoch, step, self.global_rank))
        first, second = (steps.laid_out(views, self.config.run) for views in self._views(batch).unbind(1))
        z0 = steps.gather(self.online(first)[:read])
        if self.momentum is None:
            z1 = steps.gather(self.online(second)[:read])
        else:
            z1 = self._keys(second[:read], step)
            picture = steps.gather(batch["index"] if batch else torch.zeros(0, dtype=torch.int64, device=self.device))
        if len(z0) < 2:
            return 0 * z0.sum()
        loss = self.loss(z0, z1) if self.momentum is None else self.loss(z0, z1, picture)
        with torch.no_grad():
            nearest = (F.normalize(z0, dim=1) @ F.normalize(z1, dim=1).T).argmax(1)
            top1 = (nearest == torch.arange(len(z0), device=nearest.device)).float().mean()
        for name, value in (("loss", loss.detach()), ("top1", top1)):
            self.log(name, value, on_step=False, on_epoch=True, prog_bar=True, sync_dist=world > 1, batch_size=len(z0))
        return loss * world

    def _views(self, batch: dict[str, Tensor] | None) -> Tensor:
        """[B, 2, 3, S, S], padded to B = 2 by blank pictures, as BatchNorm needs; their embeddings are dropped."""
        size = self.config.data.image_size
        views = batch["views"] if batch else torch.zeros(0, 2, 3, size, size, dtype=self.dtype, device=self.device)
        return F.pad(views, (0, 0) * 4 + (0, max(0, 2 - len(views))))

    @torch.no_grad()
    def _keys(self, image: Tensor, step: int) -> Tensor:
        """The momentum copy's embeddings of all ranks' pictures, shuffled before so that BatchNorm leaks nothing."""
        momentum, world = self.config.momentum, self.trainer.world_size
        if momentum is None:
            momentum = momentum_of(self.trainer.num_training_batches * self.trainer.max_epochs)
        update_momentum(self.online, self.momentum, momentum)
        if world == 1:
            return self.momentum(image)
        everyone = steps.gather(image)
        draw = generator(self.config.run.seed, "shuffle", self.current_epoch, step)
        order = torch.randperm(len(everyone), generator=draw)
        shares = [order[rank::world] for rank in range(world)]
        own = shares[self.global_rank]
        keys = steps.gather(self.momentum(everyone[own if len(own) else [0]])[: len(own)])
        return keys[torch.cat(shares).argsort()]


def pretrain(config: PretrainConfig) -> Path:
    """Pre-trains the backbone and exports it to ``run.out/export/backbone.safetensors`` and ``.json``.

    metrics.csv has, per epoch, the contrastive loss; top1, the share of pictures whose nearest second view in the batch
    is their own; and, where the train and val split have grades, accuracy and kappa of k nearest neighbours and of a
    linear probe on the frozen features (``ercn.training.probing``). "probe" in backbone.json has these of the untrained
    backbone and of the exported one. Deterministic on the CPU: killed and resumed (``run.resume``), it ends with the
    same weights. Returns the run folder. Raises ValueError or DataError naming the argument or file.
    """
    manifest = load_manifest(config.data.root)
    pictures = len(need_split(manifest, "train", config.data.root))
    if min(pictures, config.data.batch_size) < 2:
        raise ValueError(
            f"contrastive pre-training needs at least 2 pictures a batch; data.batch_size is {config.data.batch_size} "
            f"and {config.data.root} has {pictures} in the train split"
        )
    torch.manual_seed(derive(config.run.seed, "init"))
    module = Contrastive(config, min(config.queue_size, pictures // 8))
    check_side(module.online, config.data.image_size)
    steps.set_up(module, module.online, config.run)
    trainer = run_folder.make_trainer(config.run, monitor=None)
    checkpoint = run_folder.open_run(config)
    data = PictureData(manifest, config.data, seed=config.run.seed)
    out = Path(config.run.out)
    backbone, device = module.online.backbone, pick_device(config.run.accelerator)
    probe = Probe.of(manifest, config.data, config.probe_every)
    before = after = None
    if probe is not None:
        before = probe.measure(backbone, device) if rank_zero_only.rank == 0 else None
        trainer.callbacks.insert(0, probe)  # before EpochLog, which writes the probe's values
    if not run_folder.fit(trainer, module, data, checkpoint, lambda: LESS_MEMORY):
        return out
    if before is not None:
        after = probe.latest or probe.measure(backbone, device)
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
            "probe": None if before is None else {"before": before, "after": after},
            "unreadable": data.unreadable,
        },
    )
    write_report(out)
    return out
